"""Chooses a mask by the alternating direction method of multipliers: matrix products instead of a loop over columns.

Boza, "Fast and Effective Weight Update for Pruned Large Language Models" (TMLR 2024); Meng et al., "ALPS: Improved
Optimization for Highly Sparse One-Shot Pruning for Large Language Models" (NeurIPS 2024).
"""

# Shapes: O outputs, I inputs.

from __future__ import annotations

import torch
from torch import Tensor

from compressor.plugin import Elementwise

ROUNDS = 30
RAMP = 0.6  # the share of the rounds in which the sparsity rises to what is asked for
RHO, GROWTH, EVERY = (
    0.1,
    1.2,
    3,
)  # the penalty, in units of H's diagonal: its start, and its growth every so many rounds


def choose(
    weight_OI: Tensor, hessian_II: Tensor, granularity: Elementwise, sparsity: float | None, rounds: int = ROUNDS
) -> tuple[Tensor, Tensor]:
    """Looks for sparse weights whose outputs are nearest to the dense ones.

    In units in which H has a diagonal of ones, G = D^-1/2 H D^-1/2 and B0 = W D^1/2, it minimises |B - B0|^2 in G under
    the constraint B = Z with Z sparse, in turns:

        B = (B0 G - V + rho Z) (G + rho)^-1,    Z = the largest of B + V / rho,    V += rho (B - Z)

    Args:
        weight_OI: the dense weights, float32 or float64. Not changed.
        hessian_II: damped, symmetric, positive definite, of the same dtype. Not changed.
        granularity: what is removed together.
        sparsity: the share of weights to remove, where the granularity needs one.
        rounds: how many.

    Returns:
        The sparse weights, not yet refitted, and the mask of what was removed (True), both O x I. Exactly
        `granularity.zeros(O, I, sparsity)` are removed.
    """
    outputs, inputs = weight_OI.shape
    scale_I = hessian_II.diagonal().sqrt()
    gram_II = hessian_II / torch.outer(scale_I, scale_I)
    target_OI = (weight_OI * scale_I) @ gram_II
    sparse_OI = weight_OI * scale_I
    dual_OI = torch.zeros_like(sparse_OI)
    removed_OI = torch.zeros_like(sparse_OI, dtype=torch.bool)
    rho, inverse_II = RHO, gram_II
    for turn in range(rounds):
        if turn % EVERY == 0:
            rho = RHO * GROWTH ** (turn // EVERY)
            inverse_II = _inverse(gram_II, rho)
        dense_OI = (target_OI - dual_OI + rho * sparse_OI) @ inverse_II
        wanted_OI = dense_OI + dual_OI / rho
        share = min(1.0, (turn + 1) / (RAMP * rounds))
        now = None if sparsity is None else sparsity * share
        removed_OI = granularity.mask(wanted_OI.abs(), granularity.zeros(outputs, inputs, now))
        sparse_OI = wanted_OI.masked_fill(removed_OI, 0)
        dual_OI += rho * (dense_OI - sparse_OI)
    return (sparse_OI / scale_I).masked_fill_(removed_OI, 0), removed_OI


def _inverse(gram_II: Tensor, rho: float) -> Tensor:
    raised_II = gram_II.clone()
    raised_II.diagonal().add_(rho)
    return torch.cholesky_inverse(torch.linalg.cholesky(raised_II))
