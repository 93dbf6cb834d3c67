"""How many heads or neurons a ratio leaves, in widths that a GPU likes.

A width that is not a multiple of 8 makes a pruned model slower than the dense one; whole tiles are multiples of 64.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from compressor.errors import CompressorError


def kept_count(total: int, ratio: float, multiple: int, name: str) -> int:
    """How many of `total` are kept: the multiple nearest to what the ratio asks for; of two as near, the larger.

    `total` itself may be kept, multiple or not. At least one multiple is kept; where `total` is less than one, and
    no alignment can be had, every count may be kept.

    Args:
        total: heads or neurons, at least 1.
        ratio: the share to remove.
        multiple: 1 for heads, which stand and fall as a whole; 64, say, for neurons.
        name: whose heads or neurons, for the error.

    Raises:
        CompressorError: if the ratio is negative or would leave none.
    """
    return spread([total], ratio, multiple, [name])[0]


def spread(totals: Sequence[int], ratio: float, multiple: int, names: Sequence[str]) -> list[int]:
    """How many are kept in each of several blocks, the sum of what is removed coming as near to the ratio as it can.

    Every block begins with the multiple below what the ratio asks of it. Then the blocks that this took furthest
    below, counted in steps, get one step more, until the sum is nearest; blocks alike are served in their order.
    Where a block cannot give (one multiple is left), others give instead. With steps of one size the sum is off by at
    most half a step, or every block is down to one multiple.

    Args:
        totals: heads or neurons of each block, at least 1.
        ratio: the share to remove.
        multiple: as in `kept_count`.
        names: one a block, for the error.

    Raises:
        CompressorError: as `kept_count`.
    """
    assert multiple >= 1
    assert min(totals, default=1) >= 1
    if not 0 <= ratio < 1:
        raise CompressorError(f"the ratio of {_listed(names)} should be at least 0 and less than 1, found {ratio}")
    share = 1 - Fraction(str(ratio))  # as it was written, not as it is stored
    asked = [share * total for total in totals]
    empty = [i for i, count in enumerate(asked) if count < Fraction(1, 2)]
    if empty:
        smallest = min(empty, key=lambda i: totals[i])
        raise CompressorError(
            f"{names[smallest]}: a ratio should leave at least 1 of {totals[smallest]}, found {ratio}, "
            f"which leaves none; remove at most {1 - 1 / totals[smallest]:.4g}"
        )
    steps = [multiple if total >= multiple else 1 for total in totals]
    kept = [
        total if ratio == 0 else max(int(count // step) * step, step)
        for total, count, step in zip(totals, asked, steps, strict=True)
    ]
    excess = sum(kept) - sum(asked)
    while excess < 0:
        larger = [
            min(count - count % step + step, total) for count, step, total in zip(kept, steps, totals, strict=True)
        ]
        able = [i for i in range(len(kept)) if larger[i] > kept[i] and abs(excess + larger[i] - kept[i]) <= -excess]
        if not able:
            break
        best = max(able, key=lambda i: (Fraction(asked[i] - kept[i]) / (larger[i] - kept[i]), -i))
        excess += larger[best] - kept[best]
        kept[best] = larger[best]
    while excess > 0:
        smaller = [max((count - 1) // step * step, step) for count, step in zip(kept, steps, strict=True)]
        able = [i for i in range(len(kept)) if smaller[i] < kept[i] and abs(excess + smaller[i] - kept[i]) < excess]
        if not able:
            break
        best = max(able, key=lambda i: (Fraction(kept[i] - asked[i]) / (kept[i] - smaller[i]), -i))
        excess += smaller[best] - kept[best]
        kept[best] = smaller[best]
    return kept


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
