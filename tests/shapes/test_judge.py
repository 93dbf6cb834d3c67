"""The shipped judge is right about drawn scenes, and its scores say what they should when pictures are altered."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from compressor.errors import CompressorError
from compressor.shapes import captions, judge, scenes
from compressor.shapes.train import prompts

ROWS = {"count", "shape", "colour", "size", "background", "position", "relation", "one_object", "bound", "two_objects"}


@pytest.fixture(scope="module")
def net():
    return judge.load()


def _scenes_with_captions(count, seed, pairs=0.6):
    drawn = scenes.sample(count, seed, pairs)
    rng = random.Random(seed)
    written = [captions.write(demand, rng) for demand in captions.demands(prompts.labels(drawn))]
    return scenes.render(drawn), written


def test_it_is_right_about_fresh_scenes(net):
    pictures, written = _scenes_with_captions(1500, 12345)
    table = judge.score(net, pictures, written)
    assert set(table) == ROWS
    for name, accuracy in table.items():
        assert accuracy.right >= 0.99, (name, str(accuracy))
    assert table["count"].count == 1500
    assert table["shape"].count == table["one_object"].count + 2 * table["two_objects"].count


def test_a_mirrored_pair_keeps_its_colours_and_loses_its_relation(net):
    drawn = scenes.sample(300, 1, pairs=1.0)
    drawn = drawn[drawn.layout == len(scenes.words.POSITIONS)]
    written = [captions.write(demand, random.Random(0)) for demand in captions.demands(prompts.labels(drawn))]
    table = judge.score(net, scenes.render(drawn).flip(3), written)
    assert table["bound"].right >= 0.99
    assert table["relation"].right == table["two_objects"].right == 0


def test_exchanged_colours_are_not_bound(net):
    drawn = scenes.sample(300, 2, pairs=1.0)
    drawn = drawn[(drawn.colour[:, 0] != drawn.colour[:, 1]) & (drawn.shape[:, 0] != drawn.shape[:, 1])]
    exchanged = [[*row[:3], row[6], row[4], row[5], row[3], row[7]] for row in prompts.labels(drawn)]
    written = [captions.write(demand, random.Random(0)) for demand in captions.demands(exchanged)]
    table = judge.score(net, scenes.render(drawn), written)
    assert table["bound"].right == table["two_objects"].right == 0
    assert table["background"].right >= 0.99


def test_what_a_caption_leaves_open_is_not_scored(net):
    pictures, _ = _scenes_with_captions(2, 3, pairs=0.0)
    assert set(judge.score(net, pictures, ["a red circle", "a blue star"])) == {
        "count",
        "shape",
        "colour",
        "one_object",
    }


def test_the_standard_error_is_that_of_a_share(net):
    pictures, written = _scenes_with_captions(40, 4, pairs=0.0)
    row = judge.score(net, pictures, written[:10] + written[11:] + written[10:11])["one_object"]
    assert row.error == pytest.approx((row.right * (1 - row.right) / 40) ** 0.5)
    assert str(judge.Accuracy(0.5, 0.25, 4)) == " 50.0 % +- 25.0 (of 4)"


def test_the_frechet_distance_is_that_of_two_normal_distributions(net):
    a, b = scenes.render(scenes.sample(300, 5)), scenes.render(scenes.sample(200, 6, pairs=0.0))
    x, y = (judge.features(net, pictures).double().numpy() for pictures in (a, b))
    assert x.shape == (300, judge.FEATURES)
    product = np.cov(x, rowvar=False) @ np.cov(y, rowvar=False)
    root = np.real(np.sqrt(np.linalg.eigvals(product).astype(complex))).sum()
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.cov(x, rowvar=False).trace() + np.cov(y, rowvar=False).trace()
    assert judge.frechet_distance(net, a, b) == pytest.approx(expected - 2 * root, rel=1e-4)
    assert judge.frechet_distance(net, a, a) == pytest.approx(0, abs=1e-2)


def test_the_file_is_at_most_one_megabyte():
    assert (Path(judge.__file__).parent / "judge.safetensors").stat().st_size <= 1_000_000


def test_pictures_of_another_size_are_refused(net):
    with pytest.raises(CompressorError) as error:
        judge.features(net, torch.zeros(2, 3, 32, 32))
    assert str(error.value) == "the judge reads pictures of 3 x 64 x 64, found 3 x 32 x 32"


def test_one_caption_a_picture_is_needed(net):
    with pytest.raises(CompressorError) as error:
        judge.score(net, torch.zeros(2, 3, 64, 64), ["a red circle"])
    assert str(error.value) == "one caption a picture is needed, found 1 for 2 pictures"


def test_a_damaged_judge_is_named(tmp_path, monkeypatch):
    file = tmp_path / "judge.safetensors"
    file.write_bytes(b"abc")
    (tmp_path / "hashes.json").write_text('{"sha256": {"judge.safetensors": "00ff"}}')
    monkeypatch.setattr(judge, "__file__", str(tmp_path / "judge.py"))
    with pytest.raises(CompressorError) as error:
        judge.load()
    assert str(error.value).startswith(f"{file}: weights file is damaged; found sha256 ba7816bf")
    assert "expected 00ff" in str(error.value)
