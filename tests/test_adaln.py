"""The linears of adaLN as targets: whole runs, few samples, what leaves them alone, and every message."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from compressor_magnitude import Magnitude
from compressor_obs_diff import OBSDiff
from torch import Tensor, nn

from compressor import plan_table, report
from compressor import recipe as recipes
from compressor.calibration.foretold import explain_rank
from compressor.compare import compare
from compressor.errors import CompressorError
from compressor.pipeline import Pipeline
from compressor.plan import plan
from compressor.recipe import Recipe
from compressor.run import run
from compressor.structure import Component, Target, find_targets
from compressor.two_four import layers, table
from tests import tiny
from tests.test_run import recipe, weights
from tests.two_four.test_table import made, row

pytestmark = pytest.mark.usefixtures("looked_at_once")

ALL = {"include": ["attention", "feed_forward", "adaln"]}
NETWORK = {"solver": "admm", "refit": True, "objective": "network"}
KINDS = ("sd3", "sd35", "flux")
N_M = {"granularity": {"n_m": {"keep": 2, "of": 4}}}


def adaln_of(loaded: Pipeline) -> tuple[Target, ...]:
    found = find_targets(loaded.module, loaded.family, adaln=True)
    return tuple(target for target in found if target.layer.part == "adaln")


def asked(kind: str, output: Path, pruner: dict[str, Any], targets: dict[str, Any] | None = None) -> Recipe:
    return recipe(kind, output, [pruner | {"targets": targets or ALL}])


@pytest.mark.parametrize(
    ("kind", "pruner"),
    [
        *((kind, {"obs_diff": {"sparsity": 0.5}}) for kind in KINDS),
        *((kind, {"obs_diff": {"sparsity": 0.5, **NETWORK}}) for kind in ("sd3", "flux")),
        ("sd35", {"obs_diff": {"sparsity": 0.5, "solver": "admm", "refit": True}}),
        ("flux", {"obs_diff": N_M}),
        ("sd3", {"obs_diff": N_M | NETWORK}),
        ("sd3", {"wanda": {"sparsity": 0.5}}),
        ("flux", {"magnitude": {"sparsity": 0.5}}),
    ],
    ids=str,
)
def test_half_of_everything_is_half_of_every_linear(kind, pruner, tmp_path):
    loaded = tiny.load(kind)
    found = find_targets(loaded.module, loaded.family, adaln=True)
    output = run(asked(kind, tmp_path / "out", pruner), tiny.quiet())
    before, after = weights(kind, tiny.folder(kind)), weights(kind, output)
    halved = {f"{target.name}.weight" for target in found}
    for name, tensor in after.items():
        zeros = int((before[name] == 0).sum())
        assert int((tensor == 0).sum()) == (tensor.numel() // 2 if name in halved else zeros), name
    facts = report.read(output / "report.json")
    assert {row.name for row in facts.layers} == {target.name for target in found}
    rows = {row.part: row for row in facts.parts}
    assert set(rows) == {"adaln", "attention", "feed_forward", "other"}
    for part in ("adaln", "attention", "feed_forward"):
        assert rows[part].sparsity == 0.5
        assert rows[part].layers == sum(target.layer.part == part for target in found)
    assert sum(row.parameters for row in facts.parts) == facts.sizes.before.parameters
    assert sum(row.left for row in facts.parts) == facts.sizes.after.nonzero
    assert sum(row.nonzero for row in facts.parts) == facts.sizes.before.nonzero
    page = (output / "report.html").read_text()
    assert '<th scope="row">adaLN</th>' in page
    assert '<th scope="row">the whole transformer</th>' in page


def test_without_adaln_its_part_is_told_to_be_whole(tmp_path):
    output = run(recipe("sd3", tmp_path / "out", [{"magnitude": {"sparsity": 0.5}}]), tiny.quiet())
    rows = {row.part: row for row in report.read(output / "report.json").parts}
    assert (rows["adaln"].sparsity, rows["attention"].sparsity) == (0.0, 0.5)


def outputs_of(module: nn.Linear, x_TI: Tensor) -> Tensor:
    with torch.no_grad():
        return module(x_TI)


def fed(loaded: Pipeline, texts: tuple[str, ...], steps: int) -> Tensor:
    """What all adaLN linears are given in a sampling."""
    (first, *_) = adaln_of(loaded)
    store: list[Tensor] = []
    handle = tiny.record_inputs(first.module, store)
    calibration = tiny.calibrate(loaded, texts, steps=steps, packages=1)
    (package,) = calibration.packages(loaded.targets[:1], "norms", tiny.no_workspace)
    calibration.collect(package, "norms", OBSDiff(sparsity=0.5).weighting)
    handle.remove()
    return torch.cat(store)


def errors_on(loaded: Pipeline, dense: dict[str, nn.Linear], x_TI: Tensor) -> float:
    """The squared error of all adaLN linears' outputs, relative to the outputs about their bias."""
    wrong = right = 0.0
    for target in adaln_of(loaded):
        before = outputs_of(dense[target.name], x_TI)
        wrong += (outputs_of(target.module, x_TI) - before).square().sum().item()
        right += (before - dense[target.name].bias).square().sum().item()
    return wrong / right


@pytest.mark.parametrize("options", [{}, {"solver": "admm", "refit": True}, NETWORK], ids=str)
def test_fewer_samples_than_inputs_do_not_spoil_what_was_not_sampled(options):
    """Three vectors for sixteen inputs: damping holds the rest, so that fresh prompts lose less than by magnitude."""
    steps, fresh = 1, tiny.PROMPTS[2:]
    found = {}
    for name, pruner in (
        ("magnitude", Magnitude(sparsity=0.5)),
        ("obs_diff", OBSDiff.model_validate({"sparsity": 0.5, "weighting": "uniform", **options})),
    ):
        loaded = tiny.load("sd3")
        dense = {target.name: copy.deepcopy(target.module) for target in adaln_of(loaded)}
        unseen_TI = fed(loaded, fresh, steps)
        calibration = tiny.calibrate(loaded, tiny.PROMPTS[:2], steps=steps, packages=1)
        component = Component(loaded.component_name, loaded.module, loaded.family, adaln_of(loaded))
        list(pruner.prune(component, calibration))
        for target in component.targets:
            assert torch.isfinite(target.module.weight).all()
            assert int((target.module.weight == 0).sum()) == target.module.weight.numel() // 2
        found[name] = errors_on(loaded, dense, unseen_TI)
    assert found["obs_diff"] < found["magnitude"]


def test_the_rank_warning_counts_one_vector_a_prompt_and_step_and_the_empty_prompts_once():
    loaded = tiny.load("sd3")
    trace, targets = tiny.traced(loaded), adaln_of(loaded)
    assert {target.inputs for target in targets} == {16}
    assert explain_rank(targets, trace, "second", 3, 4, True) is None  # (3 + 1) x 4
    assert explain_rank(targets, trace, "second", 2, 4, True) == (
        "5 of 5 layers see fewer distinct tokens than they have inputs, so that damping decides: "
        "transformer_blocks.0.norm1.linear sees 12 for 16 inputs; about 3 prompts would do"
    )
    assert explain_rank(targets, trace, "second", 4, 4, False) is None
    assert " sees 4 for 16 inputs; about 16 prompts " in str(explain_rank(targets, trace, "second", 4, 4, False, 0.25))


def test_a_spread_gives_adaln_a_share_of_its_own_and_the_same_sum(tmp_path):
    options = {"sparsity": 0.5, "spread": 0.2, **NETWORK}
    output = run(asked("sd3", tmp_path / "out", {"obs_diff": options}), tiny.quiet())
    rows = report.read(output / "report.json").layers
    assert sum(row.zeros for row in rows) == sum(round(row.parameters / 2) for row in rows)
    shares = {row.zeros / row.parameters for row in rows if row.part == "adaln"}
    assert len(shares) > 1
    assert min(shares) >= 0.3 - 1e-9
    assert max(shares) <= 0.7 + 1e-9


STRUCTURED = {"granularity": {"structured": {"heads": 0.5, "keep_first": 0, "keep_last": 0}}}
WHOLE = "prune[0]: 5 layers of 26 stay as they are: 5 layers of adaLN, which has neither heads nor neurons"


@pytest.mark.parametrize("pruner", ["obs_diff", "l1_norm"])
def test_where_heads_leave_adaln_is_left_alone_and_that_is_told(pruner, tmp_path):
    given = asked("sd3", tmp_path / "out", {pruner: STRUCTURED})
    planned = plan(given)
    assert WHOLE in planned.warnings
    assert set(planned.entries[0].left_out) == {target.name for target in adaln_of(tiny.load("sd3"))}
    output = run(given, tiny.quiet())
    facts = report.read(output / "report.json")
    assert WHOLE in facts.warnings
    assert set(facts.left_out) == set(planned.entries[0].left_out)
    rows = {row.part: row for row in facts.parts}
    assert rows["adaln"].sparsity == 0
    assert rows["attention"].sparsity > 0.2
    before, after = weights("sd3", tiny.folder("sd3")), weights("sd3", output)
    for name in facts.left_out:
        assert torch.equal(before[f"{name}.weight"], after[f"{name}.weight"])


def test_where_heads_leave_adaln_alone_is_refused(tmp_path):
    with pytest.raises(CompressorError) as caught:
        plan(asked("sd3", tmp_path / "out", {"l1_norm": STRUCTURED}, {"include": ["adaln"]}))
    assert str(caught.value) == (
        "prune[0]: structured: heads 0.5 finds no heads that may leave: should be given all the layers of an attention "
        "or feed-forward, in a block that is not kept whole; widen targets, or leave heads out"
    )


def test_heads_may_leave_and_adaln_be_pruned_by_an_entry_of_its_own(tmp_path):
    prune = [{"l1_norm": STRUCTURED}, {"obs_diff": {"sparsity": 0.5}, "targets": {"include": ["adaln"]}}]
    rows = report.read(run(recipe("sd3", tmp_path / "out", prune), tiny.quiet()) / "report.json").parts
    shares = {row.part: row.sparsity for row in rows}
    assert shares["adaln"] == 0.5
    assert 0 < shares["attention"] < 1


@pytest.mark.parametrize("kind", ["sd2", "sdxl"])
def test_a_recipe_that_wants_adaln_of_a_unet_is_refused(kind, tmp_path):
    with pytest.raises(CompressorError) as caught:
        plan(asked(kind, tmp_path / "out", {"magnitude": {"sparsity": 0.5}}))
    assert str(caught.value) == (
        f"prune[0].targets: 'adaln' matches none of the {len(tiny.load(kind).targets)} layers: no adaLN linears of "
        "this network are known; leave it out"
    )


def test_a_2_4_product_is_never_looked_up_for_adaln_nor_run(tmp_path):
    loaded = tiny.load("sd3")
    seen = tiny.traced(loaded)
    shapes = {(2 * seen.tokens[t.name], t.inputs, t.outputs) for t in loaded.targets}
    table.write(made([row(*shape, 1.5, batch=2) for shape in shapes]), tmp_path / "probe.json")
    data = asked("sd3", tmp_path / "out", {"magnitude": {"granularity": {"n_m": {"only_where_faster": 1.05}}}}).dump()
    file = tmp_path / "recipe.yaml"
    data["prune"][0]["magnitude"]["granularity"]["n_m"]["probe"] = "probe.json"
    file.write_text(yaml.safe_dump(data))
    planned = plan(recipes.load(file))
    assert set(planned.entries[0].left_out) == {target.name for target in adaln_of(loaded)}
    first = planned.entries[0].left_out["transformer_blocks.0.norm1.linear"]
    assert first == "2 x 16 x 96: no 2:4 product: not tried below 256 tokens, inputs and outputs"
    assert f"warning: prune[0]: 5 layers of {len(loaded.targets) + 5} stay" in plan_table.as_text(planned, layers=False)
    component = Component(loaded.component_name, loaded.module, loaded.family, adaln_of(loaded))
    list(Magnitude.model_validate(N_M).prune(component, None))
    assert not layers.find(loaded.module, loaded.family)


def test_a_comparison_tells_which_layers_an_entry_was_given(tmp_path):
    prune = [{"magnitude": {"sparsity": 0.5}}, {"magnitude": {"sparsity": 0.5}, "targets": ALL | {"exclude": ["down"]}}]
    picture = {"images": 1, "steps": 1, "prompts": ["a"], "metrics": ["pairs"]}
    rows = compare(recipe("flux", tmp_path / "out", prune, report=picture), tiny.quiet(), tmp_path / "compared")
    assert [row.pruner for row in rows] == [
        "magnitude, sparsity 0.5",
        "magnitude, sparsity 0.5, include attention + feed_forward + adaln, exclude down",
    ]
    assert [row.sparsity for row in rows] == [0.5, 0.5]
    assert rows[0].network < rows[0].sparsity
    text = (tmp_path / "compared" / "compare.md").read_text()
    assert f"| 1 | magnitude, sparsity 0.5 | 50.0% | {rows[0].network:.1%} | " in text
