"""Whole runs on tiny pipelines of every family: what is on disk, read with safetensors and plain diffusers."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from compressor_magnitude import Magnitude
from compressor_obs_diff.weightings import LogDecrease, Uniform
from safetensors.torch import load_file
from torch import Tensor

from compressor import checkpoint, report
from compressor.errors import CompressorError
from compressor.plugin import LayerResult
from compressor.recipe import Recipe
from compressor.run import run
from compressor.structure import Component
from tests import tiny
from tests.layer_errors import relative_error
from tests.tiny import diffusers

pytestmark = pytest.mark.usefixtures("looked_at_once")

GRANULARITIES = {
    "unstructured": {"sparsity": 0.5},
    "n_m": {"granularity": {"n_m": {"keep": 2, "of": 4}}},
}


def recipe(kind: str, output: Path, prune: list[dict], dtype: torch.dtype = torch.float32, **changes: Any) -> Recipe:
    data = {
        "model": str(tiny.folder(kind, dtype)),
        "device": "cpu",
        "calibration": {
            "prompts": list(tiny.PROMPTS[:2]),
            "steps": 2,
            "batch": 2,
            "packages": 2,
            "height": tiny.SIDE,
            "width": tiny.SIDE,
        },
        "prune": prune,
        "report": {"images": 0},
        "output": str(output),
    }
    return Recipe.model_validate(data | changes)


def weights(kind: str, folder: Path) -> dict[str, Tensor]:
    return load_file(folder / tiny.NETWORK[kind] / "diffusion_pytorch_model.safetensors")


def draw(folder: Path) -> Tensor:
    """Two steps with plain diffusers."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, **missing(folder))
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        "a cat",
        num_inference_steps=2,
        height=tiny.SIDE,
        width=tiny.SIDE,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images


def missing(folder: Path) -> dict[str, None]:
    index = json.loads((folder / "model_index.json").read_text())
    return {name: None for name, entry in index.items() if isinstance(entry, list) and entry[1] is None}


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Callable[[str, str, str], Path]:
    """Results by kind, pruner and granularity, each made once."""

    @functools.cache
    def make(kind: str, pruner: str, granularity: str) -> Path:
        output = tmp_path_factory.mktemp("result") / "out"
        assert run(recipe(kind, output, [{pruner: GRANULARITIES[granularity]}]), tiny.quiet()) == output
        return output

    return make


RUNS = [
    (kind, pruner, granularity)
    for kind in tiny.KINDS
    for pruner in ("magnitude", "wanda", "obs_diff")
    for granularity in GRANULARITIES
    if kind != "sd35" or pruner == "obs_diff"
]


@pytest.mark.parametrize(("kind", "pruner", "granularity"), RUNS)
def test_a_run_keeps_its_promises(kind, pruner, granularity, results):
    source = tiny.folder(kind)
    output = results(kind, pruner, granularity)

    before, after = weights(kind, source), weights(kind, output)
    dense = tiny.load(kind)
    layers = {f"{target.name}.weight" for target in dense.targets}
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        assert tensor.dtype == before[name].dtype
        if name not in layers:
            assert torch.equal(tensor, before[name]), name
            continue
        assert int((before[name] == 0).sum()) == 0
        assert int((tensor == 0).sum()) == tensor.numel() // 2
        if granularity == "n_m":
            assert ((tensor.reshape(-1, 4) != 0).sum(1) == 2).all()
        kept = tensor != 0
        same = torch.equal(tensor[kept], before[name][kept])
        assert same == (pruner != "obs_diff")
    others = {f.relative_to(source) for f in source.rglob("*.safetensors") if f.parent.name != tiny.NETWORK[kind]}
    assert len(others) >= 2
    assert all((source / file).read_bytes() == (output / file).read_bytes() for file in others)

    record = json.loads((output / "compression.json").read_text())
    assert {f"{name}.weight" for name in record["layers"]} == layers
    for name, layer in record["layers"].items():
        tensor = after[f"{name}.weight"]
        assert layer["pruner"] == pruner
        assert layer["parameters"] == tensor.numel()
        assert layer["zeros"] == int((tensor == 0).sum())
        assert layer["sparsity"] == 0.5
        assert (layer["error"] is not None) == (pruner == "obs_diff")
        assert layer["error"] is None or 0 < layer["error"] < 1
    assert record["seed"] == 0
    assert record["component"] == tiny.NETWORK[kind]
    assert record["versions"]["torch"] == torch.__version__
    assert next(iter(record["recipe"]["prune"][0])) == pruner
    for file, expected in record["files"].items():
        assert hashlib.sha256((output / file).read_bytes()).hexdigest() == expected
    assert {str(f.relative_to(output)) for f in output.rglob("*") if f.is_file()} == {
        *record["files"],
        "compression.json",
        "report.json",
        "report.html",
    }

    facts = report.read(output / "report.json")
    assert {row.name for row in facts.layers} == set(record["layers"])
    pruned = sum(before[name].numel() // 2 for name in layers)
    assert facts.sizes.before.nonzero - facts.sizes.after.nonzero == pruned
    assert facts.sizes.before.parameters == sum(p.numel() for p in dense.module.parameters())
    macs_of = tiny.traced(dense).macs_of
    spared = sum(macs_of[target.name] // 2 for target in dense.targets)
    assert facts.sizes.before.operations - facts.sizes.after.nonzero_operations == spared


@pytest.mark.parametrize("kind", list(tiny.KINDS))
def test_plain_diffusers_loads_the_result_and_draws_with_it(kind, results):
    output = results(kind, "obs_diff", "unstructured")
    images = draw(output)
    assert torch.isfinite(images).all()
    assert not torch.equal(images, draw(tiny.folder(kind)))


@pytest.mark.parametrize("kind", list(tiny.KINDS))
def test_the_result_reloads_to_the_bit(kind, results):
    output = results(kind, "obs_diff", "unstructured")
    reloaded = checkpoint.load(output, "cpu")
    saved = weights(kind, output)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in reloaded.module.state_dict().items())
    plain = getattr(diffusers.DiffusionPipeline.from_pretrained(output, **missing(output)), tiny.NETWORK[kind]).eval()
    torch.manual_seed(0)
    inputs = reloaded.family.inputs(reloaded.module, batch=2, height=8, width=8, sequence=16)
    assert tiny.computes_alike(reloaded.module, plain, inputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_source_stays_half_precision_and_exactly_sparse(dtype, tmp_path):
    source = tiny.folder("sd3", dtype)
    output = run(recipe("sd3", tmp_path / "out", [{"obs_diff": {"sparsity": 0.5}}], dtype), tiny.quiet())
    before, after = weights("sd3", source), weights("sd3", output)
    layers = {f"{target.name}.weight" for target in tiny.load("sd3").targets}
    for name, tensor in after.items():
        assert tensor.dtype == before[name].dtype == dtype
        if name in layers:
            assert int((tensor == 0).sum()) == tensor.numel() // 2
        else:
            assert torch.equal(tensor, before[name])
    others = [f.relative_to(source) for f in source.rglob("*.safetensors") if f.parent.name != "transformer"]
    assert len(others) == 3
    assert all((source / file).read_bytes() == (output / file).read_bytes() for file in others)
    assert report.read(output / "report.json").model.dtype == "float32"  # what a CPU computes in


@pytest.mark.parametrize(("kind", "dtype"), [("sd2", "float16"), ("flux", "bfloat16")])
def test_computing_in_half_precision_stores_it_and_is_exactly_sparse(kind, dtype, tmp_path):
    model = {"source": str(tiny.folder(kind)), "dtype": dtype}
    output = run(recipe(kind, tmp_path / "out", [{"obs_diff": {"sparsity": 0.5}}], model=model), tiny.quiet())
    after = weights(kind, output)
    assert {tensor.dtype for tensor in after.values()} == {getattr(torch, dtype)}
    for target in tiny.load(kind).targets:
        weight = after[f"{target.name}.weight"]
        assert int((weight == 0).sum()) == weight.numel() // 2
    errors = [row.error for row in report.read(output / "report.json").layers]
    assert all(error is not None and 0 < error < 0.5 for error in errors)


@pytest.mark.parametrize("kind", ["sd3", "sd2"])
def test_the_same_recipe_and_seed_give_the_same_bytes(kind, tmp_path):
    prune = [{"obs_diff": {"sparsity": 0.5}}]
    outputs = [
        run(recipe(kind, tmp_path / name, prune, seed=seed), tiny.quiet())
        for name, seed in (("first", 0), ("second", 0), ("other", 1))
    ]
    files = [
        {
            str(f.relative_to(output)): f.read_bytes()
            for f in output.rglob("*")
            if f.is_file() and "report" not in f.name
        }
        for output in outputs
    ]
    assert files[0] == files[1]
    network = f"{tiny.NETWORK[kind]}/diffusion_pytorch_model.safetensors"
    assert files[0][network] != files[2][network]


def test_obs_diff_loses_less_than_the_others_measured_on_the_same_moments(tmp_path):
    """On the inputs of the dense network, summed over all layers, at a block that is small against their width."""
    pipeline = tiny.load("sd3")
    calibration = tiny.calibrate(pipeline, tiny.PROMPTS, packages=1)
    (package,) = calibration.packages(pipeline.targets, "second", tiny.no_workspace)
    moments = calibration.collect(package, "second", Uniform())
    dense = weights("sd3", tiny.folder("sd3"))
    for granularity, options in GRANULARITIES.items():
        errors = {}
        for pruner, more in (("obs_diff", {"block": 8, "weighting": "uniform"}), ("wanda", {}), ("magnitude", {})):
            asked = recipe("sd3", tmp_path / f"{granularity}-{pruner}", [{pruner: options | more}])
            saved = weights("sd3", run(asked, tiny.quiet()))
            total = 0.0
            for group in package.groups:
                second_II = moments[group.name].second_II
                assert second_II is not None
                for target in group.targets:
                    name = f"{target.name}.weight"
                    total += relative_error(dense[name], saved[name], second_II)
            errors[pruner] = total
        assert errors["obs_diff"] < min(errors["wanda"], errors["magnitude"])


def test_the_error_reported_is_that_of_the_dense_layer_on_what_it_was_fed(tmp_path):
    """With one package everything is calibrated on the dense network, so its moments can be had again."""
    options = {"sparsity": 0.5, "weighting": {"log_decrease": {"low": 0.5, "high": 2}}}
    asked = recipe("sd3", tmp_path / "out", [{"obs_diff": options}])
    assert asked.calibration is not None
    asked = asked.model_copy(update={"calibration": asked.calibration.model_copy(update={"packages": 1})})
    output = run(asked, tiny.quiet())
    pipeline = tiny.load("sd3")
    # the run draws its prompts in an order of its own, and sampled them at guidance 7
    calibration = tiny.calibrate(pipeline, drawn(asked), packages=1, guidance=7.0)
    (package,) = calibration.packages(pipeline.targets, "second", tiny.no_workspace)
    moments = calibration.collect(package, "second", LogDecrease(low=0.5, high=2))
    rows = {row.name: row for row in report.read(output / "report.json").layers}
    saved = weights("sd3", output)
    for group in package.groups:
        second_II = moments[group.name].second_II
        assert second_II is not None
        for target in group.targets:
            old, new = target.module.weight.double(), saved[f"{target.name}.weight"].double()
            lost = ((new - old) @ second_II.double() * (new - old)).sum()
            expected = lost / (old @ second_II.double() * old).sum()
            assert rows[target.name].error == pytest.approx(expected.item(), rel=1e-3)
            assert rows[target.name].damping == 0.01


def drawn(asked: Recipe) -> tuple[str, ...]:
    from compressor import prompts

    assert asked.calibration is not None
    return prompts.draw(prompts.read(asked.calibration.prompts, "calibration"), asked.calibration.samples, asked.seed)


def test_two_entries_prune_their_own_layers(tmp_path):
    prune = [
        {"magnitude": {"sparsity": 0.25}, "targets": {"include": ["feed_forward"]}},
        {"obs_diff": GRANULARITIES["n_m"], "targets": {"include": ["attention"], "exclude": ["text"]}},
    ]
    output = run(recipe("sd3", tmp_path / "out", prune), tiny.quiet())
    after, before = weights("sd3", output), weights("sd3", tiny.folder("sd3"))
    record = json.loads((output / "compression.json").read_text())
    for target in tiny.load("sd3").targets:
        weight = after[f"{target.name}.weight"]
        share = float((weight == 0).float().mean())
        if target.layer.part == "feed_forward":
            assert share == 0.25
            assert record["layers"][target.name]["pruner"] == "magnitude"
        elif target.layer.stream == "text":
            assert torch.equal(weight, before[f"{target.name}.weight"])
            assert target.name not in record["layers"]
        else:
            assert share == 0.5
            assert record["layers"][target.name]["pruner"] == "obs_diff"


def test_images_are_drawn_dense_and_pruned_from_equal_noise(tmp_path):
    prompts = {"texts": list(tiny.PROMPTS[:3])}
    asked = recipe(
        "sd3",
        tmp_path / "out",
        [{"obs_diff": {"sparsity": 0.5}}],
        report={"prompts": prompts, "images": 3, "steps": 2, "batch": 2},
    )
    output = run(asked, tiny.quiet())
    facts = report.read(output / "report.json")
    assert facts.metrics["pairs"]["images"] == 3
    assert 0 < facts.metrics["pairs"]["psnr"] < 100
    assert (output / "report.html").read_text().count("a red dog") >= 1


prune_by_magnitude = Magnitude.prune


def lazy(self: Magnitude, component: Component, _: Any) -> Iterator[LayerResult]:
    """Promises and does nothing."""
    return (LayerResult(target.name) for target in component.targets)


def forgetful(self: Magnitude, component: Component, _: Any) -> Iterator[LayerResult]:
    """Leaves out the last layer."""
    yield from list(prune_by_magnitude(self, component, None))[:-1]


def wild(self: Magnitude, component: Component, _: Any) -> Iterator[LayerResult]:
    """Makes a weight that is not finite."""
    yield from prune_by_magnitude(self, component, None)
    component.targets[3].module.weight.data[0, 0] = float("inf")


def test_a_run_whose_zeros_are_enough_but_in_the_wrong_places_fails(tmp_path, monkeypatch):
    def misplaced(self: Magnitude, component: Component, _: Any) -> Iterator[LayerResult]:
        """The first half of every row, where 2 of every 4 were promised."""
        for target in component.targets:
            target.module.weight.data[:, : target.inputs // 2] = 0
            yield LayerResult(target.name)

    monkeypatch.setattr(Magnitude, "prune", misplaced)
    pattern = {"n_m": {"keep": 2, "of": 4}}
    with pytest.raises(CompressorError) as caught:
        run(recipe("sd3", tmp_path / "out", [{"magnitude": {"granularity": pattern}}]), tiny.quiet())
    assert str(caught.value) == (
        "prune[0]: pruner 'magnitude' left transformer_blocks.0.attn.to_q without the pattern that it promised; "
        "nothing was kept"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("pruner", "words"),
    [
        (
            lazy,
            "prune[0]: pruner 'magnitude' should have made 128 weights of transformer_blocks.0.attn.to_q zero, found "
            "0; nothing was kept",
        ),
        (
            forgetful,
            "prune[0]: pruner 'magnitude' left out transformer_blocks.1.ff.net.2; nothing was kept",
        ),
        (
            wild,
            "prune[0]: pruner 'magnitude' left values in transformer_blocks.0.attn.add_q_proj that are not finite; "
            "nothing was kept",
        ),
    ],
)
def test_a_pruner_that_breaks_its_promise_fails_the_run(pruner, words, tmp_path, monkeypatch):
    monkeypatch.setattr(Magnitude, "prune", pruner)
    asked = recipe("sd3", tmp_path / "out", [{"magnitude": {"sparsity": 0.5}}])
    with pytest.raises(CompressorError) as caught:
        run(asked, tiny.quiet())
    assert str(caught.value) == words
    assert list(tmp_path.iterdir()) == []
