"""How zeros are spread over layers: against all ways there are, on tiny pipelines, and in whole runs."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from compressor_obs_diff import OBSDiff
from compressor_obs_diff.spread import POWER, Part, allocate, parts

from compressor import plan_table, report
from compressor.calibration import Calibration
from compressor.errors import CompressorError
from compressor.plan import plan
from compressor.plugin import LayerResult
from compressor.run import run
from compressor.structure import Component
from tests import tiny
from tests.test_run import recipe

pytestmark = pytest.mark.usefixtures("looked_at_once")

GIVEN: dict[str, Any] = {"sparsity": 0.5, "spread": 0.2, "solver": "admm", "objective": "network"}


def total_harm(layers: list[Part], zeros: tuple[int, ...]) -> float:
    def odds(share: float) -> float:
        return share / (1 - share)

    return sum(
        layer.harm * (odds(count / layer.weights) / odds(layer.zeros / layer.weights)) ** POWER
        for layer, count in zip(layers, zeros, strict=True)
    )


@pytest.mark.parametrize("seed", range(8))
def test_no_other_way_to_spread_the_zeros_harms_less(seed):
    random = torch.Generator().manual_seed(seed)
    layers = []
    for i, weights in enumerate((8, 12, 16, 20)):
        zeros = weights // 2
        reach = int(torch.randint(1, zeros, (), generator=random))
        harm = float(torch.randn((), generator=random).exp() * weights)
        layers.append(Part(str(i), harm, weights, zeros, zeros - reach, zeros + reach))
    ways = itertools.product(*(range(layer.least, layer.most + 1) for layer in layers))
    asked = sum(layer.zeros for layer in layers)
    best = min(total_harm(layers, way) for way in ways if sum(way) == asked)
    found = tuple(allocate(layers).values())
    assert sum(found) == asked
    assert all(layer.least <= count <= layer.most for layer, count in zip(layers, found, strict=True))
    # rounding the best fractions is not the best rounding, but nearly
    assert best <= total_harm(layers, found) <= 1.02 * best


def test_large_layers_are_given_exactly_as_many_as_asked_and_equal_ones_equally_many():
    layers = [Part(str(i), 3.0, 1_000_003, 600_002, 500_002, 700_002) for i in range(7)]
    assert set(allocate(layers).values()) == {600_002}
    uneven = [dataclasses.replace(layer, harm=10.0**i) for i, layer in enumerate(layers)]
    found = list(allocate(uneven).values())
    assert sum(found) == 7 * 600_002
    assert found == sorted(found, reverse=True)
    assert (found[0], found[-1]) == (700_002, 500_002)


@pytest.mark.parametrize("harms", [(0.0, 0.0, 0.0), (0.0, 1.0, 1.0)], ids=str)
def test_where_zeros_do_no_harm_there_are_as_many_as_may_be(harms):
    layers = [Part(str(i), harm, 100, 50, 30, 70) for i, harm in enumerate(harms)]
    assert list(allocate(layers).values()) == ([50, 50, 50] if not any(harms) else [70, 40, 40])


def test_a_layer_that_the_output_does_not_depend_on_is_harmed_by_nothing():
    loaded = tiny.load("sd3")
    calibration = tiny.calibrate(loaded, packages=1)
    pruner = OBSDiff(sparsity=0.5, spread=0.2, solver="admm", objective="network")
    (package,) = calibration.packages(loaded.targets, pruner.moments, pruner.workspace)
    moments = calibration.collect(package, pruner.moments, pruner.weighting)
    found = {part.name: part for part in parts(pruner, package, moments)}
    assert set(found) == {target.name for target in loaded.targets}
    idle = "transformer_blocks.1.attn.add_q_proj"  # queries of a text that the last block does not give on
    assert found[idle].harm == 0
    assert all(part.harm > 0 for name, part in found.items() if name != idle)


def test_where_no_weight_can_make_up_for_another_harm_is_a_sum_over_the_cheapest():
    loaded = tiny.load("sd3")
    calibration = tiny.calibrate(loaded, packages=1)
    pruner = OBSDiff(sparsity=0.5, spread=0.2, damping=1e-6, solver="admm", objective="network")
    (package,) = calibration.packages(loaded.targets, pruner.moments, pruner.workspace)
    moments = calibration.collect(package, pruner.moments, pruner.weighting)
    group = package.groups[0]
    gathered, target = moments[group.name], group.targets[0]
    second_I = torch.linspace(1, 4, target.inputs)
    gathered.second_II = torch.diag(second_I)
    (found, *_) = parts(pruner, dataclasses.replace(package, groups=(group,)), moments)
    gradients = gathered.gradients[target.name]
    weight_OI = target.module.weight.detach()
    costs = []
    for o in range(target.outputs):
        slope = gradients.second_BKK[0, o, o] / gradients.tokens
        costs += [float(slope * weight_OI[o, i] ** 2 * second_I[i]) for i in range(target.inputs)]
    expected = sum(sorted(costs)[: found.zeros]) * float(gathered.tokens / gathered.weight)
    assert found.harm == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("packages", "passes"), [(1, 1), (3, 5)])
def test_every_package_is_calibrated_before_the_first_is_pruned_and_the_first_but_once(packages, passes):
    loaded = tiny.load("flux")
    calibration = tiny.calibrate(loaded, packages=packages)
    pruner = OBSDiff.model_validate(GIVEN | {"refit": True})
    results = [r for r in pruner.prune(tiny.component(loaded), calibration) if isinstance(r, LayerResult)]
    assert calibration.facts.packages == passes == pruner.passes(packages)
    given = [result.zeros or 0 for result in results]
    assert sum(given) == sum(pruner.zeros(target) for target in loaded.targets)
    assert len({zeros / pruner.zeros(target) for zeros, target in zip(given, loaded.targets, strict=True)}) > 1


@pytest.mark.parametrize("kind", ["sd3", "sd2", "flux"])
def test_a_run_spreads_exactly_as_many_zeros_as_asked_within_the_bounds(kind, tmp_path):
    asked = recipe(kind, tmp_path / "out", [{"obs_diff": GIVEN}])
    rows = report.read(run(asked, tiny.quiet()) / "report.json").layers
    shares = [row.zeros / row.parameters for row in rows]
    assert sum(row.zeros for row in rows) == sum(round(row.parameters / 2) for row in rows)
    assert min(shares) >= 0.3 - 1e-9
    assert max(shares) <= 0.7 + 1e-9
    assert max(shares) - min(shares) > 0.1
    assert all(row.asked == row.zeros for row in rows)
    text = plan_table.as_text(plan(asked), layers=False)
    line = "  spread by calibration: from 30.{} % to {} % of a layer; below as if all had the same\n"
    assert line.format(*((1, 69.9) if kind == "sd3" else (0, "70.0"))) in text
    assert plan(asked).entries[0].forwards == 3 * 2  # two packages, one of them twice, two steps


prune_as_promised = OBSDiff.prune


def uneven(by: int) -> Any:
    def prune(self: OBSDiff, component: Component, calibration: Calibration | None) -> Iterator[LayerResult]:
        """Tells of other numbers than the bounds or the sum allow."""
        for number, result in enumerate(prune_as_promised(self, component, calibration)):
            assert isinstance(result, LayerResult)
            zeros = self.zeros(component.targets[number]) + (by if number == 0 else 0)
            yield dataclasses.replace(result, zeros=zeros)

    return prune


@pytest.mark.parametrize(
    ("by", "words"),
    [
        (
            -60,
            "prune[0]: pruner 'obs_diff' should have given transformer_blocks.0.attn.to_q from 90 to 166 zeros, found "
            "68; nothing was kept",
        ),
        (1, "prune[0]: pruner 'obs_diff' should have spread {} zeros over its layers, found {}; nothing was kept"),
    ],
)
def test_a_pruner_that_spreads_otherwise_than_it_promised_is_refused(by, words, tmp_path, monkeypatch):
    monkeypatch.setattr(OBSDiff, "prune", uneven(by))
    total = sum(round(target.outputs * target.inputs / 2) for target in tiny.load("sd3").targets)
    with pytest.raises(CompressorError) as caught:
        run(recipe("sd3", tmp_path / "out", [{"obs_diff": GIVEN | {"spread": 0.15}}]), tiny.quiet())
    assert str(caught.value) == words.format(total, total + 1)
    assert not (tmp_path / "out").exists()
