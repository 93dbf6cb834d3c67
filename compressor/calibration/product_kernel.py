"""Sums of half-precision inputs on a GPU by two Triton kernels: one reads them, one multiplies half of x^T x.

Tiles of the product are fetched by the copy engine where there is one (Hopper). It leaves no tokens out: should any not
be finite, the tiles are fetched row by row. Tokens that do not all count the same are copied first, each times the root
of what it counts.

Nothing is added up in an order that could differ from run to run: the same inputs give the same bytes.
"""

# Shapes: T tokens, K with the padding, P programs of R tokens that read, C columns of a program, I inputs;
#         M x N a tile of the product, D tokens of it at a time, S stretches of the tokens.

# pyright: reportCallIssue=false, reportArgumentType=false, reportInvalidTypeForm=false
# (of a kernel: it is launched with more than its arguments, and its annotations are triton's)

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

PADDING = 128
"""Tokens are read in multiples of this many, so that every step of a kernel is whole."""

STRETCH = 1024
"""The fewest tokens that are multiplied by themselves where the tiles of a product are too few for a GPU."""

COLUMNS = 64
"""Of the sums, that one program adds up."""

READ_COLUMNS = 1024
"""That a program reads at a time: with fewer, it waits for memory."""


@dataclass(frozen=True)
class Tiling:
    """How a product is cut up.

    Attributes:
        tall: rows of a tile.
        wide: columns of a tile.
        depth: tokens multiplied at a time; divides `PADDING`.
        group: rows of tiles that are gone through side by side, for the cache.
        warps: that share a tile.
        stages: of the pipeline that loads what is multiplied next.
    """

    tall: int
    wide: int
    depth: int
    group: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Reading:
    """What the first kernel found.

    Attributes:
        x_TI: what was read; if tokens have roots, a copy times these, of which those that are not finite are zeros.
        copied: whether it is that copy.
        row_K: the rows of `x_TI`; -1 for those that are not finite and for the padding.
        bad_P: how many of each program's tokens were not finite.
        total_PI: sum of each program's finite tokens, float32, each counted as its root says.
        squares_PI: of their squares; None if they were not asked for.
        counted_P: what each program's finite tokens count together, float32; None where each counts 1.
    """

    x_TI: Tensor
    copied: bool
    row_K: Tensor
    bad_P: Tensor
    total_PI: Tensor | None
    squares_PI: Tensor | None
    counted_P: Tensor | None


@dataclass(frozen=True)
class Sums:
    """What a reading is added to.

    Attributes:
        tokens: int64, counts those that were summed.
        skipped: int64, counts those that were not finite.
        weight: float64, sum of the weights; None where there is none.
        total_I: float32, weighted sum of the tokens; None likewise.
        squares_I: float32, of their squares; None likewise.
    """

    tokens: Tensor
    skipped: Tensor
    weight: Tensor | None = None
    total_I: Tensor | None = None
    squares_I: Tensor | None = None


def read(x_TI: Tensor, total: bool, squares: bool, root_T: Tensor | None = None) -> Reading:
    """Finds the tokens that are not finite, and sums the others of each program, in one pass.

    Args:
        x_TI: float16 or bfloat16; not changed.
        total: whether to sum the tokens.
        squares: whether to sum their squares, with `total` only.
        root_T: the root of what each token counts, float32; each counts 1 if None.
    """
    assert total or not squares
    x_TI = x_TI if x_TI.stride(1) == 1 and x_TI.stride(0) >= x_TI.shape[1] else x_TI.contiguous()
    tokens, inputs = x_TI.shape
    padded = -(-tokens // PADDING) * PADDING
    rows = 8 if padded <= 4096 else 16
    programs, unit, device = padded // rows, _unit(x_TI), x_TI.device
    copied = tokens > 0 and root_T is not None
    found = Reading(
        torch.empty(tokens, inputs, dtype=x_TI.dtype, device=device) if copied else x_TI,
        copied,
        torch.empty(padded, dtype=torch.int32, device=device),
        torch.empty(programs, dtype=torch.int32, device=device),
        torch.empty(programs, inputs, device=device) if total else None,
        torch.empty(programs, inputs, device=device) if squares else None,
        torch.empty(programs, device=device) if root_T is not None else None,
    )
    if programs:
        with torch.cuda.device_of(x_TI):
            _read[(programs,)](
                *(x_TI, x_TI.stride(0) // unit, inputs // unit, root_T, tokens, found.x_TI if copied else None),
                *(found.row_K, found.bad_P, found.total_PI, found.squares_PI, found.counted_P),
                UNIT=unit,
                R=rows,
                C=READ_COLUMNS,
                num_warps=4,
            )
    return found


def settle(found: Reading, sums: Sums, weight: float, live: Tensor | None = None) -> None:
    """Counts what was read and adds up what was summed, weighted as in `multiply`."""
    programs = 1 if found.total_PI is None else -(-found.x_TI.shape[1] // COLUMNS)
    with torch.cuda.device_of(found.x_TI):
        _settle_alone[(programs,)](*_arguments(found, sums), weight, live, C=COLUMNS)


def multiply(
    second_II: Tensor,
    found: Reading,
    weight: float,
    sums: Sums | None = None,
    live: Tensor | None = None,
    first: int = 0,
    tiling: Tiling | None = None,
    stretches: int | None = None,
) -> None:
    """Adds weight x^T x on and below the diagonal; what lies above it is left undefined.

    Args:
        second_II: float32 and contiguous.
        found: the tokens.
        weight: the factor of the product.
        sums: does what `settle` does for these, without a launch of its own.
        live: another factor, float64 without dimensions, which the GPU reads whenever the product is replayed.
        first: the input that is the product's first, where it is of some of the inputs only.
        tiling: None for the GPU's.
        stretches: into how many the tokens are cut, to be added in order; None for what fills the GPU.
    """
    inputs, padded = len(second_II), len(found.row_K)
    assert second_II.is_contiguous()
    x_TI = found.x_TI if inputs == found.x_TI.shape[1] else found.x_TI[:, first : first + inputs]
    device, unit = x_TI.device, _unit(x_TI)
    engine = len(x_TI) > 0 and unit == ENGINE and x_TI.data_ptr() % 16 == 0 and has_engine(device)
    tiling = tiling or tiling_of(device)
    stretches = stretches or stretches_of(inputs, padded, tiling, device)
    each = -(-padded // (stretches * PADDING)) * PADDING
    tiles = -(-inputs // tiling.tall) * -(-inputs // tiling.wide)
    further = 0 if sums is None else -(-inputs // COLUMNS)
    left = right = None
    if engine:
        shape, strides = list(x_TI.shape), [x_TI.stride(0), 1]
        left = TensorDescriptor(x_TI, shape, strides, [tiling.depth, tiling.tall])
        right = TensorDescriptor(x_TI, shape, strides, [tiling.depth, tiling.wide])
    with torch.cuda.device_of(x_TI):
        out = second_II if stretches == 1 else torch.empty(stretches, inputs, inputs, device=device)
        _multiply[(tiles + further, stretches)](
            *(left, right, x_TI, x_TI.stride(0) // unit, inputs // unit, found.row_K, padded, each, out),
            *(*_arguments(found, sums), weight, live),
            ADD=stretches == 1,
            COPIED=found.copied,
            UNIT=unit,
            M=tiling.tall,
            N=tiling.wide,
            D=tiling.depth,
            GROUP=tiling.group,
            C=COLUMNS,
            num_warps=tiling.warps,
            num_stages=tiling.stages,
        )
        if stretches > 1:
            blocks = -(-inputs // 64)
            _add[(blocks, blocks)](second_II, out, stretches, inputs, weight, live, M=64)


@cache
def has_engine(device: torch.device) -> bool:
    """Whether that GPU has an engine that copies tiles of matrices: Hopper and its successor for servers."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] in (9, 10)


def tiling_of(device: torch.device) -> Tiling:
    """The tiles of a product: small enough for the shared memory of that GPU."""
    return SMALL if device.type == "cuda" and not has_engine(device) else LARGE


LARGE = Tiling(128, 128, 64, 8, 8, 4)
"""On Hopper, for every width: wider tiles are no faster for wide inputs, and too few for narrow ones."""

SMALL = Tiling(128, 128, 32, 8, 8, 5)
"""On other GPUs, of which some have less than half of that memory."""

ENGINE = 8
"""Elements of which the rows and the first one must lie multiples apart, for the engine: 16 bytes."""


@cache
def stretches_of(inputs: int, padded: int, tiling: Tiling, device: torch.device) -> int:
    """Into how many stretches so many tokens are cut: enough to keep a GPU busy, but none of them short."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    tall, wide = -(-inputs // tiling.tall), -(-inputs // tiling.wide)
    return max(1, min(2 * processors // (tall * (wide + 1)), padded // STRETCH))


def _unit(x_TI: Tensor) -> int:
    """What the width and the stride are multiples of, up to 8 elements: 16 bytes can then be loaded at once."""
    together = x_TI.shape[1] | x_TI.stride(0) | 8
    return together & -together


def _arguments(found: Reading, sums: Sums | None) -> tuple[Tensor | int | None, ...]:
    into = None if sums is None else (sums.tokens, sums.skipped, sums.weight, sums.total_I, sums.squares_I)
    return (
        *(found.bad_P, len(found.bad_P), len(found.x_TI), found.counted_P),
        *(found.total_PI, found.squares_PI, found.x_TI.shape[1]),
        *(into or (None,) * 5),
    )


@triton.jit(do_not_specialize=["stride", "width", "length"])
def _read(
    x, stride, width, roots, length, copy, rows, bads, totals, squares, counted,
    UNIT: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    inputs = width * UNIT
    token_R = program * R + tl.arange(0, R)
    there_R = token_R < length
    root_R = tl.full((R,), 1.0, tl.float32)
    if roots is not None:
        root_R = tl.load(roots + token_R, mask=there_R, other=0)
    x_R = x + token_R.to(tl.int64) * (stride * UNIT)
    bad_RC = tl.zeros((R, C), tl.int32)
    for start in range(0, inputs, C):
        column_C = start + tl.arange(0, C)
        inside_RC = there_R[:, None] & (column_C < inputs)
        half_RC = tl.load(x_R[:, None] + column_C, mask=inside_RC, other=0)
        bad_RC |= tl.where(tl.abs(half_RC.to(tl.float32)) < float("inf"), 0, 1)
        _keep(half_RC, root_R, roots, inside_RC, program, token_R, column_C, inputs, copy, totals, squares)
    bad_R = tl.max(bad_RC, axis=1)
    bad = tl.sum(bad_R)
    tl.store(bads + program, bad)
    good_R = there_R & (bad_R == 0)
    tl.store(rows + token_R, tl.where(good_R, token_R, -1))
    if counted is not None:
        tl.store(counted + program, tl.sum(tl.where(good_R, root_R * root_R, 0)))
    if bad > 0:  # rare: once more, without them
        for start in range(0, inputs, C):
            column_C = start + tl.arange(0, C)
            half_RC = tl.load(x_R[:, None] + column_C, mask=good_R[:, None] & (column_C < inputs), other=0)
            inside_RC = there_R[:, None] & (column_C < inputs)
            _keep(half_RC, root_R, roots, inside_RC, program, token_R, column_C, inputs, copy, totals, squares)


@triton.jit
def _keep(half_RC, root_R, roots, inside_RC, program, token_R, column_C, inputs, copy, totals, squares):
    """Copies tokens times their roots, and sums them as what was copied."""
    if roots is not None:
        half_RC = (half_RC.to(tl.float32) * root_R[:, None]).to(half_RC.dtype)
    if copy is not None:
        tl.store(copy + token_R[:, None].to(tl.int64) * inputs + column_C, half_RC, mask=inside_RC)
    x_RC = half_RC.to(tl.float32)
    at_C = program.to(tl.int64) * inputs + column_C
    if totals is not None:
        tl.store(totals + at_C, tl.sum(x_RC * root_R[:, None], axis=0), mask=column_C < inputs)
    if squares is not None:
        tl.store(squares + at_C, tl.sum(x_RC * x_RC, axis=0), mask=column_C < inputs)


@triton.jit(do_not_specialize=["programs", "length", "inputs"])
def _settle_alone(
    bads, programs, length, counted, totals, squares, inputs,
    tokens, skipped, weight_sum, total, square_sum, weight: tl.float64, live,
    C: tl.constexpr,
):  # fmt: skip
    _settle(
        tl.program_id(0), bads, programs, length, counted, totals, squares, inputs,
        tokens, skipped, weight_sum, total, square_sum, _factor(weight, live), C,
    )  # fmt: skip


@triton.jit
def _settle(
    part, bads, programs, length, counted, totals, squares, inputs,
    tokens, skipped, weight_sum, total, square_sum, factor,
    C: tl.constexpr,
):  # fmt: skip
    if part == 0:
        bad = _count(bads, programs).to(tl.int64)
        good = length - bad
        tl.store(tokens, tl.load(tokens) + good)
        tl.store(skipped, tl.load(skipped) + bad)
        if weight_sum is not None:
            count = good.to(tl.float64) if counted is None else _counted(counted, programs)
            tl.store(weight_sum, tl.load(weight_sum) + factor * count)
    column_C = part * C + tl.arange(0, C)
    if total is not None:
        _add_sums(total, totals, programs, column_C, inputs, factor, C)
    if square_sum is not None:
        _add_sums(square_sum, squares, programs, column_C, inputs, factor, C)


@triton.jit
def _factor(weight, live):
    factor = tl.full((), weight, tl.float64)
    if live is not None:
        factor *= tl.load(live)
    return factor


@triton.jit
def _count(bads, programs):
    bad_P = tl.zeros((256,), tl.int32)
    for start in range(0, programs, 256):
        program_P = start + tl.arange(0, 256)
        bad_P += tl.load(bads + program_P, mask=program_P < programs, other=0)
    return tl.sum(bad_P)


@triton.jit
def _counted(counted, programs):
    sum_P = tl.zeros((256,), tl.float64)
    for start in range(0, programs, 256):
        program_P = start + tl.arange(0, 256)
        sum_P += tl.load(counted + program_P, mask=program_P < programs, other=0).to(tl.float64)
    return tl.sum(sum_P)


@triton.jit
def _add_sums(sums, parts, programs, column_C, inputs, factor, C: tl.constexpr):
    sum_PC = tl.zeros((64, C), tl.float32)
    for start in range(0, programs, 64):
        program_P = start + tl.arange(0, 64)
        inside = (program_P < programs)[:, None] & (column_C < inputs)
        sum_PC += tl.load(parts + program_P[:, None].to(tl.int64) * inputs + column_C, mask=inside, other=0)
    old_C = tl.load(sums + column_C, mask=column_C < inputs)
    tl.store(sums + column_C, old_C + factor.to(tl.float32) * tl.sum(sum_PC, axis=0), mask=column_C < inputs)


@triton.jit(do_not_specialize=["stride", "width", "padded", "each", "programs", "length", "inputs"])
def _multiply(
    left, right, x, stride, width, rows, padded, each, second,
    bads, programs, length, counted, totals, squares, inputs,
    tokens, skipped, weight_sum, total, square_sum, weight: tl.float64, live,
    ADD: tl.constexpr, COPIED: tl.constexpr, UNIT: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, GROUP: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    program, stretch = tl.program_id(0), tl.program_id(1)
    side = width * UNIT
    down, across = tl.cdiv(side, M), tl.cdiv(side, N)
    if program < down * across:
        # column by column through GROUP rows of tiles, so that those that run at once share what they load
        before = program // (GROUP * across) * GROUP
        high = tl.minimum(down - before, GROUP)
        tall = before + program % (GROUP * across) % high
        wide = program % (GROUP * across) // high
        if wide * N < tall * M + M:  # not all above the diagonal
            first, last = stretch * each, tl.minimum(stretch * each + each, padded)
            row_M, column_N = tall * M + tl.arange(0, M), wide * N + tl.arange(0, N)
            if left is None:
                out_MN = _product(x, stride * UNIT, rows, first, last, side, row_M, column_N, M, N, D, None)
            else:
                whole = True if COPIED else _count(bads, programs) == 0
                out_MN = tl.zeros((M, N), tl.float32)
                if whole:
                    for start in range(first, last, D):
                        left_DM, right_DN = left.load([start, tall * M]), right.load([start, wide * N])
                        out_MN = tl.dot(tl.trans(left_DM), right_DN, out_MN)
                else:  # without what would be in shared memory for loading ahead
                    out_MN = _product(x, stride * UNIT, rows, first, last, side, row_M, column_N, M, N, D, 1)
            inside = (row_M < side)[:, None] & (column_N < side)
            # one 64-bit number and 32-bit ones within the tile: registers are scarce
            at_MN = second + (tall * M).to(tl.int64) * side + (tl.arange(0, M)[:, None] * side + column_N)
            if ADD:  # once to each number: in no order that could differ, and nothing is fetched first
                tl.atomic_add(at_MN, _factor(weight, live).to(tl.float32) * out_MN, mask=inside, sem="relaxed")
            else:
                tl.store(at_MN + stretch.to(tl.int64) * side * side, out_MN, mask=inside)
    elif tokens is not None:
        if stretch == 0:
            _settle(
                program - down * across, bads, programs, length, counted, totals, squares, inputs,
                tokens, skipped, weight_sum, total, square_sum, _factor(weight, live), C,
            )  # fmt: skip


@triton.jit
def _product(
    x, stride, rows, first, last, side, row_M, column_N,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    out_MN = tl.zeros((M, N), tl.float32)
    for start in tl.range(first, last, D, num_stages=STAGES):
        token_D = tl.load(rows + start + tl.arange(0, D))
        good_D = token_D >= 0
        x_D = x + token_D.to(tl.int64) * stride
        left_DM = tl.load(x_D[:, None] + row_M, mask=good_D[:, None] & (row_M < side), other=0)
        right_DN = tl.load(x_D[:, None] + column_N, mask=good_D[:, None] & (column_N < side), other=0)
        out_MN = tl.dot(tl.trans(left_DM), right_DN, out_MN)
    return out_MN


@triton.jit(do_not_specialize=["stretches", "side"])
def _add(second, parts, stretches, side, weight: tl.float64, live, M: tl.constexpr):
    row_M, column_M = tl.program_id(0) * M + tl.arange(0, M), tl.program_id(1) * M + tl.arange(0, M)
    if tl.program_id(1) <= tl.program_id(0):
        inside = (row_M < side)[:, None] & (column_M <= row_M[:, None])  # the tiles above it were not made
        at_MM = row_M[:, None].to(tl.int64) * side + column_M
        sum_MM = tl.zeros((M, M), tl.float32)
        for _ in range(stretches):
            sum_MM += tl.load(parts + at_MM, mask=inside, other=0)
            parts += side.to(tl.int64) * side
        sum_MM = tl.load(second + at_MM, mask=inside) + _factor(weight, live).to(tl.float32) * sum_MM
        tl.store(second + at_MM, sum_MM, mask=inside)
