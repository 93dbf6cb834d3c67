"""Triton kernels for the sweep on a GPU: the columns of a block one after the other, and masks of many layers.

Imported only where tensors lie on a GPU and Triton is there. `solver.sweep_together` does the same in PyTorch, and is
the reference.
"""

# Shapes: N problems of O outputs and I inputs, B columns of a block; S sets of K scores; P passes, D digits.

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 512
"""Weights that a program of the sweep holds: whole rows of a block. On an H200 the fastest of 256 to 4096."""
DIGIT = 4
"""Bits of a threshold that one pass over the scores decides."""
CHUNK = 512
"""Scores that a program of a pass looks at together."""
CHUNKS = 16
"""How many of these it takes one after the other, at the least."""
MOST_PROGRAMS = 512
"""Of a pass, for every set of scores."""
PAIRS = 4096
"""Of scores in groups of M, that a program compares."""


def sweep_block(
    weight_NOI: Tensor,
    upper_NII: Tensor,
    removed_NOI: Tensor,
    start: int,
    width: int,
    n_m: tuple[int, int] | None = None,
    tile: int = TILE,
    warps: int | None = None,
) -> Tensor:
    """Removes weights of a block's columns from left to right, each time updating those to the right in the block.

    Args:
        weight_NOI: float32, contiguous. The block's columns are changed.
        upper_NII: U of each problem, upper triangular, float32, contiguous.
        removed_NOI: what goes, contiguous; with N:M all False in the block, whose columns are chosen here and written.
        start: the block's first column.
        width: its columns; with N:M a multiple of M.
        n_m: keep so many of so many inputs in a row; none where the mask is given.
        tile: weights that a program holds.
        warps: of a program; by the width if none.

    Returns:
        For every weight that went what it was over U_jj, for all others 0; N x O x B.
    """
    problems, outputs, inputs = weight_NOI.shape
    columns = triton.next_power_of_2(width)
    if warps is None:
        warps = 1 if columns <= 256 else 4  # with one, threads need not wait for each other
    rows = max(1, min(tile // columns, triton.next_power_of_2(outputs)))
    error_NOB = torch.empty(problems, outputs, width, device=weight_NOI.device)
    keep, of = n_m or (0, 1)
    kernel: Any = _sweep_block
    with torch.cuda.device_of(weight_NOI):
        kernel[triton.cdiv(outputs, rows), problems](
            weight_NOI,
            upper_NII,
            removed_NOI.view(torch.uint8),
            error_NOB,
            outputs,
            inputs,
            start,
            width,
            ROWS=rows,
            COLUMNS=columns,
            KEEP=keep,
            OF=of,
            CHOOSE=n_m is not None,
            num_warps=warps,
        )
    return error_NOB


@triton.jit
def _sweep_block(
    weight,
    upper,
    removed,
    error,
    outputs,
    inputs,
    start,
    width,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    KEEP: tl.constexpr,
    OF: tl.constexpr,
    CHOOSE: tl.constexpr,
):
    problem = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    known = column < width
    inside = (row < outputs) & known
    place = (problem * outputs + row) * inputs + start + column
    u = upper + (problem * inputs + start) * inputs + start  # the corner of the block's triangle
    w = tl.load(weight + place, mask=inside, other=0.0)
    gone = tl.load(removed + place, mask=inside, other=0) != 0
    if CHOOSE:
        diagonal = tl.load(u + column * (inputs + 1), mask=known, other=1.0)
    errors = tl.zeros([ROWS, COLUMNS], tl.float32)
    ahead = tl.load(u + column, mask=known, other=0.0)  # a row of U, before it is needed
    pivot_ahead = tl.load(u)
    for first in range(0, width, OF):
        if CHOOSE:
            score = tl.div_rn(w, tl.broadcast_to(diagonal, (ROWS, COLUMNS)))
            score = score * score
            before = tl.zeros([ROWS, COLUMNS], tl.int32)  # how many of its group would go rather than a weight
            for other in range(first, first + OF):
                its = tl.sum(tl.where(column == other, score, 0.0), 1)[:, None]
                before += ((its < score) | ((its == score) & (other < column))).to(tl.int32)
            gone = gone | ((column >= first) & (column < first + OF) & (before < OF - KEEP))
        for j in range(first, first + OF):
            row_of_u, pivot = ahead, pivot_ahead
            more = j + 1 < width
            ahead = tl.load(u + (j + 1) * inputs + column, mask=known & more, other=0.0)
            pivot_ahead = tl.load(u + (j + 1) * (inputs + 1), mask=more, other=1.0)
            here = column == j
            value = tl.sum(tl.where(here & gone, w, 0.0), 1)
            e = tl.div_rn(value, tl.broadcast_to(pivot, (ROWS,)))[:, None]
            w -= e * row_of_u
            errors = tl.where(here, e, errors)
    tl.store(weight + place, tl.where(gone, 0.0, w), mask=inside)
    tl.store(error + (problem * outputs + row) * width + column, errors, mask=inside)
    if CHOOSE:
        tl.store(removed + place, gone.to(tl.uint8), mask=inside)


def lowest_of_each(score_SK: Tensor, zeros_S: Tensor) -> Tensor:
    """Marks in every set of scores as many of the lowest as are asked for; ties go to the lower index.

    What `sparsity.lowest` does for one, without waiting for the GPU.

    Args:
        score_SK: contiguous, float32, at least 0. Not changed.
        zeros_S: how many of each, int64.

    Returns:
        Boolean S x K, True where one was chosen.
    """
    sets, scores = score_SK.shape
    bits_SK = score_SK.view(torch.int32)  # as integers, they are in the order of the numbers
    passes = 32 // DIGIT
    below_PSD = torch.zeros(passes, sets, 2**DIGIT, dtype=torch.int64, device=score_SK.device)
    prefix_PS = torch.empty(passes, sets, dtype=torch.int64, device=score_SK.device)
    programs = max(1, min(scores // (CHUNK * CHUNKS), MOST_PROGRAMS))
    kernel: Any = _count_below
    with torch.cuda.device_of(score_SK):
        for turn in range(passes):
            kernel[programs, sets](bits_SK, zeros_S, below_PSD, prefix_PS, scores, sets, turn, DIGIT=DIGIT, CHUNK=CHUNK)
    digit_S1 = (below_PSD[-1, :, 1:] < zeros_S[:, None]).sum(1, keepdim=True)
    threshold_S1 = (prefix_PS[-1, :, None] | digit_S1).int()
    spare_S1 = zeros_S[:, None] - below_PSD[-1].gather(1, digit_S1)  # of those at the threshold
    ties_SK = bits_SK == threshold_S1
    # one sum over all sets, as PyTorch shares a single long one among all parts of a GPU, but not several
    rank_SK = ties_SK.view(-1).cumsum(0, dtype=torch.int32).view_as(ties_SK)
    before_S1 = rank_SK[:, :1] - ties_SK[:, :1].int()
    return (bits_SK < threshold_S1) | (ties_SK & (rank_SK <= before_S1 + spare_S1))


@triton.jit(do_not_specialize=["turn", "sets"])
def _count_below(
    bits,
    zeros,
    below,
    prefixes,
    scores,
    sets,
    turn,
    DIGIT: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """For every next digit of the threshold, the number of scores below it; first, the digit that was counted last."""
    own = tl.program_id(1)
    digit = tl.arange(0, 2**DIGIT)
    last = tl.maximum(turn - 1, 0)
    counted = tl.load(below + (last * sets + own) * 2**DIGIT + digit)
    # the threshold is at least a number that fewer than `zeros` are below
    found = tl.sum(((digit > 0) & (counted < tl.load(zeros + own))).to(tl.int64), 0)
    prefix = tl.load(prefixes + last * sets + own) | (found << (32 - DIGIT * turn))
    prefix = tl.where(turn == 0, 0, prefix)
    if tl.program_id(0) == 0:
        tl.store(prefixes + turn * sets + own, prefix)
    candidate = prefix + (digit.to(tl.int64) << (32 - DIGIT * (turn + 1)))
    candidate = tl.minimum(candidate, 2**31 - 1).to(tl.int32)
    count = tl.zeros([CHUNK, 2**DIGIT], tl.int32)
    for first in range(tl.program_id(0) * CHUNK, scores, tl.num_programs(0) * CHUNK):
        place = first + tl.arange(0, CHUNK)
        value = tl.load(bits + own.to(tl.int64) * scores + place, mask=place < scores, other=2**31 - 1)
        count += (value[:, None] < candidate[None, :]).to(tl.int32)
    tl.atomic_add(below + (turn * sets + own) * 2**DIGIT + digit, tl.sum(count, 0).to(tl.int64))


def lowest_of_groups(score_NOI: Tensor, keep: int, of: int) -> Tensor:
    """Marks all but the `keep` highest of every `of` consecutive inputs, as `sparsity.lowest_of_groups` does.

    Args:
        score_NOI: contiguous, with I a multiple of `of`. Not changed.
        keep: N of N:M.
        of: M of N:M.

    Returns:
        Boolean N x O x I, True where one was chosen.
    """
    chosen_NOI = torch.empty_like(score_NOI, dtype=torch.bool)
    size = triton.next_power_of_2(of)
    groups = max(1, PAIRS // size**2)
    kernel: Any = _lowest_of_groups
    with torch.cuda.device_of(score_NOI):
        kernel[(triton.cdiv(score_NOI.numel() // of, groups),)](
            score_NOI, chosen_NOI.view(torch.uint8), score_NOI.numel() // of, KEEP=keep, OF=of, GROUPS=groups, SIZE=size
        )
    return chosen_NOI


@triton.jit
def _lowest_of_groups(
    score,
    chosen,
    count,
    KEEP: tl.constexpr,
    OF: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)[:, None]
    member = tl.arange(0, SIZE)[None, :]
    inside = (group < count) & (member < OF)
    place = group * OF + member
    value = tl.load(score + place, mask=inside, other=float("inf"))  # what is outside of a group is not below any
    own, other = value[:, :, None], value[:, None, :]
    earlier = member[:, None, :] < member[:, :, None]
    before = tl.sum(((other < own) | ((other == own) & earlier)).to(tl.int32), 2)
    tl.store(chosen + place, (before < OF - KEEP).to(tl.uint8), mask=inside)
