"""Whole runs that remove heads and neurons from tiny pipelines: what is smaller, and what it computes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from compressor_l1_norm import L1Norm
from compressor_obs_diff import OBSDiff, groups
from compressor_obs_diff.budget import curves
from compressor_obs_diff.weightings import Uniform
from safetensors.torch import load_file

from compressor import checkpoint, plan_table, prompts, report
from compressor.calibration import Calibration, Package
from compressor.compare import compare
from compressor.errors import CompressorError
from compressor.plan import plan
from compressor.plugin import LayerResult, Removed
from compressor.recipe import Recipe
from compressor.run import run
from compressor.structure import Component, consumers, find_groups, proof
from tests import tiny

pytestmark = pytest.mark.usefixtures("looked_at_once")

HALF = {"heads": 0.5, "neurons": 0.5, "multiple": 8, "keep_first": 0, "keep_last": 0}


def entry(pruner: str, **options: Any) -> dict[str, Any]:
    return {pruner: {"granularity": {"structured": HALF}, **options}}


def recipe(
    kind: str, output: Path, *prune: dict[str, Any], dtype: torch.dtype = torch.float32, **changes: Any
) -> Recipe:
    data = {
        "model": str(tiny.folder(kind, dtype)),
        "device": "cpu",
        "calibration": {
            "prompts": list(tiny.PROMPTS[:3]),
            "steps": 2,
            "batch": 3,
            "packages": 2,
            "height": tiny.SIDE,
            "width": tiny.SIDE,
        },
        "prune": list(prune),
        "report": {"images": 0},
        "output": str(output),
    }
    return Recipe.model_validate(data | changes)


def network_file(kind: str, folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / tiny.NETWORK[kind] / "diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Callable[[str, str], Path]:
    """Results by kind and pruner, each made once."""
    made: dict[tuple[str, str], Path] = {}

    def result(kind: str, pruner: str) -> Path:
        if (kind, pruner) not in made:
            output = tmp_path_factory.mktemp(f"{kind}-{pruner}") / "out"
            made[kind, pruner] = run(recipe(kind, output, entry(pruner)), tiny.quiet())
        return made[kind, pruner]

    return result


@pytest.mark.parametrize("pruner", ["obs_diff", "l1_norm"])
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_run_removes_what_the_plan_says(kind, pruner, results):
    folder = results(kind, pruner)
    found, planned = report.read(folder / "report.json"), plan(recipe(kind, folder / "x", entry(pruner)))
    stored = network_file(kind, folder)
    assert found.structure is not None
    assert [(g.name, g.before, g.after) for g in found.structure.groups] == [
        (g.name, g.before, g.after) for g in planned.entries[0].groups
    ]
    assert all(len(g.removed) == g.before - g.after for g in found.structure.groups)
    assert {g.asked for g in found.structure.groups} == {0.5}
    for row in found.layers:
        weight = stored[f"{row.name}.weight"]
        assert weight.shape == (row.outputs, row.inputs)
        assert weight.numel() == row.parameters - row.removed
        assert row.asked == row.removed + row.zeros
    removed = {layer.name: layer.removed for layer in planned.entries[0].layers}
    assert removed == {row.name: row.removed for row in found.layers}
    stored.pop("pos_embed.pos_embed", None)  # a buffer
    assert found.sizes.after.parameters == sum(tensor.numel() for tensor in stored.values()) == planned.parameters_after
    assert (found.sizes.before.operations, found.sizes.after.operations) == (planned.macs, planned.macs_after)
    assert found.sizes.after.operations < found.sizes.before.operations
    assert found.sizes.after.bytes < found.sizes.before.bytes
    (proved,) = found.structure.proofs
    assert proved.layer_error <= proved.layer_tolerance == 1e-4
    assert proved.network_error <= proved.network_tolerance == 1e-4
    assert bool(found.structure.overrides) == (kind == "flux")


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_the_result_reloads_to_the_bit_and_draws(kind, results):
    folder = results(kind, "obs_diff")
    once, twice = (checkpoint.load(folder, "cpu") for _ in range(2))
    inputs = once.example_inputs()
    assert tiny.computes_alike(once.module, twice.module, inputs)
    widths = {group.name: group.count for group in find_groups(once.module, once.family)}
    found = report.read(folder / "report.json").structure
    assert found is not None
    assert widths == {group.name: group.after for group in found.groups}
    image = once.pipe("a cat", num_inference_steps=2, height=tiny.SIDE, width=tiny.SIDE, output_type="pt").images
    assert torch.isfinite(torch.as_tensor(image)).all()


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_the_layers_that_lose_rows_are_otherwise_as_they_were(kind, results):
    dense, pruned = network_file(kind, tiny.folder(kind)), network_file(kind, results(kind, "obs_diff"))
    structure = report.read(results(kind, "obs_diff") / "report.json").structure
    assert structure is not None
    removed = {group.name: group.removed for group in structure.groups}
    for group in find_groups(tiny.load(kind).module, tiny.load(kind).family):
        kept = [unit for unit in range(group.count) if unit not in removed[group.name]]
        for producer in group.producers:
            rows = group.rows(producer, kept)
            assert torch.equal(pruned[f"{producer.name}.weight"], dense[f"{producer.name}.weight"][rows])


def error_by_hand(kind: str, folder: Path, texts: tuple[str, ...]) -> dict[str, float]:
    """Of every consumer, on the dense network's own inputs: squared norm of the difference over that of W X."""
    dense = tiny.load(kind)
    saved = network_file(kind, folder)
    structure = report.read(folder / "report.json").structure
    assert structure is not None
    removed = {group.name: group.removed for group in structure.groups}
    groups = find_groups(dense.module, dense.family)
    store: dict[str, list[torch.Tensor]] = {}
    handles = []
    for group in groups:
        for consumer in group.consumers:
            if consumer.name not in store:
                handles.append(tiny.record_inputs(consumer.module, store.setdefault(consumer.name, [])))
    calibration = tiny.calibrate(dense, texts, packages=1)
    for package in calibration.packages([next(iter(dense.targets))], "second", tiny.no_workspace):
        calibration.collect(package, "second", Uniform())
    for handle in handles:
        handle.remove()
    errors = {}
    linears = {consumer.name: consumer.module for group in groups for consumer in group.consumers}
    for name, linear in linears.items():
        x_TI = torch.cat([x.reshape(-1, x.shape[-1]) for x in store[name]]).double()
        gone = torch.zeros(linear.in_features, dtype=torch.bool)
        for group in groups:
            for consumer in group.consumers:
                if consumer.name == name:
                    gone[group.columns(consumer, removed[group.name])] = True
        before = x_TI @ linear.weight.double().T
        after = x_TI[:, ~gone] @ saved[f"{name}.weight"].double().T
        shift = saved[f"{name}.bias"].double() - linear.bias.double() if linear.bias is not None else 0
        errors[name] = ((after + shift - before).square().sum() / before.square().sum()).item()
    return errors


@pytest.mark.parametrize("kind", ["sd3", "sd2", "flux"])
def test_obs_diff_loses_less_than_l1_norm_and_reports_what_it_loses(kind, tmp_path):
    folders = {}
    for pruner in ("obs_diff", "l1_norm"):
        options = {"weighting": "uniform"} if pruner == "obs_diff" else {}
        calibration = {
            "prompts": list(tiny.PROMPTS[:3]),
            "steps": 2,
            "batch": 2,
            "guidance": 3.0,
            "height": tiny.SIDE,
            "width": tiny.SIDE,
            "packages": 1,
        }
        asked = recipe(kind, tmp_path / pruner, entry(pruner, **options), calibration=calibration)
        folders[pruner] = run(asked, tiny.quiet())
    texts = prompts.draw(tiny.PROMPTS[:3], 3, 0)
    ours, theirs = (error_by_hand(kind, folders[pruner], texts) for pruner in ("obs_diff", "l1_norm"))
    assert all(ours[name] < theirs[name] for name in ours)
    for row in report.read(folders["obs_diff"] / "report.json").layers:
        if row.name in ours:
            assert row.error == pytest.approx(ours[row.name], rel=1e-2)
        else:
            assert row.error is None


def solved(
    kind: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[Any], list[Any], dict[str, torch.Tensor]]:
    """What the pruner yields, and what it weighs beforehand, if so many problems may be solved together."""
    together: list[int] = []
    remove_together = groups.remove_together
    monkeypatch.setattr(groups, "fitting_together", lambda needs, device, room: most)
    monkeypatch.setattr(
        groups,
        "remove_together",
        lambda problems, *rest: together.append(len(problems)) or remove_together(problems, *rest),
    )
    loaded = tiny.load(kind)
    pruner = OBSDiff.model_validate({"granularity": {"structured": HALF}, "objective": "network", "spread": 0.25})
    component = tiny.component(loaded)
    planned = pruner.removals(component)
    # so that not all lose as many
    counts = {
        group: count + i % 2 if group.kind == "neurons" else count for i, (group, count) in enumerate(planned.items())
    }
    choices = {group: (0, count) for group, count in counts.items()}
    calibration = tiny.calibrate(loaded, packages=1)
    (package,) = calibration.packages(consumers(counts), pruner.moments, pruner.workspace)
    moments = calibration.collect(package, pruner.moments, pruner.weighting)
    found = curves(pruner, planned, choices, package, moments)
    results = list(groups.prune_groups(pruner, counts, package, moments))
    assert not moments
    assert max(together) == (1 if most == 1 else 2)
    return found, results, {name: tensor.clone() for name, tensor in loaded.module.state_dict().items()}


@pytest.mark.parametrize("kind", ["sd3", "sd2", "flux"])
def test_solved_together_layers_are_as_solved_alone(kind, monkeypatch):
    with monkeypatch.context() as patch:
        curves_alone, results_alone, network_alone = solved(kind, 1, patch)
    with monkeypatch.context() as patch:
        curves_found, results, network = solved(kind, 2, patch)
    for one, other in zip(curves_found, curves_alone, strict=True):
        assert (one.name, one.choices) == (other.name, other.choices)
        assert one.harms == pytest.approx(other.harms, rel=1e-9)
    units = {each.group.name: each.units for each in results if isinstance(each, Removed)}
    assert units == {each.group.name: each.units for each in results_alone if isinstance(each, Removed)}
    errors = {each.name: each.error for each in results if isinstance(each, LayerResult)}
    assert errors == pytest.approx({each.name: each.error for each in results_alone if isinstance(each, LayerResult)})
    for name, tensor in network_alone.items():
        torch.testing.assert_close(network[name], tensor, rtol=1e-6, atol=1e-7)


def test_what_is_solved_together_has_one_shape_and_loses_similar_numbers(monkeypatch):
    monkeypatch.setattr(groups, "fitting_together", lambda needs, device, room: 3)
    loaded = tiny.load("sd3")
    neurons = [group for group in find_groups(loaded.module, loaded.family) if group.kind == "neurons"]
    heads = [group for group in find_groups(loaded.module, loaded.family) if group.kind == "heads"]
    found = [[group] for group in (*neurons * 2, *heads)]
    counts = dict(zip((*neurons, *heads), (9, 3, 5, 1, 1), strict=True))
    batches = list(groups.batches(found, counts, Package(1, 1, (), 0), {}))
    of_neurons = [[counts[group] for (group,) in batch] for batch in batches if batch[0][0].kind == "neurons"]
    assert of_neurons == [[3, 3, 5], [5, 9, 9]]
    assert all(len({(group.kind, len(group.consumers)) for (group,) in batch}) == 1 for batch in batches)
    assert sum(len(batch) for batch in batches) == len(found)


def test_a_half_precision_source_stays_so(tmp_path):
    output = run(recipe("sd3", tmp_path / "out", entry("obs_diff"), dtype=torch.float16), tiny.quiet())
    assert {tensor.dtype for tensor in network_file("sd3", output).values()} == {torch.float16}


def test_the_same_recipe_gives_the_same_bytes(tmp_path, results):
    again = run(recipe("sd3", tmp_path / "out", entry("obs_diff")), tiny.quiet())
    first, second = ((f / "compression.json").read_text() for f in (results("sd3", "obs_diff"), again))
    assert first == second


def test_both_ways_to_agree_on_heads_run(tmp_path):
    output = run(recipe("sd3", tmp_path / "out", entry("obs_diff", fusion="rank_fusion")), tiny.quiet())
    found = report.read(output / "report.json")
    assert found.structure is not None
    assert json.loads((output / "compression.json").read_text())["recipe"]["prune"][0]["obs_diff"]["fusion"] == (
        "rank_fusion"
    )


def test_structure_and_zeros_each_have_their_own_layers(tmp_path):
    heads = {"granularity": {"structured": {"heads": 0.5, "keep_first": 0, "keep_last": 0}}}
    prune = (
        {"obs_diff": heads, "targets": {"include": ["attention"]}},
        {"magnitude": {"sparsity": 0.5}, "targets": {"include": ["feed_forward"]}},
    )
    asked = recipe("sd3", tmp_path / "out", *prune)
    found = report.read(run(asked, tiny.quiet()) / "report.json")
    planned = plan(asked)
    assert found.sizes.after.parameters == planned.parameters_after
    assert sum(row.zeros for row in found.layers) == planned.zeros > 0
    with pytest.raises(CompressorError) as caught:
        plan(recipe("sd3", tmp_path / "out", entry("l1_norm"), {"magnitude": {"sparsity": 0.5}}))
    assert str(caught.value) == (
        "prune[1]: transformer_blocks.0.attn.to_q is pruned by prune[0] already; give each its own layers by targets"
    )


def test_a_shrunk_result_can_be_shrunk_again(tmp_path, results):
    first = results("sd3", "l1_norm")
    smaller = {"granularity": {"structured": HALF | {"heads": None}}}
    second = run(recipe("sd3", tmp_path / "out", {"l1_norm": smaller}, model=str(first)), tiny.quiet())
    after = [report.read(folder / "report.json").sizes.after.parameters for folder in (first, second)]
    assert after[1] < after[0]
    assert {g.after for g in find_groups_of(second) if g.kind == "neurons"} == {16}


def find_groups_of(folder: Path) -> list[report.GroupRow]:
    structure = report.read(folder / "report.json").structure
    assert structure is not None
    return list(structure.groups)


def test_the_plan_says_what_was_asked_what_is_reached_and_what_stays(tmp_path):
    text = plan_table.as_text(plan(recipe("sd3", tmp_path / "out", entry("obs_diff"))), layers=False)
    assert "  heads: asked 50.0 %, reached 50.0 %; stay 1 of 2 (2 times); widths are multiples of 8\n" in text
    assert "  neurons: asked 50.0 %, reached 50.0 %; stay 32 of 64 (3 times); widths are multiples of 32\n" in text
    assert "to leave (50.0 %)" in text
    partly = {"l1_norm": {"granularity": {"structured": HALF | {"keep_last": 1}}}}
    text = plan_table.as_text(plan(recipe("sd3", tmp_path / "out", partly)), layers=True)
    assert "  kept whole: transformer_blocks.1\n" in text
    flux = plan_table.as_text(plan(recipe("flux", tmp_path / "out", entry("l1_norm"))), layers=False)
    assert "dependency graph: transformer_blocks.0.attn.heads: with head 1 the table takes " in flux
    data = json.loads(plan_table.as_json(plan(recipe("sd3", tmp_path / "out", partly))))
    assert data["entries"][0]["shares"] == {"heads": 0.5, "neurons": 0.5}
    assert data["entries"][0]["whole"] == ["transformer_blocks.1"]
    assert data["parameters_after"] < data["parameters"]


def test_two_blocks_are_too_few_for_the_default_of_whole_ends(tmp_path):
    asked = recipe("sd3", tmp_path / "out", {"obs_diff": {"granularity": {"structured": {"heads": 0.5}}}})
    for job in (plan, lambda asked: run(asked, tiny.quiet())):
        with pytest.raises(CompressorError) as caught:
            job(asked)
        assert str(caught.value) == (
            "prune[0]: structured: should leave a block to remove from, found keep_first 1 and keep_last 1 of 2 blocks"
        )
    assert not (tmp_path / "out").exists()


def test_alternatives_are_each_tried_on_the_dense_network(tmp_path):
    prune = (entry("l1_norm"), {"magnitude": {"sparsity": 0.5}}, entry("obs_diff"), entry("l1_norm"))
    picture = {"images": 2, "steps": 2, "prompts": ["a", "b"], "metrics": ["pairs"]}
    rows = compare(recipe("sd3", tmp_path / "out", *prune, report=picture), tiny.quiet(), tmp_path / "compared")
    assert rows[0].figures == rows[3].figures
    alone = compare(
        recipe("sd3", tmp_path / "out", prune[1], report=picture), tiny.quiet(), tmp_path / "compared-alone"
    )
    assert rows[1].figures == alone[0].figures
    planned = plan(recipe("sd3", tmp_path / "out", prune[0]))
    assert (rows[0].parameters, rows[0].operations) == (planned.parameters_after, planned.macs_after)
    assert (rows[1].parameters, rows[1].operations) == (planned.parameters, planned.macs)
    zero_before = sum(int((p == 0).sum()) for p in tiny.load("sd3").module.parameters())
    zeros = plan(recipe("sd3", tmp_path / "out", prune[1])).zeros + zero_before
    assert rows[1].network == pytest.approx(zeros / planned.parameters)
    text = (tmp_path / "compared" / "compare.md").read_text()
    assert text.startswith("| row | pruner | gone | of the network | parameters | operations | ")


prune_by_l1 = L1Norm.prune


def stingy(self: L1Norm, component: Component, _: Calibration | None) -> Iterator[LayerResult | Removed]:
    """Gives up one head less than promised."""
    for result in prune_by_l1(self, component, None):
        yield Removed(result.group, result.units[1:]) if isinstance(result, Removed) else result


def silent(self: L1Norm, component: Component, _: Calibration | None) -> Iterator[LayerResult | Removed]:
    """Gives no result of the last layer that reads what left."""
    yield from list(prune_by_l1(self, component, None))[:-1]


def twice(self: L1Norm, component: Component, _: Calibration | None) -> Iterator[LayerResult | Removed]:
    """Names everything two times."""
    for result in prune_by_l1(self, component, None):
        yield Removed(result.group, result.units * 2) if isinstance(result, Removed) else result


def sparing(self: L1Norm, component: Component, _: Calibration | None) -> Iterator[LayerResult | Removed]:
    """Gives heads up but leaves what reads them."""
    for result in prune_by_l1(self, component, None):
        if isinstance(result, Removed):
            for consumer in result.group.consumers:
                consumer.module.weight.data += 1
        yield result


@pytest.mark.parametrize(
    ("pruner", "words"),
    [
        (
            stingy,
            "prune[0]: pruner 'l1_norm' should have given up 1 of transformer_blocks.0.attn.heads, found 0 in 0 "
            "indices; nothing was kept",
        ),
        (
            twice,
            "prune[0]: pruner 'l1_norm' should have given up 1 of transformer_blocks.0.attn.heads, found 1 in 2 "
            "indices; nothing was kept",
        ),
        (
            sparing,
            "prune[0]: pruner 'l1_norm' should have zeroed the columns of transformer_blocks.0.attn.to_out.0 that "
            "belong to what it gave up of transformer_blocks.0.attn.heads; nothing was kept",
        ),
        (silent, "prune[0]: pruner 'l1_norm' left out transformer_blocks.1.ff.net.2; nothing was kept"),
    ],
)
def test_a_pruner_that_breaks_its_promise_fails_the_run(pruner, words, tmp_path, monkeypatch):
    monkeypatch.setattr(L1Norm, "prune", pruner)
    with pytest.raises(CompressorError) as caught:
        run(recipe("sd3", tmp_path / "out", entry("l1_norm")), tiny.quiet())
    assert str(caught.value) == words
    assert list(tmp_path.iterdir()) == []


def test_a_failed_proof_stops_the_run_and_names_the_layer(tmp_path, monkeypatch):
    right = proof.remove

    def wrong(group: Any, units: Any) -> None:
        """Removes other neurons than were given up."""
        if group.name == "transformer_blocks.1.ff.neurons":
            units = [unit for unit in range(group.count) if unit not in set(torch.as_tensor(units).tolist())]
        right(group, units)

    monkeypatch.setattr(proof, "remove", wrong)
    with pytest.raises(CompressorError) as caught:
        run(recipe("sd3", tmp_path / "out", entry("l1_norm")), tiny.quiet())
    assert str(caught.value).startswith(
        "prune[0]: transformer_blocks.1.ff.net.2: after removing, the output should be as with the columns zeroed, to "
        "1e-04 of its norm, found it "
    )
    assert str(caught.value).endswith(" off; nothing was kept")
    assert list(tmp_path.iterdir()) == []


def test_the_outputs_of_a_discovered_joint_attention_are_calibrated_together(tmp_path):
    heads = {"obs_diff": {"granularity": {"structured": {"heads": 0.5, "keep_first": 0, "keep_last": 0}}}}
    asked = recipe("auraflow", tmp_path / "out", heads)
    assert asked.calibration is not None
    (entry_of_plan,) = plan(asked).entries
    most = len({layer.name.rpartition(".attn.")[0] for layer in entry_of_plan.layers})
    asked = asked.model_copy(update={"calibration": asked.calibration.model_copy(update={"packages": most})})
    run(asked, tiny.quiet())


@pytest.mark.parametrize(("kind", "leaving"), [("pixart", {"heads", "neurons"}), ("auraflow", {"heads"})])
def test_a_network_that_no_family_knows_is_shrunk_saved_and_reloaded(kind, leaving, tmp_path):
    shares = HALF if "neurons" in leaving else {"heads": 0.5, "keep_first": 0, "keep_last": 0}
    asked = recipe(kind, tmp_path / "out", {"obs_diff": {"granularity": {"structured": shares}}})
    folder = run(asked, tiny.quiet())
    found = report.read(folder / "report.json")
    assert found.structure is not None
    assert {group.kind for group in found.structure.groups} == leaving
    assert found.sizes.after.parameters == plan(asked).parameters_after < found.sizes.before.parameters
    assert any("discovered" in warning or "no family" in warning for warning in found.warnings), found.warnings
    once, twice = (checkpoint.load(folder, "cpu") for _ in range(2))
    inputs = once.example_inputs()
    assert tiny.computes_alike(once.module, twice.module, inputs)
