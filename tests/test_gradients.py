"""Second moments of gradients, against Jacobians that are known, and what gathering them leaves as it was."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from compressor_obs_diff.weightings import LogDecrease
from torch import Tensor, nn

from compressor.calibration import curvature, gradients
from compressor.calibration.curvature import Gradients, blocks_of
from compressor.structure import Target
from tests import tiny


class Two(nn.Module):
    """Two linears; a third one that nothing reads."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.idle = nn.Linear(3, 5), nn.Linear(5, 2), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        hidden = self.first(x)
        self.idle(hidden)
        return (self.second(hidden),)


def targets_of(network: Two) -> list[Target]:
    known = tiny.load("sd3").targets[0]
    layers = {"first": network.first, "second": network.second, "idle": network.idle}
    return [dataclasses.replace(known, name=name, module=layer) for name, layer in layers.items()]


def gather(network: Two, calls: int, tokens: int, scales: gradients.Scales | None = None) -> dict[str, Gradients]:
    targets = targets_of(network)
    sums = {target.name: Gradients.empty(target.outputs, torch.device("cpu")) for target in targets}
    with torch.no_grad(), gradients.watch(network, targets, sums, {} if scales is None else scales):
        for call in range(calls):
            x = torch.randn(tokens, 3, generator=torch.Generator().manual_seed(call))
            network(x)
            assert not torch.is_grad_enabled()
    return sums


def mean(sums: Gradients) -> Tensor:
    (second_OO,) = sums.second_BKK
    return second_OO / sums.tokens


def test_they_are_what_the_jacobian_says():
    network = Two()
    sums = gather(network, 40, 2000)
    jacobian_KO = network.second.weight.detach()  # of the output by the first layer's output
    expected_OO = jacobian_KO.T @ jacobian_KO
    # over the mean square of all 11 outputs, of which those of the idle layer do nothing
    unit = (expected_OO.trace() + 2) / 11
    assert (mean(sums["first"]) * unit - expected_OO).norm() < 0.05 * expected_OO.norm()
    assert (mean(sums["second"]) * unit - torch.eye(2)).norm() < 0.05
    assert not mean(sums["idle"]).any()


def test_every_call_counts_the_same_however_large_its_gradients_are():
    network = Two()
    targets = targets_of(network)
    alone = []
    for factors in ([1.0], [30.0], [1.0, 30.0]):
        sums = {target.name: Gradients.empty(target.outputs, torch.device("cpu")) for target in targets}
        scales: gradients.Scales = {}
        with torch.no_grad(), gradients.watch(network, targets, sums, scales) as next_batch:
            for factor in factors:
                network.second.weight.copy_(factor * Two().second.weight)
                next_batch(0)
                network(torch.ones(50, 3))
                scales.clear()  # as of another batch
        squares = sum(found.second_BKK.diagonal(dim1=1, dim2=2).sum().item() for found in sums.values())
        assert squares == pytest.approx(50 * 11 * len(factors))  # a mean of one over all tokens and outputs
        alone.append(sums["first"].second_BKK)
    torch.testing.assert_close(alone[2], alone[0] + alone[1])


def test_gradients_of_another_package_are_scaled_as_those_of_the_first():
    network = Two()
    scales: gradients.Scales = {}
    together = gather(network, 1, 7, scales)
    assert list(scales) == [(0, 0)]
    targets = targets_of(network)[:1]
    sums = {"first": Gradients.empty(5, torch.device("cpu"))}
    with torch.no_grad(), gradients.watch(network, targets, sums, scales):
        network(torch.randn(7, 3, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(sums["first"].second_BKK, together["first"].second_BKK)


def test_a_call_whose_gradients_overflow_is_scaled_by_those_that_do_not():
    assert gradients._scale([torch.tensor([2.0, torch.inf, torch.nan, 2.0])]) == pytest.approx(0.5)
    assert gradients._scale([torch.zeros(3)]) == 1


def test_a_quarter_of_the_calls_and_always_the_first_are_differentiated_and_the_same_ones_again():
    network = Two()
    assert int(gather(network, 1, 7)["first"].tokens) == 7
    first, again = gather(network, 400, 1), gather(network, 400, 1)
    assert 70 <= int(first["first"].tokens) <= 130
    assert torch.equal(mean(first["first"]), mean(again["first"]))


@pytest.mark.parametrize(
    ("outputs", "blocks"), [(640, 1), (2048, 1), (2432, 2), (3072, 2), (5120, 4), (6144, 3), (10240, 5), (12288, 6)]
)
def test_the_outputs_of_a_wide_layer_are_cut_into_as_few_equal_blocks_as_can_be(outputs, blocks):
    assert blocks_of(outputs) == (blocks, outputs // blocks)


def test_blocks_are_those_of_the_whole_matrix(monkeypatch):
    g_TO = torch.randn(2, 50, 12, generator=torch.Generator().manual_seed(0))
    g_TO[1, 7, 3] = torch.inf
    whole = Gradients.empty(12, torch.device("cpu"))
    monkeypatch.setattr(curvature, "BLOCK", 5)
    cut = Gradients.empty(12, torch.device("cpu"))
    for sums in (whole, cut):
        sums.add(g_TO)
        sums.add(g_TO)
    assert cut.second_BKK.shape == (3, 4, 4)
    for b in range(3):
        block = slice(4 * b, 4 * b + 4)
        torch.testing.assert_close(cut.second_BKK[b], whole.second_BKK[0, block, block])
    finite_TO = torch.cat([g_TO[0], g_TO[1, :7], g_TO[1, 8:]])
    torch.testing.assert_close(whole.second_BKK[0], 2 * finite_TO.T @ finite_TO)
    assert (int(cut.tokens), int(cut.skipped)) == (198, 2)


class Interrupted(Exception):
    """Comes from within a forward."""


@pytest.mark.parametrize("breaks", [False, True])
def test_nothing_is_left_behind(breaks):
    network = Two()
    network.idle.requires_grad_(False)
    targets = targets_of(network)
    sums = {target.name: Gradients.empty(target.outputs, torch.device("cpu")) for target in targets}

    def fail(*_: Any) -> None:
        if breaks:
            raise Interrupted

    network.second.register_forward_pre_hook(fail)
    x = torch.randn(4, 3)
    try:
        with torch.no_grad(), gradients.watch(network, targets, sums, {}):
            (found,) = network(x)
            assert not found.requires_grad
    except Interrupted:
        assert breaks
    assert torch.is_grad_enabled()
    assert [p.requires_grad for p in network.parameters()] == [True] * 4 + [False] * 2
    hooks = [*network._forward_hooks.values(), *network._forward_pre_hooks.values()]
    hooks += [hook for target in targets for hook in target.module._forward_hooks.values()]
    assert not hooks


@pytest.mark.parametrize("kind", ["sd3", "sd2", "sdxl", "flux"])
def test_gathering_them_changes_nothing_else_that_is_gathered(kind):
    loaded = tiny.load(kind)
    found = {}
    for moments in ("second", "gradients"):
        calibration = tiny.calibrate(loaded, packages=2)
        package = calibration.packages(loaded.targets, moments)[1]
        found[moments] = calibration.collect(package, moments, LogDecrease())
    for name, plain in found["second"].items():
        other = found["gradients"][name]
        assert torch.equal(plain.second_II, other.second_II)
        assert not plain.gradients
        for layer, sums in other.gradients.items():
            outputs = dict(loaded.module.named_modules())[layer].out_features
            assert sums.second_BKK.shape == (1, outputs, outputs)
            assert 0 < int(sums.tokens) < int(plain.tokens)
            assert int(sums.skipped) == 0
    assert any(sums.second_BKK.any() for m in found["gradients"].values() for sums in m.gradients.values())
