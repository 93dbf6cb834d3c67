"""Triton kernels for single inputs that leave on a GPU: one chooses the cheapest of each problem, one downdates for it.

Imported only where tensors lie on a GPU and Triton is there. `greedy.Search` does the same in PyTorch, and is the
reference. All numbers are float64. No size is compiled in but S: in a CUDA graph, kernels are recorded that have run.
"""

# Shapes: P problems, S streams of each, N = P S; G groups of one input each, C inputs left, those of the groups first;
# B rows of a panel, R of them at a time; T groups or columns of a tile. An axis of 2: of Hinv and M, or of U and V.

# pyright: reportCallIssue=false, reportArgumentType=false, reportInvalidTypeForm=false
# (of a kernel: it is launched with more than its arguments, and its annotations are triton's)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

GROUPS = 4096
"""That the program of a problem looks at together."""
CHOOSING_WARPS = 16
"""Of that program."""
ROWS = 32
"""Of U and V, that a program takes away together."""
COLUMNS = 64
"""Of Hinv and M, that a program brings up to date."""
DOWNDATING_WARPS = 8
"""Of that program."""


def choose(pivots_N2G: Tensor, out_PG: Tensor, energy_PS: Tensor) -> tuple[Tensor, Tensor]:
    """Finds the cheapest group of each problem by the sum of what it costs each stream, and marks it as gone.

    Ties go to the lower place. A cost that is NaN counts as the lowest. Where nothing is left that has a finite score,
    all costs returned are infinite.

    Args:
        pivots_N2G: Hinv_jj and M_jj / 2, contiguous.
        out_PG: boolean, which groups are gone, contiguous. Changed.
        energy_PS: what costs are relative to, contiguous; of no effect where S is 1.

    Returns:
        The place of each problem's group, P x 1, and what it costs each stream, P x S x 1.
    """
    problems, streams = energy_PS.shape
    groups = out_PG.shape[1]
    assert all(x.is_contiguous() for x in (pivots_N2G, out_PG, energy_PS))
    place_P1 = torch.empty(problems, 1, dtype=torch.int64, device=out_PG.device)
    costs_PS1 = torch.empty(problems, streams, 1, dtype=torch.float64, device=out_PG.device)
    with torch.cuda.device_of(out_PG):
        _choose[(problems,)](
            *(pivots_N2G, out_PG.view(torch.uint8), energy_PS, place_P1, costs_PS1, groups),
            S=streams,
            T=GROUPS,
            num_warps=CHOOSING_WARPS,
        )
    return place_P1, costs_PS1


@triton.jit(do_not_specialize=["groups"])
def _choose(pivots, out, energies, places, costs, groups, S: tl.constexpr, T: tl.constexpr):
    problem = tl.program_id(0).to(tl.int64)
    pivots += problem * S * 2 * groups
    out += problem * groups
    least_T = tl.full((T,), float("inf"), tl.float64)
    place_T = tl.arange(0, T)
    for start in range(0, groups, T):
        group_T = start + tl.arange(0, T)
        inside_T = group_T < groups
        out_T = tl.load(out + group_T, mask=inside_T, other=1)
        score_T = tl.zeros((T,), tl.float64)
        for stream in tl.static_range(S):
            inverse_T = tl.load(pivots + 2 * stream * groups + group_T, mask=inside_T, other=1.0)
            gram_T = tl.load(pivots + (2 * stream + 1) * groups + group_T, mask=inside_T, other=0.0)
            cost_T = _cost(inverse_T, gram_T)
            score_T += cost_T if S == 1 else cost_T / tl.load(energies + problem * S + stream)
        score_T = tl.where(score_T >= 0, score_T, float("-inf"))  # NaN is not hidden
        score_T = tl.where(out_T == 0, score_T, float("inf"))
        lower_T = score_T < least_T
        least_T = tl.where(lower_T, score_T, least_T)
        place_T = tl.where(lower_T, group_T, place_T)
    least = tl.min(least_T, axis=0)
    place = tl.min(tl.where(least_T == least, place_T, groups), axis=0)
    for stream in tl.static_range(S):
        inverse = tl.load(pivots + 2 * stream * groups + place)
        gram = tl.load(pivots + (2 * stream + 1) * groups + place)
        cost = tl.where(least == float("inf"), least, _cost(inverse, gram))
        tl.store(costs + problem * S + stream, cost)
    tl.store(places + problem, place.to(tl.int64))
    tl.store(out + place, 1)  # all have been read


@triton.jit
def _cost(inverse, half_gram):
    cost = 2 * half_gram / inverse
    return tl.where(cost < 0, 0.0, cost)  # NaN stays


def downdate(state_N2CC: Tensor, panel_N2BC: Tensor, pivots_N2G: Tensor, place_P1: Tensor, rows: int) -> None:
    """Writes the next row of U and V, for the loss of one input of each problem, and downdates the pivots by it.

    Args:
        state_N2CC: Hinv and M before the panel, contiguous.
        panel_N2BC: U and V, contiguous. Row `rows` is written.
        pivots_N2G: Hinv_jj and M_jj / 2 as they are now, contiguous. Changed.
        place_P1: which input leaves, contiguous.
        rows: in use, less than B.
    """
    count, _, depth, size = panel_N2BC.shape
    assert all(x.is_contiguous() for x in (state_N2CC, panel_N2BC, pivots_N2G, place_P1))
    with torch.cuda.device_of(state_N2CC):
        _downdate[(triton.cdiv(size, COLUMNS), count)](
            *(state_N2CC, panel_N2BC, pivots_N2G, place_P1, rows, depth, size, pivots_N2G.shape[2]),
            S=count // len(place_P1),
            R=ROWS,
            T=COLUMNS,
            num_warps=DOWNDATING_WARPS,
        )


@triton.jit(do_not_specialize=["rows", "depth", "size", "groups"])
def _downdate(
    state, panel, pivots, places, rows, depth, size, groups, S: tl.constexpr, R: tl.constexpr, T: tl.constexpr
):
    """Reads what no program writes, but for the pivots of its own columns."""
    n = tl.program_id(1).to(tl.int64)
    gone = tl.load(places + n // S)
    column_T = tl.program_id(0) * T + tl.arange(0, T)
    inside_T = column_T < size
    grouped_T = column_T < groups
    row_of_inverse = state + (2 * n * size + gone) * size
    row_of_gram = state + ((2 * n + 1) * size + gone) * size
    u = panel + 2 * n * depth * size
    v = panel + (2 * n + 1) * depth * size
    pivot_T = pivots + 2 * n * groups + column_T
    inverse_T = tl.load(row_of_inverse + column_T, mask=inside_T, other=0.0)
    gram_T = tl.load(row_of_gram + column_T, mask=inside_T, other=0.0)
    inverse_pivot_T = tl.load(pivot_T, mask=grouped_T, other=0.0)
    gram_pivot_T = tl.load(pivot_T + groups, mask=grouped_T, other=0.0)
    inverse = tl.load(row_of_inverse + gone)
    gram = tl.load(row_of_gram + gone)
    # what the panel takes away: of the two rows, and of their entries at what is gone, which every program needs
    inverse_RT = tl.zeros((R, T), tl.float64)
    gram_RT = tl.zeros((R, T), tl.float64)
    inverse_R = tl.zeros((R,), tl.float64)
    gram_R = tl.zeros((R,), tl.float64)
    for start in range(0, rows, R):
        row_R = start + tl.arange(0, R)
        used_R = row_R < rows
        used_RT = used_R[:, None] & inside_T[None, :]
        at_R = row_R * size
        at_RT = at_R[:, None] + column_T[None, :]
        ours_R = tl.load(u + at_R + gone, mask=used_R, other=0.0)
        theirs_R = tl.load(v + at_R + gone, mask=used_R, other=0.0)
        u_RT = tl.load(u + at_RT, mask=used_RT, other=0.0)
        v_RT = tl.load(v + at_RT, mask=used_RT, other=0.0)
        inverse_RT += ours_R[:, None] * u_RT
        gram_RT += theirs_R[:, None] * u_RT + ours_R[:, None] * v_RT
        inverse_R += ours_R * ours_R
        gram_R += 2 * ours_R * theirs_R
    inverse -= tl.sum(inverse_R, axis=0)
    gram -= tl.sum(gram_R, axis=0)
    inverse_T -= tl.sum(inverse_RT, axis=0)
    gram_T -= tl.sum(gram_RT, axis=0) + gram / inverse / 2 * inverse_T
    scale = 1 / tl.sqrt(inverse)
    u_T, v_T = inverse_T * scale, gram_T * scale
    tl.store(u + rows * size + column_T, u_T, mask=inside_T)
    tl.store(v + rows * size + column_T, v_T, mask=inside_T)
    tl.store(pivot_T, inverse_pivot_T - u_T * u_T, mask=grouped_T)
    tl.store(pivot_T + groups, gram_pivot_T - u_T * v_T, mask=grouped_T)
