"""The optimal-brain-surgeon sweep over the columns of one layer.

Frantar and Alistarh, "SparseGPT" (ICML 2023); as used, with a timestep-weighted Hessian, by OBS-Diff
(arXiv 2510.06751).
"""

# Shapes: O outputs, I inputs, B columns of a block, J columns masked together.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.errors import CompressorError
from compressor.plugin import Elementwise
from compressor_obs_diff.triangular import inverse_factor

MOST_DAMPING = 10
"""Relative to the mean diagonal."""


@dataclass(frozen=True)
class Factor:
    """The inverse Hessian as a triangle.

    Attributes:
        upper_II: U, upper triangular, with U^T U = (H + damping * mean(diag H) * 1)^-1.
        damping: the damping that was needed.
        dtype: in which precision it was factorised.
    """

    upper_II: Tensor
    damping: float
    dtype: torch.dtype


def factorise(hessian_II: Tensor, damping: float, name: str) -> Factor:
    """Factorises the inverse of a Hessian, raising the damping tenfold, and then the precision, until it succeeds.

    With J the reversal of order, J H J = L L^T gives U = J L^-1 J: one factorisation and one triangular inverse,
    where the usual way factorises, inverts and factorises again.

    Args:
        hessian_II: symmetric, positive semi-definite, float32. Not changed.
        damping: added to the diagonal, relative to its mean.
        name: the layer, for the error.

    Raises:
        CompressorError: if the Hessian is zero or not finite, or no damping up to `MOST_DAMPING` helps.
    """
    mean = hessian_II.diagonal().mean()
    check_inputs(mean, name)
    for dtype in (torch.float32, torch.float64):
        scale = damping
        while scale <= MOST_DAMPING:
            inverse_II = _inverse_factor(hessian_II, scale * mean.to(dtype))
            if inverse_II is not None:
                return Factor(inverse_II.flip(0, 1).float(), scale, dtype)
            scale *= 10
    raise indefinite(name, scale / 10)


def _inverse_factor(hessian_II: Tensor, level: Tensor) -> Tensor | None:
    """L^-1 of J (H + level) J in the level's dtype, if there is one. Nothing else is kept: it would be much memory."""
    damped_II = hessian_II.flip(0, 1).to(level.dtype)
    damped_II.diagonal().add_(level)
    inverse_II, info = inverse_factor(damped_II)
    largest = torch.linalg.vector_norm(inverse_II, ord=float("inf"))  # as isfinite().all(), without copies
    return inverse_II if (info == 0) & torch.isfinite(largest) else None


def check_inputs(mean: Tensor, name: str) -> None:
    """Makes sure that something can be told from a Hessian.

    Args:
        mean: of its diagonal.
        name: the layer, for the error.

    Raises:
        CompressorError: if it is zero or not finite.
    """
    if not torch.isfinite(mean) or mean <= 0:
        raise CompressorError(
            f"{name}: the mean of the squared inputs should be positive and finite, found {mean.item()}; nothing "
            "reached this layer during calibration, or its activations overflow"
        )


def indefinite(name: str, damping: float) -> CompressorError:
    """The error for a Hessian that no damping up to that one helped."""
    return CompressorError(
        f"{name}: its Hessian cannot be factorised, even in float64 with a damping of {damping:g} times its mean "
        "diagonal; calibrate with more prompts"
    )


def explain_damping(used: float, asked: float, dtype: torch.dtype = torch.float32) -> tuple[str, ...]:
    """A note on a layer whose Hessian needed more damping, or more precision, than was asked for."""
    if used == asked and dtype == torch.float32:
        return ()
    precision = " in float64" if dtype == torch.float64 else ""
    return (f"the Hessian could only be factorised with a damping of {used:g}{precision}, not {asked:g}",)


def sweep(
    weight_OI: Tensor, upper_II: Tensor, granularity: Elementwise, sparsity: float | None, block: int
) -> tuple[Tensor, Tensor]:
    """Removes weights column by column, each time updating the columns to the right so as to keep the outputs.

    A weight's cost is w^2 / U_jj^2. Removing it changes the rest of its row by -w / U_jj times row j of U.

    Args:
        weight_OI: float32. Not changed.
        upper_II: U of `Factor`.
        granularity: what is removed together.
        sparsity: the share of weights to remove, where the granularity needs one.
        block: columns updated at a time.

    Returns:
        The new weights and the mask of what was removed (True), both O x I. Exactly
        `granularity.zeros(O, I, sparsity)` are removed.
    """
    return sweep_together([weight_OI], upper_II, granularity, [sparsity], block)[0]


def sweep_together(
    weights: Sequence[Tensor],
    upper_II: Tensor,
    granularity: Elementwise,
    sparsities: Sequence[float | None],
    block: int,
) -> list[tuple[Tensor, Tensor]]:
    """Sweeps several layers that read one input, such as q, k and v, at once: their rows do not depend on one another.

    Args:
        weights: of each layer, O x I with any O, float32. Not changed.
        upper_II: U of `Factor`, which they share.
        granularity: what is removed together, in every layer for itself.
        sparsities: as in `sweep`, of each layer.
        block: columns updated at a time.

    Returns:
        For each layer what `sweep` returns for it.
    """
    weight_OI = torch.cat(list(weights))  # a copy, even of one
    rows = [len(weight) for weight in weights]
    inputs = weight_OI.shape[1]
    removed_OI = torch.zeros_like(weight_OI, dtype=torch.bool)
    diagonal_I = upper_II.diagonal()
    step = min(granularity.columns(block), inputs)
    block = max(block // step, 1) * step
    for start in range(0, inputs, block):
        stop = min(start + block, inputs)
        error_OB = torch.empty_like(weight_OI[:, start:stop])
        for j in range(start, stop):
            if (j - start) % step == 0:
                end = min(j + step, stop)
                score_OJ = (weight_OI[:, j:end] / diagonal_I[j:end]).square()
                removed_OI[:, j:end] = torch.cat(
                    [
                        granularity.mask(
                            score, granularity.zeros(len(score), end, share) - granularity.zeros(len(score), j, share)
                        )
                        for score, share in zip(score_OJ.split(rows), sparsities, strict=True)
                    ]
                )
            error_O = weight_OI[:, j].masked_fill(~removed_OI[:, j], 0) / diagonal_I[j]
            weight_OI[:, j:stop].addr_(error_O, upper_II[j, j:stop], alpha=-1)
            weight_OI[:, j].masked_fill_(removed_OI[:, j], 0)
            error_OB[:, j - start] = error_O
        weight_OI[:, stop:].addmm_(error_OB, upper_II[start:stop, stop:], alpha=-1)
    return list(zip(weight_OI.split(rows), removed_OI.split(rows), strict=True))


def energy(weight_OI: Tensor, second_II: Tensor) -> Tensor:
    """||w X||^2 of every row w (O, float64) from the second moment of X."""
    return (weight_OI @ second_II).mul_(weight_OI).sum(1, dtype=torch.float64)
