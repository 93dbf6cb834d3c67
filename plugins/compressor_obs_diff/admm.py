"""Chooses a mask by the alternating direction method of multipliers: matrix products instead of a loop over columns.

Boza, "Fast and Effective Weight Update for Pruned Large Language Models" (TMLR 2024); Meng et al., "ALPS: Improved
Optimization for Highly Sparse One-Shot Pruning for Large Language Models" (NeurIPS 2024). Errors of the outputs may be
weighed by a metric, as Kronecker-factored curvature has it (van der Ouderaa et al., "The LLM Surgeon", ICLR 2024).
"""

# Shapes: O outputs, I inputs; B blocks of K outputs.

from __future__ import annotations

from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from compressor.plugin import Elementwise
from compressor_obs_diff.metric import diagonal, times

ROUNDS = 30
RAMP = 0.6  # the share of the rounds in which the sparsity rises to what is asked for
RHO, GROWTH, EVERY = (
    0.1,
    1.2,
    3,
)  # the penalty, in units of H's diagonal: its start, and its growth every so many rounds


MOST_KEPT = 2048
"""Inputs of a layer whose inverses are kept for the next layer that reads them: 170 MB at this width."""


class Gram:
    """A second moment in units in which its diagonal is ones; its factors serve all layers that read the input.

    Attributes:
        scale_I: the root of the diagonal, D^1/2.
        matrix_II: A = D^-1/2 H D^-1/2.
    """

    def __init__(self, hessian_II: Tensor) -> None:
        self.scale_I = hessian_II.diagonal().sqrt()
        self.matrix_II = _correlation(hessian_II)
        self._inverses: dict[float, Tensor] = {}

    @cached_property
    def spectrum(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues a (I) and eigenvectors Q (I x I), A = Q a Q^T."""
        values_I, vectors_II = torch.linalg.eigh(self.matrix_II)
        return values_I, vectors_II

    def inverse(self, rho: float) -> Tensor:
        """(A + rho)^-1."""
        found = self._inverses.get(rho)
        if found is None:
            raised_II = self.matrix_II.clone()
            raised_II.diagonal().add_(rho)
            found = torch.cholesky_inverse(torch.linalg.cholesky(raised_II))
            if len(found) <= MOST_KEPT:
                self._inverses[rho] = found
        return found


def choose(
    weight_OI: Tensor,
    gram: Gram,
    granularity: Elementwise,
    sparsity: float | None,
    metric_BKK: Tensor | None = None,
    rounds: int = ROUNDS,
) -> tuple[Tensor, Tensor]:
    """Looks for sparse weights whose outputs are nearest to the dense ones.

    In units in which H has a diagonal of ones, A = D^-1/2 H D^-1/2 and B0 = W D^1/2, it minimises
    tr (B - B0) A (B - B0)^T under the constraint B = Z with Z sparse, in turns:

        B = (B0 A - V + rho Z) (A + rho)^-1,    Z = the largest of B + V / rho,    V += rho (B - Z)

    With a metric G of the outputs it is tr G (W' - W) H (W' - W)^T, in units in which G has a diagonal of ones, too:
    K = E^-1/2 G E^-1/2 and B0 = E^1/2 W D^1/2. Then B solves K B A + rho B = K B0 A - V + rho Z, and with K = P k P^T
    and A = Q a Q^T

        B = P ((P^T (K B0 A - V + rho Z) Q) / (k a^T + rho)) Q^T

    Args:
        weight_OI: the dense weights, float32 or float64. Not changed.
        gram: A and D of a damped Hessian of the same dtype; layers that read one input may share it.
        granularity: what is removed together.
        sparsity: the share of weights to remove, where the granularity needs one.
        metric_BKK: G, in blocks along its diagonal, damped, symmetric, positive definite, of the same dtype; the
            identity if none. Not changed.
        rounds: how many.

    Returns:
        The sparse weights, not yet refitted, and the mask of what was removed (True), both O x I. Exactly
        `granularity.zeros(O, I, sparsity)` are removed.
    """
    outputs, inputs = weight_OI.shape
    scale_OI = gram.scale_I if metric_BKK is None else torch.outer(diagonal(metric_BKK).sqrt(), gram.scale_I)
    sparse_OI = weight_OI * scale_OI
    solve: _System = _Inputs(gram) if metric_BKK is None else _Both(_correlation(metric_BKK), gram)
    target_OI = solve.times(sparse_OI)
    dual_OI = torch.zeros_like(sparse_OI)
    removed_OI = torch.zeros_like(sparse_OI, dtype=torch.bool)
    rho = RHO
    for turn in range(rounds):
        if turn % EVERY == 0:
            rho = RHO * GROWTH ** (turn // EVERY)
            solve.raise_by(rho)
        dense_OI = solve(target_OI - dual_OI + rho * sparse_OI)
        wanted_OI = dense_OI + dual_OI / rho
        left = 1 - min(1.0, (turn + 1) / (RAMP * rounds))
        now = None if sparsity is None else sparsity * (1 - left**3)  # fast at first, when little is at stake
        removed_OI = granularity.mask(wanted_OI.abs(), granularity.zeros(outputs, inputs, now))
        sparse_OI = wanted_OI.masked_fill(removed_OI, 0)
        dual_OI += rho * (dense_OI - sparse_OI)
    return (sparse_OI / scale_OI).masked_fill_(removed_OI, 0), removed_OI


def _correlation(matrix: Tensor) -> Tensor:
    scale = matrix.diagonal(dim1=-2, dim2=-1).sqrt()
    return matrix / (scale[..., :, None] * scale[..., None, :])


class _System(Protocol):
    """B A + rho B, or K B A + rho B, and its solution for B."""

    def times(self, b_OI: Tensor) -> Tensor: ...
    def raise_by(self, rho: float) -> None: ...
    def __call__(self, wanted_OI: Tensor) -> Tensor: ...


class _Inputs:
    def __init__(self, gram: Gram) -> None:
        self.gram = gram

    def times(self, b_OI: Tensor) -> Tensor:
        return b_OI @ self.gram.matrix_II

    def raise_by(self, rho: float) -> None:
        self.inverse_II = self.gram.inverse(rho)

    def __call__(self, wanted_OI: Tensor) -> Tensor:
        return wanted_OI @ self.inverse_II


class _Both:
    def __init__(self, gram_BKK: Tensor, gram: Gram) -> None:
        self.gram_BKK, self.gram_II = gram_BKK, gram.matrix_II
        k_BK, self.p_BKK = torch.linalg.eigh(gram_BKK)
        a_I, self.q_II = gram.spectrum
        # rounding may make the least ones negative
        self.product_OI = torch.outer(k_BK.reshape(-1).clamp(min=0), a_I.clamp(min=0))

    def times(self, b_OI: Tensor) -> Tensor:
        return times(self.gram_BKK, b_OI @ self.gram_II)

    def raise_by(self, rho: float) -> None:
        self.raised_OI = self.product_OI + rho

    def __call__(self, wanted_OI: Tensor) -> Tensor:
        turned_OI = times(self.p_BKK.mT, wanted_OI @ self.q_II)
        return times(self.p_BKK, turned_OI / self.raised_OI) @ self.q_II.T
