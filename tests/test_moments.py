"""Moments against explicit sums in float64, of made-up inputs and of all that a real sampling feeds the layers."""

# Shapes: N forwards, T tokens, I inputs.

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from compressor.calibration import Moments
from compressor.calibration.moments import mirror
from compressor.pipeline import Pipeline
from compressor.plugin import MomentKind, Schedule, Weighting
from tests import tiny

CPU = torch.device("cpu")


class Growing(Weighting):
    """1, 2, 3, ...: weights that tell the steps apart."""

    def weights(self, schedule: Schedule) -> tuple[float, ...]:
        return tuple(float(i + 1) for i in range(schedule.steps))


def explicit(inputs: list[Tensor], weights: list[float]) -> tuple[Tensor, Tensor, Tensor]:
    """The second moment, the total and the squares of weighted inputs, token by token in float64."""
    rows = [(a, x.double().reshape(-1, x.shape[-1])) for x, a in zip(inputs, weights, strict=True)]
    second_II = sum(a * torch.einsum("ti,tj->ij", x_TI, x_TI) for a, x_TI in rows)
    total_I = sum(a * x_TI.sum(0) for a, x_TI in rows)
    squares_I = sum(a * (x_TI * x_TI).sum(0) for a, x_TI in rows)
    assert isinstance(second_II, Tensor)
    assert isinstance(total_I, Tensor)
    assert isinstance(squares_I, Tensor)
    return second_II, total_I, squares_I


def assert_near(found: Tensor, expected: Tensor) -> None:
    """Equal up to float32's rounding of a sum, relative to the largest entry."""
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=2e-6 * expected.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("second", [True, False])
def test_sums_are_those_of_the_inputs_as_given(dtype, second):
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, 7, 12, generator=generator).to(dtype) for _ in range(3)]
    weights = [1.2, 0.93, 0.8]
    before = [x.clone() for x in inputs]
    moments = Moments.empty(12, second, CPU)
    for x, a in zip(inputs, weights, strict=True):
        moments.add(x, a)
    moments.finish()
    second_II, total_I, squares_I = explicit(inputs, weights)
    assert_near(moments.total_I, total_I)
    assert_near(moments.squares_I, squares_I)
    if moments.second_II is not None:
        assert_near(moments.second_II, second_II)
    assert (moments.second_II is not None) == second
    assert int(moments.tokens) == 3 * 14
    assert int(moments.skipped) == 0
    assert moments.weight.item() == pytest.approx(14 * sum(weights), rel=1e-12)
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))


@pytest.mark.parametrize("second", [True, False])
def test_half_precision_inputs_neither_overflow_nor_lose_the_weight_to_rounding(second):
    x_TI = torch.tensor([[300.0, 60000.0], [-299.5, 3e-5]], dtype=torch.float16)
    moments = Moments.empty(2, second, CPU)
    for _ in range(1000):
        moments.add(x_TI, 1.0001)  # sqrt(1.0001) is 1 in half precision
    moments.finish()
    second_II, total_I, squares_I = explicit([x_TI] * 1000, [1.0001] * 1000)
    torch.testing.assert_close(moments.squares_I.double(), squares_I, rtol=2e-5, atol=0)
    torch.testing.assert_close(moments.total_I.double(), total_I, rtol=2e-5, atol=0)
    if moments.second_II is not None:
        torch.testing.assert_close(moments.second_II.double(), second_II, rtol=2e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("second", [True, False])
def test_tokens_that_are_not_finite_are_counted_and_left_out(dtype, second):
    x_TI = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    x_TI[1, 2], x_TI[3, 0], x_TI[4, 3] = float("inf"), float("nan"), float("-inf")
    moments = Moments.empty(4, second, CPU)
    moments.add(x_TI[None], 0.9)
    moments.finish()
    second_II, total_I, squares_I = explicit([x_TI[[0, 2, 5]]], [0.9])
    assert int(moments.tokens) == 3
    assert int(moments.skipped) == 3
    assert moments.weight.item() == pytest.approx(3 * 0.9, rel=1e-12)
    assert_near(moments.total_I, total_I)
    assert_near(moments.squares_I, squares_I)
    if moments.second_II is not None:
        assert_near(moments.second_II, second_II)


@pytest.mark.parametrize("width", [5, 1024, 2500])
def test_a_mirrored_matrix_is_symmetric_and_its_lower_triangle_as_it_was(width):
    matrix_II = torch.randn(width, width, generator=torch.Generator().manual_seed(0))
    lower_II = matrix_II.tril()
    mirror(matrix_II)
    assert torch.equal(matrix_II, lower_II + lower_II.tril(-1).T)


class Recorder:
    """What each layer is fed during a sampling, and the step of each forward, by hooks of its own."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.inputs: dict[str, list[Tensor]] = {target.name: [] for target in pipeline.targets}
        self.steps: list[int] = []
        self._schedule: list[float] = []
        self._pipe = pipeline.pipe
        pipeline.module.register_forward_pre_hook(self._count, with_kwargs=True)
        for target in pipeline.targets:
            tiny.record_inputs(target.module, self.inputs[target.name])

    def _count(self, _module: nn.Module, args: tuple, kwargs: dict) -> None:
        timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
        scale = 1000 if "img_ids" in kwargs else 1  # Flux divides its timesteps
        schedule = self._pipe.scheduler.timesteps.tolist()
        distances = [abs(t - float(torch.as_tensor(timestep).flatten()[0]) * scale) for t in schedule]
        self.steps.append(distances.index(min(distances)))


@pytest.mark.parametrize("kind", list(tiny.KINDS))
@pytest.mark.parametrize("moment_kind", ["second", "norms"])
def test_moments_of_a_sampling_are_the_weighted_sums_over_all_that_the_layers_were_fed(kind, moment_kind: MomentKind):
    pipeline = tiny.load(kind)
    calibration = tiny.calibrate(pipeline, tiny.PROMPTS[:3], steps=3, packages=1)
    recorder = Recorder(pipeline)
    (package,) = calibration.packages(pipeline.targets, moment_kind, tiny.no_workspace)
    moments = calibration.collect(package, moment_kind, Growing())
    assert recorder.steps == [0, 1, 2] * 2
    assert calibration.facts.forwards == 6
    weights = [step + 1.0 for step in recorder.steps]
    tokens = 0
    for group in package.groups:
        found = moments[group.name]
        for target in group.targets:  # every one of them, though only the first was listened to
            second_II, total_I, squares_I = explicit(recorder.inputs[target.name], weights)
            assert_near(found.total_I, total_I)
            assert_near(found.squares_I, squares_I)
            if found.second_II is not None:
                assert_near(found.second_II, second_II)
        assert (found.second_II is not None) == (moment_kind == "second")
        counted = sum(x.numel() // x.shape[-1] for x in recorder.inputs[group.name])
        assert int(found.tokens) == counted
        expected = sum(a * x.numel() / x.shape[-1] for x, a in zip(recorder.inputs[group.name], weights, strict=True))
        assert found.weight.item() == pytest.approx(expected, rel=1e-12)
        tokens += counted
    assert calibration.facts.tokens == tokens


def test_scaling_every_timestep_weight_scales_the_moments_and_nothing_else():
    class Fourfold(Weighting):
        def weights(self, schedule: Schedule) -> tuple[float, ...]:
            return tuple(4 * weight for weight in Growing().weights(schedule))

    pipeline = tiny.load("sd3")
    calibration = tiny.calibrate(pipeline, packages=1)
    (package,) = calibration.packages(pipeline.targets, "second", tiny.no_workspace)
    once = calibration.collect(package, "second", Growing())
    fourfold = calibration.collect(package, "second", Fourfold())
    for name, moments in once.items():
        assert moments.second_II is not None
        scaled_II = fourfold[name].second_II
        assert scaled_II is not None
        assert torch.equal(4 * moments.second_II, scaled_II)
        assert torch.equal(moments.tokens, fourfold[name].tokens)
