"""Chooses a mask by the alternating direction method of multipliers: matrix products instead of a loop over columns.

Boza, "Fast and Effective Weight Update for Pruned Large Language Models" (TMLR 2024); Meng et al., "ALPS: Improved
Optimization for Highly Sparse One-Shot Pruning for Large Language Models" (NeurIPS 2024). Errors of the outputs may be
weighed by a metric, as Kronecker-factored curvature has it (van der Ouderaa et al., "The LLM Surgeon", ICLR 2024).
"""

# Shapes: N problems of O outputs and I inputs; B blocks of K outputs; L levels of a shift.

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from compressor_obs_diff import product
from compressor_obs_diff.quadratic import Quadratic, blockwise
from compressor_obs_diff.triangular import inverse_factor, square

STEP = 4.0
"""Shifts are powers of this number, each of which costs an inversion. From 2 to 4 the error after the refit grew by
less than a hundredth on the built-in pipelines, to 8 by more."""
PENALTIES = ((-3, 4), (-2, 8), (-1, 7), (0, 5))
"""Exponents of the penalty rho, in units of H's diagonal, and the rounds with each. Without the last one the error
of single layers grew by up to a quarter."""
ROUNDS = sum(rounds for _, rounds in PENALTIES)
RAMP = 0.6
"""The share of the rounds in which the sparsity rises to what is asked for."""
LEAST, MOST = -3, 1
"""Exponents of shifts that rows of a metric are given."""


def shares() -> list[float]:
    """The share of the zeros' final share that is asked for in each round: fast at first, when little is at stake."""
    left = [1 - min(1.0, (turn + 1) / (RAMP * ROUNDS)) for turn in range(ROUNDS)]
    return [1 - each**3 for each in left]


def choose(weight_NOI: Tensor, quadratic: Quadratic, masks: Callable[[Tensor, int], Tensor]) -> tuple[Tensor, Tensor]:
    """Looks for sparse weights whose outputs are nearest to the dense ones.

    In the units of the quadratic form it minimises tr (B - B0) A (B - B0)^T under the constraint B = Z with Z sparse,
    in turns:

        B = B0 + rho (Z - U - B0) (A + rho)^-1,    Z = the largest of B + U,    U += B - Z

    With a metric K of the outputs, B solves K (B - B0) A + rho B = rho (Z - U), and with K = P k P^T

        row i of P^T (B - B0) = s_i row i of P^T (Z - U - B0) (A + s_i)^-1,    s_i = rho / k_i

    where s_i is rounded to a power of `STEP`, which is choosing in a slightly other metric: so few inverses do for all
    rows and rounds.

    Args:
        weight_NOI: the dense weights, float32 or float64. Not changed.
        quadratic: A and K.
        masks: of the lowest of scores (N x O x I), for each round; the last is the one asked for.

    Returns:
        The sparse weights, not yet refitted, and the mask of what was removed (True).
    """
    dense_NOI = quadratic.scaled(weight_NOI)
    step: _Step = _Plain(quadratic) if quadratic.metric_NBKK is None else _InMetric(quadratic, quadratic.metric_NBKK)
    found_NOI = dense_NOI.clone()  # B + U, of which Z is what is kept and U what is removed
    removed_NOI = torch.zeros_like(dense_NOI, dtype=torch.bool)
    turn, before = 0, PENALTIES[0][0]
    for exponent, rounds in PENALTIES:
        step.take(exponent)
        ratio = STEP ** (before - exponent)  # it is rho U that stays when rho changes
        for _ in range(rounds):
            kept_NOI = found_NOI.masked_fill(removed_NOI, 0)
            dual_NOI = found_NOI.sub_(kept_NOI)
            if ratio != 1:
                dual_NOI.mul_(ratio)
            found_NOI = step(kept_NOI.sub_(dual_NOI).sub_(dense_NOI)).add_(dense_NOI).add_(dual_NOI)
            removed_NOI = masks(found_NOI.abs(), turn)
            turn, ratio = turn + 1, 1.0
        before = exponent
    return quadratic.unscaled(found_NOI.masked_fill(removed_NOI, 0)), removed_NOI


class _Step(Protocol):
    """From what Z - U differs from B0 to what B is to differ from it; changes what it is given."""

    def take(self, exponent: int) -> None: ...
    def __call__(self, off_NOI: Tensor) -> Tensor: ...


def _shrinking(gram_NII: Tensor, exponent: int) -> product.Parts:
    """The inverse (A + s)^-1 times s: its eigenvalues are from 0 to 1."""
    shift = STEP**exponent
    raised_NII = gram_NII.clone()
    raised_NII.diagonal(dim1=1, dim2=2).add_(shift)
    factor_NII, _ = inverse_factor(raised_NII)
    square(factor_NII, raised_NII)
    return product.right(raised_NII.mul_(shift), fixed=True)


class _Plain:
    def __init__(self, quadratic: Quadratic) -> None:
        self._gram_NII = quadratic.gram_NII

    def take(self, exponent: int) -> None:
        self._by = _shrinking(self._gram_NII, exponent)

    def __call__(self, off_NOI: Tensor) -> Tensor:
        return product.multiply(product.left(off_NOI), self._by)


class _InMetric:
    """Rows of the metric's eigenbasis are ordered by their eigenvalues, so that those of a level lie together."""

    def __init__(self, quadratic: Quadratic, metric_NBKK: Tensor) -> None:
        k_NBK, p_NBKK = torch.linalg.eigh(metric_NBKK)
        k_NO, order_NO = k_NBK.flatten(1).sort()
        self._scattered = metric_NBKK.shape[1] > 1  # those of one block are in order
        self._order_NO1, self._back_NO1 = order_NO[..., None], order_NO.argsort()[..., None]
        vectors_BKK = p_NBKK.flatten(0, 1)
        self._to, self._from = product.left(vectors_BKK.mT, fixed=True), product.left(vectors_BKK, fixed=True)
        self._shrinking = [_shrinking(quadratic.gram_NII, exponent) for exponent in range(MOST, LEAST - 1, -1)]
        # rounding may make the least ones negative
        level_NO = -k_NO.clamp(min=torch.finfo(k_NO.dtype).tiny).log() / math.log(STEP)
        counts = []
        for exponent, _ in PENALTIES:
            nearest_NO = (level_NO + exponent).round().clamp(LEAST, MOST)
            counts.append(torch.stack([(nearest_NO > level).sum(1) for level in range(MOST, LEAST - 2, -1)], dim=1))
        limits_RNL: list[list[list[int]]] = torch.stack(counts).tolist()  # waits, once for all problems
        self._limits = dict(zip((exponent for exponent, _ in PENALTIES), limits_RNL, strict=True))

    def take(self, exponent: int) -> None:
        self._now: Sequence[Sequence[int]] = self._limits[exponent]

    def __call__(self, off_NOI: Tensor) -> Tensor:
        rows = product.left(self._put(blockwise(self._to, off_NOI), self._order_NO1))
        for problem, limits in enumerate(self._now):
            for by, (first, last) in zip(self._shrinking, pairwise(limits), strict=True):
                if first < last:
                    shrunk = product.multiply(rows.rows(problem, first, last), by.of(problem))
                    off_NOI[problem, first:last].copy_(shrunk[0])
        return blockwise(self._from, self._put(off_NOI, self._back_NO1))

    def _put(self, x_NOI: Tensor, order_NO1: Tensor) -> Tensor:
        return x_NOI.gather(1, order_NO1.expand_as(x_NOI)) if self._scattered else x_NOI
