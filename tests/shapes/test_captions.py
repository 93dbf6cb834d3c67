"""Captions say what the labels are, and are read back to the same."""

import random

import pytest
import torch

from compressor.errors import CompressorError
from compressor.shapes import captions, scenes
from compressor.shapes.captions import Demand, Thing
from compressor.shapes.train import prompts


def _demands(count, seed):
    return list(captions.demands(prompts.labels(scenes.sample(count, seed))))


def test_what_is_written_is_read_back():
    rng = random.Random(0)
    demands = [captions.forget(demand, rng, 0.3) for demand in _demands(5000, 0)]
    for demand in demands:
        caption = captions.write(demand, rng)
        assert captions.parse(caption) == demand, caption


def test_there_are_more_than_ten_thousand_captions():
    rng = random.Random(1)
    assert len({captions.write(captions.forget(demand, rng), rng) for demand in _demands(20_000, 1)}) > 10_000


def test_one_scene_has_many_wordings():
    rng = random.Random(2)
    assert len({captions.write(_demands(1, 3)[0], rng) for _ in range(300)}) > 50


def test_the_left_or_upper_thing_stands_first_whichever_is_named_first():
    red, blue = Thing("circle", "red", "small"), Thing("square", "blue", None)
    for caption, layout in (
        ("a small red circle to the left of a blue square", "horizontal"),
        ("There is a blue square with a little red circle to its left.", "horizontal"),
        ("a blue square under a small red circle", "vertical"),
        ("an image of a small red circle at the top and a blue square at the bottom", "vertical"),
    ):
        assert captions.parse(caption) == Demand((red, blue), layout, None), caption


def test_a_background_is_read_wherever_it_stands():
    for caption in (
        "an orange star on a navy background, at the top",
        "at the top, an orange star against navy",
        "a navy background with an orange star at the top",
    ):
        assert captions.parse(caption) == Demand((Thing("star", "orange", None),), "top", "navy"), caption


@pytest.mark.parametrize(
    "caption", ["", "a cat", "a red circle beside a blue square", "a red circle on a red background"]
)
def test_a_caption_of_another_language_is_refused(caption):
    with pytest.raises(CompressorError) as error:
        captions.parse(caption)
    assert str(error.value) == (
        f"caption {caption!r} cannot be read as a scene; it should be like "
        "'a small red circle to the left of a blue square on a white background'"
    )


def test_the_shipped_lists_are_what_the_code_writes():
    assert captions.evaluation() == prompts.evaluation()
    assert captions.calibration() == prompts.calibration()


def test_the_lists_are_long_and_without_repeats_and_disjoint():
    calibration, evaluation = captions.calibration(), captions.evaluation()
    assert len(set(calibration)) == len(calibration) == 1024
    assert len(set(evaluation)) == len(evaluation) == 1024
    assert not set(calibration) & set(evaluation)
    assert not {captions.parse(caption) for caption in calibration} & {
        captions.parse(caption) for caption in evaluation
    }


def test_the_first_512_evaluation_captions_are_half_of_one_object_and_complete():
    demands = [captions.parse(caption) for caption in captions.evaluation()[:512]]
    assert sum(len(demand.things) == 1 for demand in demands) == 256
    assert all(demand.background and demand.layout and all(t.size for t in demand.things) for demand in demands)


def test_held_out_codes_are_those_of_the_scenes_named():
    drawn = scenes.sample(300, 9)
    rng = random.Random(0)
    written = [captions.write(demand, rng) for demand in captions.demands(prompts.labels(drawn))]
    assert torch.equal(prompts.held_out(written), drawn.codes())
