"""Takes float32 matrices apart for `product` in one pass over memory."""

# Shapes: N matrices of L lines, each of T terms with one scale; L or T, too, a tile's.

# pyright: reportCallIssue=false, reportArgumentType=false, reportInvalidTypeForm=false
# (of a kernel: it is launched with more than its arguments, and its annotations are triton's)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = (1, 2048)
"""Lines and terms of a tile where a line's terms are side by side in memory."""
COLUMNS = (32, 128)
"""The same where lines are."""


def take_apart(x: Tensor, dim: int, second_at: int, largest: int) -> tuple[Tensor, Tensor]:
    """Scales every line, and makes each of its numbers the sum of two.

    Args:
        x: N x ... float32, of any strides; not changed.
        dim: -1 or -2: along which a line's terms lie.
        second_at: 0, 1 or 2: which third along `dim` of the result has what rounding took; the others have the rounded.
        largest: lines are brought below two to this power.

    Returns:
        As `product.Parts` has them: the parts in float16, and the powers of two by which to multiply products.
    """
    count, (terms, lines) = len(x), (x.shape[dim], x.shape[-3 - dim])
    shape = list(x.shape)
    shape[dim] = 3 * terms
    parts = torch.empty(shape, dtype=torch.float16, device=x.device)
    shape[dim] = 1
    scale = torch.empty(shape, device=x.device)
    tall, wide = ROWS if x.stride(dim) == 1 else COLUMNS
    with torch.cuda.device_of(x):
        _take_apart[(triton.cdiv(lines, tall), count)](
            *(x, *x.stride()[:1], x.stride(-3 - dim), x.stride(dim)),
            *(parts, parts.stride(0), parts.stride(-3 - dim), parts.stride(dim)),
            *(scale, lines, terms, second_at, 127 + largest),
            L=tall,
            T=wide,
            num_warps=4,
        )
    return parts, scale


@triton.jit(do_not_specialize=["second_at"])
def _take_apart(
    x, x_matrix, x_line, x_term, parts, part_matrix, part_line, part_term, scale, lines, terms, second_at, bias,
    L: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    line_L, matrix = tl.program_id(0) * L + tl.arange(0, L), tl.program_id(1).to(tl.int64)
    x_L = x + matrix * x_matrix + line_L.to(tl.int64) * x_line
    part_L = parts + matrix * part_matrix + line_L.to(tl.int64) * part_line
    most_L = tl.zeros((L,), tl.float32)
    for start in range(0, terms, T):
        term_T = start + tl.arange(0, T)
        inside_LT = (line_L < lines)[:, None] & (term_T < terms)
        x_LT = tl.load(x_L[:, None] + term_T.to(tl.int64) * x_term, mask=inside_LT, other=0)
        most_L = tl.maximum(most_L, tl.max(tl.abs(x_LT), axis=1))
    # the exponent of what is at least a half and less than one, as by frexp
    exponent_L = tl.maximum((most_L.to(tl.int32, bitcast=True) >> 23) - 126, -100)
    power_L = ((bias - exponent_L) << 23).to(tl.float32, bitcast=True)
    for start in range(0, terms, T):
        term_T = start + tl.arange(0, T)
        inside_LT = (line_L < lines)[:, None] & (term_T < terms)
        x_LT = tl.load(x_L[:, None] + term_T.to(tl.int64) * x_term, mask=inside_LT, other=0) * power_L[:, None]
        first_LT = x_LT.to(tl.float16)
        second_LT = (x_LT - first_LT.to(tl.float32)).to(tl.float16)
        at_LT = part_L[:, None] + term_T.to(tl.int64) * part_term
        for third in tl.static_range(3):
            half_LT = tl.where(second_at == third, second_LT, first_LT)
            tl.store(at_LT + tl.cast(third, tl.int64) * terms * part_term, half_LT, mask=inside_LT)
    back_L = ((254 - bias + exponent_L) << 23).to(tl.float32, bitcast=True)
    tl.store(scale + matrix * lines + line_L, back_L, mask=line_L < lines)
