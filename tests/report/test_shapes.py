import pytest
import torch

from compressor import builtin
from compressor.plugin import Samples
from compressor.report import measure
from compressor.report.shapes import Shapes
from compressor.shapes import captions, judge, scenes


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Samples:
    """Pictures of scenes that are not those of the captions, and a judge that has learnt nothing."""
    torch.manual_seed(0)
    network = judge.Judge().eval().requires_grad_(False)
    monkeypatch.setattr(judge, "load", lambda: network)
    pictures, nothing = scenes.render(scenes.sample(140, seed=3)), torch.zeros(140, 1)
    return Samples(tuple(captions.evaluation()[:140]), pictures, (pictures * 0.5).clamp(0, 1), nothing, nothing)


def first(samples: Samples, count: int) -> Samples:
    return Samples(samples.prompts[:count], *(getattr(samples, name)[:count] for name in
                   ("dense", "pruned", "dense_latents", "pruned_latents")))  # fmt: skip


def test_both_sides_have_the_judges_accuracies_with_standard_errors(drawn: Samples):
    figures = Shapes().measure(drawn)
    for side, images in (("dense", drawn.dense), ("pruned", drawn.pruned)):
        for name, accuracy in judge.score(judge.load(), images, drawn.prompts).items():
            assert figures[f"{side}_{name}"] == accuracy.right
            assert figures[f"{side}_{name}_se"] == accuracy.error
    assert figures["images"] == 140


def test_the_frechet_distance_is_from_dense_to_pruned(drawn: Samples):
    distance = judge.frechet_distance(judge.load(), drawn.pruned, drawn.dense)
    assert distance > 0
    assert Shapes().measure(drawn)["frechet"] == distance


def test_the_frechet_distance_of_nothing_pruned_is_0(drawn: Samples):
    same = Samples(drawn.prompts, drawn.dense, drawn.dense, drawn.dense_latents, drawn.dense_latents)
    assert Shapes().measure(same)["frechet"] == pytest.approx(0, abs=1e-4)


def test_too_few_images_for_the_frechet_distance_are_told(drawn: Samples):
    figures, said = measure({"shapes": Shapes()}, first(drawn, 128))
    assert "frechet" not in figures["shapes"]
    assert said == (
        "shapes: the Frechet distance is left out: it needs more than 128 images, found 128 (raise report.images)",
    )


def test_captions_that_the_judge_cannot_read_cost_its_figures_and_not_the_run(drawn: Samples):
    odd = first(drawn, 2)
    odd = Samples(
        ("an astronaut riding a horse", odd.prompts[1]), odd.dense, odd.pruned, odd.dense_latents, odd.pruned_latents
    )
    figures, said = measure({"shapes": Shapes()}, odd)
    assert figures == {}
    assert len(said) == 1
    assert said[0].startswith("shapes: left out: ")
    assert "astronaut" in said[0]


def test_the_judge_is_for_coloured_shapes_alone():
    assert all(Shapes().applies(f"builtin:{name}") for name in builtin.names())
    assert not Shapes().applies("stabilityai/stable-diffusion-3-medium-diffusers")
