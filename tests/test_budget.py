"""How heads and neurons are spread over the blocks: against all ways there are, by hand, and in whole runs."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from compressor_obs_diff import OBSDiff
from compressor_obs_diff.budget import Curve, allocate, curves
from pydantic import ValidationError

from compressor import checkpoint, plan_table, report
from compressor.calibration import Calibration
from compressor.compare import compare
from compressor.errors import CompressorError
from compressor.plan import plan
from compressor.plugin import LayerResult, Removed
from compressor.run import run
from compressor.structure import Component, consumers, find_groups
from tests import tiny
from tests.test_structured_runs import recipe

pytestmark = pytest.mark.usefixtures("looked_at_once")

GIVEN: dict[str, Any] = {
    "granularity": {"structured": {"heads": 0.5, "neurons": 0.5, "multiple": 8, "keep_first": 0, "keep_last": 0}},
    "objective": "network",
    "spread": 0.25,
}


def convex(seed: int, weights: tuple[int, ...]) -> list[Curve]:
    """Groups that each head or neuron more harms more."""
    random = torch.Generator().manual_seed(seed)
    found = []
    for i, weight in enumerate(weights):
        steps = torch.rand(6, generator=random, dtype=torch.float64).sort().values * weight
        harms = torch.cat([torch.zeros(1, dtype=torch.float64), steps.cumsum(0)])
        numbers = tuple(range(int(torch.randint(0, 3, (), generator=random)), 7))
        found.append(Curve(str(i), weight, 3, numbers, tuple(harms[list(numbers)].tolist())))
    return found


def harm(found: list[Curve], way: tuple[int, ...]) -> float:
    return sum(curve.harms[curve.choices.index(number)] for curve, number in zip(found, way, strict=True))


def weights_of(found: list[Curve], way: tuple[int, ...]) -> int:
    return sum(curve.weights * number for curve, number in zip(found, way, strict=True))


def best(found: list[Curve], weights: int) -> float:
    """The least harm of all ways to give up at least so many weights."""
    ways = itertools.product(*(curve.choices for curve in found))
    return min(harm(found, way) for way in ways if weights_of(found, way) >= weights)


@pytest.mark.parametrize("seed", range(6))
def test_no_other_way_to_give_up_as_many_harms_less(seed):
    found = convex(seed, (1, 1, 1, 1))
    way = tuple(allocate(found).values())
    assert weights_of(found, way) == 12
    assert harm(found, way) == pytest.approx(best(found, 12), rel=1e-12)


@pytest.mark.parametrize("seed", range(6))
def test_with_units_of_several_sizes_the_sum_is_off_by_less_than_half_the_smallest_step(seed):
    found = convex(seed, (7, 3, 5, 4))
    way = tuple(allocate(found).values())
    assert abs(weights_of(found, way) - 3 * 19) <= 1.5
    assert all(number in curve.choices for curve, number in zip(found, way, strict=True))
    steps = [curve.harms[i + 1] - curve.harms[i] for curve in found for i in range(len(curve.choices) - 1)]
    assert best(found, weights_of(found, way)) <= harm(found, way) <= best(found, weights_of(found, way)) + max(steps)


def test_the_cheapest_step_may_be_a_long_one():
    """Of a group whose first head alone costs more than all three together do for each: the way is not taken apart."""
    found = [Curve("a", 1, 3, (0, 1, 2, 3), (0.0, 2.0, 2.5, 2.7)), Curve("b", 1, 0, (0, 1, 2, 3), (0.0, 1.0, 2.0, 3.0))]
    assert allocate(found) == {"a": 3, "b": 0}


def test_where_removal_does_no_harm_there_leaves_as_much_as_may_and_elsewhere_the_rest():
    found = [Curve("idle", 2, 2, (1, 2, 3), (0.0, 0.0, 0.0)), Curve("busy", 2, 2, (1, 2, 3), (1.0, 2.0, 3.0))]
    assert allocate(found) == {"idle": 3, "busy": 1}


def test_a_last_step_may_be_too_large_if_it_brings_the_sum_nearer():
    found = [Curve("a", 10, 1, (0, 2, 3), (0.0, 1.0, 2.0)), Curve("b", 6, 1, (0, 2, 3), (0.0, 1.0, 2.0))]
    assert allocate(found) == {"a": 0, "b": 3}  # 18 of 16: 12 and one step of 6


def gathered(kind: str, pruner: OBSDiff) -> Any:
    loaded = tiny.load(kind)
    component = tiny.component(loaded)
    planned = pruner.removals(component)
    choices = {group: pruner.choices(group, count) for group, count in planned.items()}
    calibration = tiny.calibrate(loaded, packages=1)
    (package,) = calibration.packages(consumers(choices), pruner.moments, pruner.workspace)
    moments = calibration.collect(package, pruner.moments, pruner.weighting)
    return planned, choices, package, moments


@pytest.mark.parametrize("kind", ["sd3", "sd2", "flux"])
def test_harm_is_the_least_error_of_the_outputs_in_the_metric_of_the_gradients(kind):
    """Of the first that leaves: the smallest of all, each a dense problem in W' of the whole layer."""
    pruner = OBSDiff.model_validate(GIVEN)
    planned, choices, package, moments = gathered(kind, pruner)
    inputs = {target.name: shared.name for shared in package.groups for target in shared.targets}
    found = {curve.name: curve for curve in curves(pruner, planned, dict.fromkeys(choices, (0, 1)), package, moments)}
    assert set(found) == {group.name for group in choices}
    for group in choices:
        units = range(min(group.count, 6))  # all heads, and some neurons
        costs = [
            sum(
                least(reader, moments[inputs[reader.name]], group.columns(reader, [unit])) for reader in group.consumers
            )
            for unit in units
        ]
        assert found[group.name].harms[0] == 0
        if group.kind == "heads":
            assert found[group.name].harms[1] == pytest.approx(min(costs), rel=1e-3)
        assert found[group.name].harms[1] <= min(costs) * 1.001


def least(reader: Any, moments: Any, gone: torch.Tensor) -> float:
    """min tr(G (W' - W) H (W' - W)^T) over W' without some columns: one system of equations for all of W'."""
    second_II = moments.second_II.double()
    linear = reader.module
    if linear.bias is not None:
        mean_I = moments.total_I.double() / moments.weight
        second_II = second_II - moments.weight * torch.outer(mean_I, mean_I)
    second_II = second_II + 0.01 * second_II.diagonal().mean() * torch.eye(len(second_II))
    gradients = moments.gradients[reader.name]
    (slopes_OO,) = gradients.second_BKK.double() / moments.weight
    slopes_OO = slopes_OO + 0.3 * slopes_OO.diagonal().mean() * torch.eye(len(slopes_OO))
    stays = torch.ones(linear.in_features, dtype=torch.bool)
    stays[gone] = False
    difference_OI = torch.zeros_like(linear.weight, dtype=torch.float64)
    difference_OI[:, gone] = -linear.weight.detach().double()[:, gone]
    wanted_OK = -(slopes_OO @ difference_OI @ second_II)[:, stays]
    whole = torch.kron(slopes_OO, second_II[stays][:, stays])
    difference_OI[:, stays] = torch.linalg.solve(whole, wanted_OK.flatten()).view_as(wanted_OK)
    return float((slopes_OO @ difference_OI @ second_II * difference_OI).sum())


@pytest.mark.parametrize(("packages", "passes"), [(1, 1), (3, 5)])
def test_every_package_is_calibrated_before_the_first_is_pruned_and_the_first_but_once(packages, passes):
    loaded = tiny.load("flux")
    calibration = tiny.calibrate(loaded, packages=packages)
    pruner = OBSDiff.model_validate(GIVEN)
    list(pruner.prune(tiny.component(loaded), calibration))
    assert calibration.facts.packages == passes == pruner.passes(packages)


def left(folder: Path) -> tuple[report.GroupRow, ...]:
    structure = report.read(folder / "report.json").structure
    assert structure is not None
    return structure.groups


@pytest.mark.parametrize("kind", ["sd3", "sd2", "flux"])
def test_a_run_gives_blocks_widths_of_their_own_and_removes_as_many_weights_as_planned(kind, tmp_path):
    asked = recipe(kind, tmp_path / "out", {"obs_diff": GIVEN})
    folder = run(asked, tiny.quiet())
    planned = plan(asked)
    groups = left(folder)
    weights = {group.name: group.unit_weights for group in find_groups(tiny.load(kind).module, tiny.load(kind).family)}
    step = {"heads": 1, "neurons": 8}
    for row in groups:
        assert abs((row.before - row.after) / row.before - 0.5) <= 0.25 + 1e-9
        assert row.after % step[row.kind] == 0
    removed = sum(weights[row.name] * (row.before - row.after) for row in groups)
    promised = sum(weights[row.name] * (row.before - row.after) for row in planned.entries[0].groups)
    assert abs(removed - promised) < max(weights[row.name] * step[row.kind] for row in groups)
    assert {row.name: row.after for row in groups} != {row.name: row.after for row in planned.entries[0].groups}
    again = checkpoint.load(folder, "cpu")
    assert {group.name: group.count for group in find_groups(again.module, again.family)} == {
        row.name: row.after for row in groups
    }
    sizes = report.read(folder / "report.json").sizes.after
    assert sizes.parameters == sum(parameter.numel() for parameter in again.module.parameters())
    assert planned.entries[0].forwards == 3 * 2  # two packages, one of them twice, two steps


def test_the_plan_tells_what_may_be_left_of_each(tmp_path):
    asked = recipe("sd3", tmp_path / "out", {"obs_diff": GIVEN})
    text = plan_table.as_text(plan(asked), layers=False)
    line = (
        "  spread by calibration over all blocks, for as many weights: from 1 to 1 of 2 heads stay (2 times), from 16 "
        "to 48 of 64 neurons stay (3 times); here as if every block had the same share\n"
    )
    assert line in text
    groups = json.loads(plan_table.as_json(plan(asked)))["entries"][0]["groups"]
    assert {(group["kind"], group["least"], group["after"], group["most"]) for group in groups} == {
        ("heads", 1, 1, 1),
        ("neurons", 16, 32, 48),
    }


def test_compare_counts_what_is_really_left(tmp_path):
    picture = {"images": 2, "steps": 2, "prompts": ["a", "b"], "metrics": ["pairs"]}
    asked = recipe("sd2", tmp_path / "out", {"obs_diff": GIVEN}, report=picture)
    (row,) = compare(asked, tiny.quiet(), tmp_path / "compared")
    sizes = report.read(run(asked, tiny.quiet()) / "report.json").sizes.after
    assert (row.parameters, row.operations) == (sizes.parameters, sizes.operations)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            GIVEN | {"objective": "layer"},
            "spread needs objective network, whose gradients tell what the zeros of each layer do; add it, or leave "
            "spread out",
        ),
        (
            GIVEN | {"fusion": "rank_fusion"},
            "fusion has no effect: errors of the network's output add up by themselves; leave it out",
        ),
        (
            GIVEN | {"refit": True},
            "refit has no effect: heads and neurons are chosen one by one and fitted anew; leave it out",
        ),
    ],
)
def test_options_that_do_nothing_beside_it_are_refused(options, words):
    with pytest.raises(ValidationError) as caught:
        OBSDiff.model_validate(options)
    assert words in str(caught.value)


def test_a_spread_without_a_choice_is_refused(tmp_path):
    options = GIVEN | {"granularity": {"structured": {"heads": 0.5, "keep_first": 0, "keep_last": 0}}}
    with pytest.raises(CompressorError) as caught:
        plan(recipe("sd3", tmp_path / "out", {"obs_diff": options}))
    assert str(caught.value) == (
        "prune[0]: spread 0.25 leaves no choice: no block has another aligned width with a share that near to the one "
        "asked for; give more, or leave spread out"
    )


prune_as_promised = OBSDiff.prune


def all_at_most(self: OBSDiff, component: Component, calibration: Calibration) -> Iterator[LayerResult | Removed]:
    """Gives up the most of every group."""
    for result in list(prune_as_promised(self, component, calibration)):
        if isinstance(result, Removed):
            units = tuple(range(self.choices(result.group, 0)[-1]))
            for consumer in result.group.consumers:
                consumer.module.weight.data[:, result.group.columns(consumer, units)] = 0
            yield Removed(result.group, units)
        else:
            yield result


def no_width(self: OBSDiff, component: Component, calibration: Calibration) -> Iterator[LayerResult | Removed]:
    """Gives up a number of neurons that leaves no aligned width."""
    for result in prune_as_promised(self, component, calibration):
        if isinstance(result, Removed) and result.group.kind == "neurons":
            yield Removed(result.group, tuple(range(17)))
        else:
            yield result


@pytest.mark.parametrize(
    ("pruner", "words"),
    [
        (
            all_at_most,
            # heads 1920 both times; 3 x 32 and 3 x 48 neurons of 32 weights, in steps of 8
            "prune[0]: pruner 'obs_diff' should have given up 4992 weights with heads and neurons, to within 256, "
            "found 6528; nothing was kept",
        ),
        (
            no_width,
            "prune[0]: pruner 'obs_diff' should have given up one of 5 numbers from 16 to 48 of "
            "transformer_blocks.0.ff.neurons, found 17 in 17 indices; nothing was kept",
        ),
    ],
)
def test_a_pruner_that_spreads_otherwise_than_it_promised_is_refused(pruner, words, tmp_path, monkeypatch):
    monkeypatch.setattr(OBSDiff, "prune", pruner)
    with pytest.raises(CompressorError) as caught:
        run(recipe("sd3", tmp_path / "out", {"obs_diff": GIVEN}), tiny.quiet())
    assert str(caught.value) == words
    assert not (tmp_path / "out").exists()
