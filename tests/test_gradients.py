"""Second moments of gradients, against Jacobians that are known, and what gathering them leaves as it was."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from compressor_obs_diff import OBSDiff
from compressor_obs_diff.groups import streams_of
from compressor_obs_diff.spread import parts
from compressor_obs_diff.weightings import LogDecrease
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from compressor.calibration import Group, Moments, Package, curvature, gathering, gradients, influence
from compressor.calibration.coupled import Coupled
from compressor.calibration.curvature import Gradients, blocks_of
from compressor.calibration.gradients import Differentiated
from compressor.calibration.strides import Strides
from compressor.calibration.timing import Meter
from compressor.errors import CompressorError
from compressor.structure import Target
from tests import tiny

CPU = torch.device("cpu")


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


def adding_to(sums: dict[str, Gradients]) -> gradients.Take:
    def take(found: Mapping[str, Tensor], _squares: Mapping[str, Tensor], scale: Tensor) -> None:
        for name, gradient in found.items():
            sums[name].add(gradient, scale.item())

    return take


def gather(network: Two, count: int, tokens: int, calls: Differentiated | None = None) -> dict[str, Gradients]:
    targets = targets_of(network)
    sums = {target.name: Gradients.empty(target.outputs, torch.device("cpu")) for target in targets}
    with torch.no_grad(), gradients.watch(network, targets, adding_to(sums), calls or Differentiated(1.0)):
        for call in range(count):
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
        calls = Differentiated(1.0)
        with torch.no_grad(), gradients.watch(network, targets, adding_to(sums), calls):
            for factor in factors:
                network.second.weight.copy_(factor * Two().second.weight)
                calls.next_batch(0)
                network(torch.ones(50, 3))
                calls.scales.clear()  # as of another batch
        squares = sum(found.second_BKK.diagonal(dim1=1, dim2=2).sum().item() for found in sums.values())
        assert squares == pytest.approx(50 * 11 * len(factors))  # a mean of one over all tokens and outputs
        alone.append(sums["first"].second_BKK)
    torch.testing.assert_close(alone[2], alone[0] + alone[1])


def test_gradients_of_another_package_are_scaled_as_those_of_the_first():
    network = Two()
    calls = Differentiated(1.0)
    together = gather(network, 1, 7, calls)
    assert list(calls.scales) == [(0, 0)]
    targets = targets_of(network)[:1]
    sums = {"first": Gradients.empty(5, torch.device("cpu"))}
    with torch.no_grad(), gradients.watch(network, targets, adding_to(sums), calls):
        network(torch.randn(7, 3, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(sums["first"].second_BKK, together["first"].second_BKK)


def test_a_call_whose_gradients_overflow_is_scaled_by_those_that_do_not():
    g_TO = torch.tensor([[2.0, 2.0], [2.0, torch.inf], [torch.nan, 2.0], [2.0, 2.0]])
    assert gradients._scale([g_TO], [influence.squares(g_TO)]).item() == pytest.approx(0.5)
    assert gradients._scale([torch.zeros(3, 1)], [torch.zeros(3)]).item() == 1


@pytest.mark.parametrize(
    ("prompts", "steps", "share"), [(100, 25, 1 / 6), (60, 20, 1 / 6), (40, 10, 0.5), (20, 10, 1), (2, 4, 1)]
)
def test_a_sixth_of_the_calls_is_differentiated_and_more_where_there_are_few(prompts, steps, share):
    assert gradients.share_of(prompts, steps, 1.0) == pytest.approx(share)


def test_a_share_of_the_calls_and_always_the_first_are_differentiated_and_the_same_ones_again():
    network = Two()
    assert int(gather(network, 1, 7)["first"].tokens) == 7
    calls = Differentiated(1 / 6)
    first, again = gather(network, 400, 1, calls), gather(network, 400, 1, Differentiated(1 / 6))
    assert 45 <= int(first["first"].tokens) == calls.count <= 90
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
    x, forgotten, calls = torch.randn(4, 3), [], Differentiated(1.0)
    try:
        with (
            torch.no_grad(),
            gradients.watch(network, targets, adding_to(sums), calls, lambda: forgotten.append(calls.count)),
        ):
            (found,) = network(x)
            assert not found.requires_grad
    except Interrupted:
        assert breaks
    assert forgotten == [1]
    assert not calls.now
    assert torch.is_grad_enabled()
    assert "forward" not in network.__dict__
    assert [p.requires_grad for p in network.parameters()] == [True] * 4 + [False] * 2
    hooks = [*network._forward_hooks.values(), *network._forward_pre_hooks.values()]
    hooks += [hook for target in targets for hook in target.module._forward_hooks.values()]
    assert not hooks


class Named(Two):
    """Gives an output object, as networks do that are not asked for a tuple."""

    def forward(self, x: Tensor) -> Any:
        return Transformer2DModelOutput(sample=super().forward(x)[0])


@torch.no_grad()
def test_an_output_object_is_given_without_its_graph():
    network = Named()
    sums = {target.name: Gradients.empty(target.outputs, CPU) for target in targets_of(network)}
    x = torch.randn(4, 3)
    expected = network(x).sample
    with gradients.watch(network, targets_of(network), adding_to(sums), Differentiated(1.0)):
        found = network(x)
    assert isinstance(found, Transformer2DModelOutput)
    assert torch.equal(found.sample, expected)
    assert not found.sample.requires_grad
    assert sums["first"].second_BKK.any()


def test_a_call_that_has_failed_keeps_no_inputs():
    group = Group("input", tuple(targets_of(Two())[:1]))
    moments = Moments.empty(3, True, CPU)
    coupled = Coupled([group], {"input": moments}, Meter(CPU))
    coupled.keeping(group)(torch.ones(1, 4, 3))
    coupled.forget()
    coupled.add({"first": torch.ones(1, 4, 5)}, {"first": torch.ones(4)}, torch.tensor(1.0), 1.0)
    assert int(moments.tokens) == 0


# ------------------------------------------------------------------------------------------------ what a token counts


def explicit(x_TI: Tensor, gradients_TO: list[Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The inputs' second moment and sum, and the gradients' second moments, in float64."""
    x_TI = x_TI.double()
    squares_LT = torch.stack([g_TO.double().square().sum(1) for g_TO in gradients_TO])
    inputs_T = squares_LT.sum(0) / sum(g_TO.shape[1] for g_TO in gradients_TO)
    inputs_T = 0.75 * inputs_T + 0.25 * inputs_T.mean()
    counts_T = x_TI.square().sum(1)
    of_gradients = []
    for g_TO, squares_T in zip(gradients_TO, squares_LT, strict=True):
        sum_OO = g_TO.double().T @ (counts_T[:, None] * g_TO.double())
        of_gradients.append(sum_OO * squares_T.sum() / (squares_T * counts_T).sum())
    return x_TI.T @ (inputs_T[:, None] * x_TI), inputs_T @ x_TI, of_gradients


def couple(x: Tensor, given: dict[str, Tensor], scale: float, weight: float) -> Moments:
    known = tiny.load("sd3").targets[0]
    targets = tuple(
        dataclasses.replace(known, name=name, module=nn.Linear(x.shape[-1], gradient.shape[-1]))
        for name, gradient in given.items()
    )
    moments = Moments.empty(x.shape[-1], True, x.device)
    moments.gradients = {name: Gradients.empty(gradient.shape[-1], x.device) for name, gradient in given.items()}
    groups = [Group("input", targets)]
    coupled = Coupled(groups, {"input": moments}, Meter(x.device))
    coupled.keeping(groups[0])(x)
    squares = {name: influence.squares(gradient) for name, gradient in given.items()}
    coupled.add(given, squares, torch.tensor(scale, dtype=torch.float64), weight)
    return moments.finish()


def test_tokens_count_by_their_gradients_among_inputs_and_by_their_inputs_among_gradients():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 20, 6, generator=generator) * torch.logspace(-1, 1, 20)[:, None]
    given = {
        name: torch.randn(2, 20, outputs, generator=generator) * torch.logspace(1, -1, 20)[:, None] * size
        for name, outputs, size in (("q", 5, 1.0), ("k", 3, 10.0))
    }
    moments = couple(x, given, 0.5, 3.0)
    second_II, total_I, of_gradients = explicit(x.flatten(0, 1), [g.flatten(0, 1) for g in given.values()])
    torch.testing.assert_close(moments.second_II, (1.5 * second_II).float(), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(moments.total_I, (1.5 * total_I).float(), rtol=1e-4, atol=1e-3)
    mean = sum(g.square().sum().item() for g in given.values()) / 8
    assert moments.weight.item() == pytest.approx(1.5 * mean)
    assert (int(moments.tokens), int(moments.skipped)) == (40, 0)
    for (name, sums), expected_OO in zip(moments.gradients.items(), of_gradients, strict=True):
        torch.testing.assert_close(sums.second_BKK[0], (0.5 * expected_OO).float(), rtol=1e-4, atol=1e-3)
        squares = sums.second_BKK.diagonal(dim1=1, dim2=2).sum().item()
        assert squares == pytest.approx(0.5 * given[name].square().sum().item(), rel=1e-5)  # as without weights


def test_where_nothing_depends_on_a_layer_all_its_tokens_count_the_same():
    x = torch.randn(1, 30, 4, generator=torch.Generator().manual_seed(0))
    moments = couple(x, {"idle": torch.zeros(1, 30, 3)}, 1.0, 2.0)
    torch.testing.assert_close(moments.second_II, 2 * x[0].T @ x[0])
    assert moments.weight.item() == pytest.approx(60)
    assert not moments.gradients["idle"].second_BKK.any()


def test_tokens_that_are_not_finite_are_left_out_and_those_with_such_a_gradient_count_a_little():
    generator = torch.Generator().manual_seed(0)
    x, g = torch.randn(1, 30, 4, generator=generator), torch.randn(1, 30, 3, generator=generator)
    x[0, 5, 1], g[0, 7, 2] = torch.inf, torch.nan
    moments = couple(x, {"layer": g}, 1.0, 1.0)
    clean_x, clean_g = x.clone(), g.clone()
    clean_x[0, 5], clean_g[0, 7] = 0, 0
    _, _, (of_gradient_OO,) = explicit(clean_x[0], [clean_g[0]])
    squares_T = clean_g[0].square().sum(1) / 3
    counts_T = 0.75 * squares_T + 0.25 * squares_T.mean()
    expected_II = sum(counts_T[i] * torch.outer(x[0, i], x[0, i]) for i in range(30) if i != 5)
    torch.testing.assert_close(moments.second_II, expected_II)
    assert (int(moments.tokens), int(moments.skipped)) == (29, 1)
    found = moments.gradients["layer"]
    assert (int(found.tokens), int(found.skipped)) == (29, 1)
    torch.testing.assert_close(found.second_BKK[0], of_gradient_OO.float())


@pytest.mark.parametrize("kind", ["sd3", "sd2", "sdxl", "flux"])
def test_they_are_gathered_with_the_inputs_of_the_same_calls_and_of_no_other(kind, monkeypatch):
    monkeypatch.setattr(gradients, "share_of", lambda *_: 0.5)
    loaded = tiny.load(kind)
    found = {}
    for moments in ("second", "gradients"):
        calibration = tiny.calibrate(loaded, packages=2)
        package = calibration.packages(loaded.targets, moments, tiny.no_workspace)[1]
        found[moments] = calibration.collect(package, moments, LogDecrease())
    for name, plain in found["second"].items():
        other = found["gradients"][name]
        assert not plain.gradients
        assert 0 < int(other.tokens) < int(plain.tokens)  # of half of the calls
        assert other.second_II is not None
        assert torch.linalg.eigvalsh(other.second_II.double()).min() > -1e-4 * other.second_II.trace()
        for layer, sums in other.gradients.items():
            outputs = dict(loaded.module.named_modules())[layer].out_features
            assert sums.second_BKK.shape == (1, outputs, outputs)
            assert int(sums.tokens) == int(other.tokens)
            assert int(sums.skipped) == 0
    assert any(sums.second_BKK.any() for m in found["gradients"].values() for sums in m.gradients.values())


def test_an_input_that_is_overwritten_before_its_gradients_are_known_is_told():
    x = torch.ones(1, 4, 3)
    moments = Moments.empty(3, True, x.device)
    targets = tuple(targets_of(Two())[:1])
    coupled = Coupled([Group("input", targets)], {"input": moments}, Meter(x.device))
    coupled.keeping(Group("input", targets))(x)
    x.add_(1)
    with pytest.raises(
        CompressorError,
        match="input: the network writes over the layer's input before its call has ended, so that gradients cannot "
        "weigh it; a pruner that asks for no gradients would do",
    ):
        coupled.add({"first": torch.ones(1, 4, 5)}, {"first": torch.ones(4)}, torch.tensor(1.0), 1.0)


class Sides(nn.Module):
    """Two linears with equal weights on inputs of their own, of which the second matters ten times as much."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, 6, bias=False), nn.Linear(8, 6, bias=False)
        self.second.load_state_dict(self.first.state_dict())

    def forward(self, x: Tensor, y: Tensor, timestep: Tensor) -> tuple[Tensor]:
        del timestep
        return (self.first(x) + 10 * self.second(y),)


@pytest.mark.parametrize("share", [1.0, 0.25])
def test_harms_of_two_layers_compare_as_the_errors_of_the_networks_output_that_they_cause(share):
    network = Sides()
    known = tiny.load("sd3").targets[0]
    targets = [
        dataclasses.replace(known, name=name, module=module)
        for name, module in (("first", network.first), ("second", network.second))
    ]
    groups = tuple(Group(target.name, (target,)) for target in targets)
    package = Package(1, 1, groups, 0)
    meter = Meter(torch.device("cpu"))
    with (
        torch.no_grad(),
        gathering.watch(
            *(network, package, "gradients", lambda _: (0, 1.0), Strides(1, 1), Differentiated(share), meter),
        ) as (moments, next_batch),
    ):
        generator = torch.Generator().manual_seed(0)
        next_batch(0)
        for _ in range(60):
            x, y = torch.randn(2, 1, 64, 8, generator=generator)
            network(x, y, timestep=torch.tensor(1.0))
    moments = {name: found.finish() for name, found in moments.items()}
    options = OBSDiff.model_validate({"sparsity": 0.5, "solver": "admm", "objective": "network", "spread": 0.2})
    inputs = {target.name: target.name for target in targets}
    harms = []
    for stream in streams_of(options, targets, inputs, moments):
        lost_OI = torch.zeros_like(stream.weight_OI)
        lost_OI[:, 3] = stream.weight_OI[:, 3]
        assert stream.metric_BKK is not None
        harms.append((stream.metric_BKK[0] @ lost_OI @ stream.second_II * lost_OI).sum().item())
    assert harms[1] / harms[0] == pytest.approx(100, rel=0.1)
    first, second = parts(options, package, moments)
    assert second.harm / first.harm == pytest.approx(100, rel=0.1)
