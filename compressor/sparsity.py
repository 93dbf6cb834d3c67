"""Masks of exactly the size asked for, and the count afterwards."""

# Shapes: O outputs, I inputs, G groups of M inputs in a row.

from __future__ import annotations

import torch
from torch import Tensor

MOST_FOR_KTHVALUE = 2**17
"""Scores among which `torch.kthvalue` is left to find the threshold on a GPU."""


MOST_TO_COUNT, FEWEST_TO_COUNT = 8, 1024
"""Inputs of a group, at most, and groups, at least, for the order within to be found by comparing all pairs, which
takes a few passes over the columns; otherwise they are sorted."""


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
    flat = score_OI.reshape(-1)
    if zeros == 0:
        return torch.zeros_like(score_OI, dtype=torch.bool)
    if flat.is_cuda and flat.numel() > MOST_FOR_KTHVALUE:
        flat = ordered(flat)
        threshold = kth_of_ordered(flat, zeros)
    else:
        threshold = torch.kthvalue(flat, zeros).values
    chosen = flat < threshold
    equal = flat == threshold
    if flat.is_cuda:  # without waiting for how many there are
        chosen |= equal & (equal.cumsum(0) <= zeros - chosen.sum())
    else:
        chosen[equal.nonzero().squeeze(1)[: zeros - int(chosen.sum())]] = True
    return chosen.reshape(score_OI.shape)


def ordered(flat: Tensor) -> Tensor:
    """Whole numbers in the same order as finite ones (any shape): int64 for float64, else int32.

    The bits of a floating-point number that is not negative, read as a whole number, are in its order; of a negative
    one, in the reverse.
    """
    wide = flat.dtype == torch.float64
    flat = (flat if wide else flat.float()) + 0.0  # -0 becomes 0
    bits = flat.view(torch.int64 if wide else torch.int32)
    return torch.where(bits < 0, bits ^ torch.iinfo(bits.dtype).max, bits)


def kth_of_ordered(numbers: Tensor, k: int) -> Tensor:
    """The k-th smallest of whole numbers, as a tensor, by halving the interval in which it lies: one count a bit.

    `torch.kthvalue` goes over all of a vector with a single block of a GPU's threads, which takes 50 ms for the weights
    of one large layer.

    Args:
        numbers: N of int32 or int64, above the least that the type holds. Not changed.
        k: from 1 to N.
    """
    limits = torch.iinfo(numbers.dtype)
    low = torch.full((), limits.min, dtype=numbers.dtype, device=numbers.device)  # fewer than k are so low
    high = torch.full_like(low, limits.max)  # at least k are
    for _ in range(limits.bits):
        middle = (low >> 1) + (high >> 1) + (low & high & 1)  # the mean rounded down, which their sum may overflow
        enough = (numbers <= middle).sum() >= k
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    return high


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
    score_GM = score_OI.reshape(-1, of)
    if of > MOST_TO_COUNT or len(score_GM) < FEWEST_TO_COUNT:
        return lowest_per_row(score_GM, of - keep).reshape(score_OI.shape)
    columns = score_GM.unbind(1)
    before = [torch.zeros_like(column, dtype=torch.uint8) for column in columns]  # how many of the group are lower
    for i in range(of):
        for j in range(i):
            lower_G = columns[j] <= columns[i]  # ties go to the lower index
            before[i] = before[i] + lower_G
            before[j] = before[j] + ~lower_G
    return torch.stack([number < of - keep for number in before], dim=1).reshape(score_OI.shape)


def holds(weight_OI: Tensor, keep: int, of: int) -> bool:
    """Whether every `of` consecutive inputs of every row have at most `keep` non-zeros."""
    return bool(((weight_OI.reshape(-1, of) != 0).sum(1) <= keep).all())
