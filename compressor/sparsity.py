"""Masks of exactly the size asked for, and the count afterwards."""

# Shapes: O outputs, I inputs, G groups of M inputs in a row.

from __future__ import annotations

import torch
from torch import Tensor


def count(sparsity: float, weights: int) -> int:
    """How many of `weights` a sparsity asks to remove: the nearest whole number."""
    return round(sparsity * weights)


def lowest(score_OI: Tensor, zeros: int) -> Tensor:
    """Marks exactly `zeros` entries of lowest score; ties go to the lower index.

    Args:
        score_OI: any shape, finite, not changed.
        zeros: between 0 and the number of entries.

    Returns:
        Boolean tensor, True where an entry was chosen.
    """
    if score_OI.is_cuda:
        return lowest_by_bits(score_OI, zeros)
    flat = score_OI.reshape(-1)
    if zeros == 0:
        return torch.zeros_like(score_OI, dtype=torch.bool)
    threshold = torch.kthvalue(flat, zeros).values
    chosen = flat < threshold
    ties = (flat == threshold).nonzero().squeeze(1)
    chosen[ties[: zeros - int(chosen.sum())]] = True
    return chosen.reshape(score_OI.shape)


def lowest_by_bits(score_OI: Tensor, zeros: int) -> Tensor:
    """The same as `lowest`, by passes over all entries that a GPU shares among all its parts, without waiting for it.

    The threshold is found bit by bit: as integers, the bits of floating-point numbers are in the order of the numbers.
    """
    score = score_OI.double() if score_OI.dtype == torch.float64 else score_OI.float()
    bits = (score.reshape(-1) + 0.0).view(torch.int64 if score.dtype == torch.float64 else torch.int32)  # -0 is 0
    bits = torch.where(bits < 0, bits ^ torch.iinfo(bits.dtype).max, bits)
    threshold = torch.where((bits < 0).sum() < zeros, 0, torch.iinfo(bits.dtype).min).to(bits.dtype)
    for bit in reversed(range(8 * bits.element_size() - 1)):
        higher = threshold + (1 << bit)
        threshold = torch.where((bits < higher).sum() < zeros, higher, threshold)
    below, ties = bits < threshold, bits == threshold
    return (below | (ties & (ties.cumsum(0) <= zeros - below.sum()))).reshape(score_OI.shape)


def lowest_per_row(score_OI: Tensor, zeros: int) -> Tensor:
    """Marks exactly `zeros` entries of lowest score in every row; ties go to the lower index.

    Args:
        score_OI: O x I, finite, not changed.
        zeros: per row.

    Returns:
        Boolean O x I, True where an entry was chosen.
    """
    chosen = torch.zeros_like(score_OI, dtype=torch.bool)
    order = torch.sort(score_OI, dim=1, stable=True).indices[:, :zeros]
    return chosen.scatter_(1, order, True)


def lowest_of_groups(score_OI: Tensor, keep: int, of: int) -> Tensor:
    """Marks all but the `keep` highest of every `of` consecutive inputs; ties go to the lower index.

    Args:
        score_OI: O x I with I a multiple of `of`, finite, not changed.
        keep: entries that stay in every group (N of N:M).
        of: inputs in a group (M of N:M).

    Returns:
        Boolean O x I, True where an entry was chosen.
    """
    outputs, inputs = score_OI.shape
    score_GM = score_OI.reshape(-1, of)
    return lowest_per_row(score_GM, of - keep).reshape(outputs, inputs)


def holds(weight_OI: Tensor, keep: int, of: int) -> bool:
    """Whether every `of` consecutive inputs of every row have at most `keep` non-zeros."""
    return bool(((weight_OI.reshape(-1, of) != 0).sum(1) <= keep).all())
