"""The solvers that a recipe can name, behind one interface: dense weights and a Hessian in, sparse weights out."""

# Shapes: O outputs, I inputs.

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from compressor.plugin import Elementwise
from compressor_obs_diff import admm
from compressor_obs_diff.solver import Factor, factorise, sweep


@dataclass(frozen=True)
class Problem:
    """What all layers that read one input have in common.

    Attributes:
        second_II: the Hessian, undamped, float32.
        damping: asked for, relative to the mean diagonal.
        granularity: what is removed together.
        sparsity: the share of weights to remove, where the granularity needs one.
        block: columns that the sweep updates at a time.
        name: a layer, for errors.
    """

    second_II: Tensor
    damping: float
    granularity: Elementwise
    sparsity: float | None
    block: int
    name: str

    @cached_property
    def factor(self) -> Factor:
        """The inverse Hessian as a triangle, and the damping that was needed for it."""
        return factorise(self.second_II, self.damping, self.name)

    @cached_property
    def damped_II(self) -> Tensor:
        """The Hessian with the damping that was needed."""
        damped_II = self.second_II.clone()
        damped_II.diagonal().add_(self.factor.damping * self.second_II.diagonal().mean())
        return damped_II


Solver = Callable[[Tensor, Problem], tuple[Tensor, Tensor]]


def _sweep(weight_OI: Tensor, problem: Problem) -> tuple[Tensor, Tensor]:
    return sweep(weight_OI, problem.factor.upper_II, problem.granularity, problem.sparsity, problem.block)


def _admm(weight_OI: Tensor, problem: Problem) -> tuple[Tensor, Tensor]:
    return admm.choose(weight_OI, problem.damped_II, problem.granularity, problem.sparsity)


SOLVERS: dict[str, Solver] = {"obs": _sweep, "admm": _admm}
"""By the name in the recipe. Each takes float32 weights, O x I, which it does not change."""
