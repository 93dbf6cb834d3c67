"""The solvers that a recipe can name, behind one interface: dense weights and metrics in, sparse weights out."""

# Shapes: O outputs, I inputs; B blocks of K outputs.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from torch import Tensor

from compressor.plugin import Elementwise
from compressor_obs_diff import admm
from compressor_obs_diff.solver import Factor, factorise, sweep_together


@dataclass(frozen=True)
class Problem:
    """What layers that read one input have in common.

    Attributes:
        second_II: the Hessian, undamped, float32.
        damping: asked for, relative to the mean diagonal.
        granularity: what is removed together.
        block: columns that the sweep updates at a time.
        name: a layer, for errors.
        factored: the factor, where it has been made with those of other problems.
    """

    second_II: Tensor
    damping: float
    granularity: Elementwise
    block: int
    name: str
    factored: Factor | None = None

    @cached_property
    def factor(self) -> Factor:
        """The inverse Hessian as a triangle, and the damping that was needed for it."""
        return self.factored or factorise(self.second_II, self.damping, self.name)

    @cached_property
    def damped_II(self) -> Tensor:
        """The Hessian with the damping that was needed."""
        damped_II = self.second_II.clone()
        damped_II.diagonal().add_(self.factor.damping * self.second_II.diagonal().mean())
        return damped_II

    @cached_property
    def gram(self) -> admm.Gram:
        """The damped Hessian as ADMM takes it."""
        return admm.Gram(self.damped_II)


class Solver(Protocol):
    """Chooses what goes and updates the rest."""

    def __call__(
        self,
        weights: Sequence[Tensor],
        problem: Problem,
        sparsities: Sequence[float | None],
        metrics: Sequence[Tensor | None],
    ) -> list[tuple[Tensor, Tensor]]:
        """For each layer the new weights and the mask of what was removed (True), both O x I.

        Args:
            weights: of each layer, dense, float32. Not changed.
            problem: what they have in common.
            sparsities: the share of each one's weights to remove, where the granularity needs one.
            metrics: of each one's outputs, in blocks (B x K x K), positive definite; the identity if none. Not changed.
        """
        ...


def _sweep(
    weights: Sequence[Tensor],
    problem: Problem,
    sparsities: Sequence[float | None],
    metrics: Sequence[Tensor | None],
) -> list[tuple[Tensor, Tensor]]:
    assert all(metric is None for metric in metrics), "the sweep takes every row for itself"
    return sweep_together(weights, problem.factor.upper_II, problem.granularity, sparsities, problem.block)


def _admm(
    weights: Sequence[Tensor],
    problem: Problem,
    sparsities: Sequence[float | None],
    metrics: Sequence[Tensor | None],
) -> list[tuple[Tensor, Tensor]]:
    return [
        admm.choose(weight_OI, problem.gram, problem.granularity, sparsity, metric_BKK)
        for weight_OI, sparsity, metric_BKK in zip(weights, sparsities, metrics, strict=True)
    ]


SOLVERS: dict[str, Solver] = {"obs": _sweep, "admm": _admm}
"""By the name in the recipe."""
