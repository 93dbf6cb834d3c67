"""Problems of equal shape solved at once on a GPU, which one of them does not fill: factors, sweeps, masks.

Every problem has a Hessian of its own, and the layers that read one input, such as q, k and v, as its rows.
"""

# Shapes: N problems of O outputs and I inputs; S layers of K scores in a block of B columns, T turns.

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import TypeVar

import torch
from torch import Tensor

from compressor.calibration import kernels
from compressor.plugin import Elementwise
from compressor_obs_diff.granularities import NM, Unstructured
from compressor_obs_diff.solver import Factor, factorise
from compressor_obs_diff.triangular import inverse_factor

T = TypeVar("T")

MOST_BYTES = 2**33
"""That the problems of a batch take while they are solved, at the most."""
FREE = 0.5
"""Nor do they take more than this share of the GPU memory that is free."""


def pays(device: torch.device) -> bool:
    """Whether problems of equal shape are solved at once: on a CPU there is nothing to fill."""
    return device.type == "cuda"


def possible(granularity: Elementwise, device: torch.device) -> bool:
    """Whether there is a kernel for that; any other granularity has its masks asked for layer by layer."""
    return type(granularity) in (Unstructured, NM) and kernels.usable(device)


def note(solver: str, granularity: Elementwise, device: torch.device) -> str | None:
    """A warning if weights will be chosen more slowly than a GPU can, or None."""
    if device.type != "cuda" or possible(granularity, device):
        return None
    slow = "columns are swept one by one" if solver == "obs" else "masks are chosen layer by layer"
    why = kernels.problem(device) or "they know only the granularities unstructured and n_m"
    return f"{slow}, which costs a GPU many times as much as by kernels: {why}"


def most(needs: int, device: torch.device, room: int | None) -> int:
    """How many problems are solved at once; at least one.

    Args:
        needs: bytes that one of them takes.
        device: its moments'.
        room: the bytes that the recipe leaves for all of them together; None for no bound.
    """
    bounds = [MOST_BYTES]
    if device.type == "cuda":
        bounds.append(int(FREE * free_bytes(device)))
    if room is not None:
        bounds.append(room)
    return max(1, min(bounds) // needs)


def equal_batches(problems: list[T], most: Callable[[], int]) -> Iterator[list[T]]:
    """As many problems at a time as fit, in batches as equal as can be.

    Args:
        problems: in order; emptied.
        most: how many may be solved at once; asked before each batch, as the one before has freed memory.
    """
    while problems:
        size = -(-len(problems) // -(-len(problems) // most()))
        yield problems[:size]
        del problems[:size]


def free_bytes(device: torch.device) -> int:
    """Of a GPU's memory, with what torch keeps for later."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def factorise_batch(hessians: Sequence[Tensor], damping: float, names: Sequence[str]) -> tuple[Tensor, list[Factor]]:
    """Factorises the inverses of several Hessians at once, and those that need more damping by themselves.

    Args:
        hessians: of each problem, I x I, as for `factorise`. Not changed.
        damping: added to each diagonal, relative to its mean.
        names: a layer of each problem, for errors.

    Returns:
        U of all problems (N x I x I), and for each a `Factor` that looks at its own.

    Raises:
        CompressorError: as `factorise`.
    """
    mean_N = torch.stack([hessian_II.diagonal().mean() for hessian_II in hessians])
    damped_NII = torch.empty(len(hessians), *hessians[0].shape, device=mean_N.device)
    for place, hessian_II in enumerate(hessians):
        damped_NII[place] = hessian_II.flip(0, 1)
    damped_NII.diagonal(dim1=1, dim2=2).add_(damping * mean_N[:, None])
    inverse_NII, info_N = inverse_factor(damped_NII)
    del damped_NII
    # a sum is finite where all its terms are
    good_N = (info_N == 0) & inverse_NII.sum((1, 2)).isfinite() & mean_N.isfinite() & (mean_N > 0)
    upper_NII = inverse_NII.flip(1, 2)
    del inverse_NII
    factors = []
    for upper_II, hessian_II, name, good in zip(upper_NII, hessians, names, good_N.tolist(), strict=True):  # waits once
        factor = Factor(upper_II, damping, torch.float32)
        if not good:
            alone = factorise(hessian_II, damping, name)
            factor = replace(alone, upper_II=upper_II.copy_(alone.upper_II))
        factors.append(factor)
    return upper_NII, factors


def sweep_batch(
    weight_NOI: Tensor,
    upper_NII: Tensor,
    rows: Sequence[int],
    granularity: Elementwise,
    sparsities: Sequence[Sequence[float | None]],
    block: int,
) -> Tensor:
    """Sweeps several problems at once, each as `sweep_together` would.

    Args:
        weight_NOI: the layers of each problem, one after the other, float32, contiguous. Becomes the new weights.
        upper_NII: U of each problem, float32, contiguous.
        rows: outputs of each layer of a problem, O together.
        granularity: one of which `possible` is true.
        sparsities: the share of weights to remove, where the granularity needs one, of each layer of each problem.
        block: columns updated at a time.

    Returns:
        The mask of what was removed (True), N x O x I.
    """
    from compressor_obs_diff import sweep_kernel

    inputs = weight_NOI.shape[2]
    removed_NOI = torch.zeros_like(weight_NOI, dtype=torch.bool)
    diagonal_NI = upper_NII.diagonal(dim1=1, dim2=2)
    step = min(granularity.columns(block), inputs)
    block = max(block // step, 1) * step
    starts = range(0, inputs, block)
    stops = [min(start + block, inputs) for start in starts]
    n_m = (granularity.keep, granularity.of) if isinstance(granularity, NM) else None

    def zeros(outputs: int, share: float | None, turn: int) -> int:
        until, before = (granularity.zeros(outputs, end, share) for end in (stops[turn], starts[turn]))
        return until - before

    equal = [] if n_m else _equal(rows, sparsities, zeros, len(stops), weight_NOI.device)
    for turn, (start, stop) in enumerate(zip(starts, stops, strict=True)):
        for first, last, zeros_TS in equal:
            score_NOB = (weight_NOI[:, first:last, start:stop] / diagonal_NI[:, None, start:stop]).square_()
            removed_NOI[:, first:last, start:stop] = _lowest(score_NOB, zeros_TS[turn])
        error_NOB = sweep_kernel.sweep_block(weight_NOI, upper_NII, removed_NOI, start, stop - start, n_m)
        if stop < inputs:
            weight_NOI[:, :, stop:].baddbmm_(error_NOB, upper_NII[:, start:stop, stop:], alpha=-1)
    return removed_NOI


def masks_of(
    granularity: Elementwise,
    rows: Sequence[int],
    sparsities: Sequence[Sequence[float | None]],
    shares: Sequence[float],
    inputs: int,
    device: torch.device,
) -> Callable[[Tensor, int], Tensor]:
    """What chooses the lowest of scores, of every layer of every problem for itself, in one turn after the other.

    Args:
        granularity: what is removed together.
        rows: outputs of each layer of a problem, O together.
        sparsities: the share of weights to remove, where the granularity needs one, of each layer of each problem.
        shares: the share of that in each turn.
        inputs: of all layers.
        device: of the scores.

    Returns:
        A function of scores (N x O x I, contiguous, at least 0) and the number of the turn.
    """

    def zeros(outputs: int, share: float | None, turn: int) -> int:
        return granularity.zeros(outputs, inputs, None if share is None else share * shares[turn])

    def one_by_one(score_NOI: Tensor, turn: int) -> Tensor:
        masks = [
            torch.cat(
                [
                    granularity.mask(score, zeros(len(score), share, turn))
                    for score, share in zip(score_OI.split(list(rows)), problem, strict=True)
                ]
            )
            for score_OI, problem in zip(score_NOI, sparsities, strict=True)
        ]
        return torch.stack(masks)

    if not possible(granularity, device):
        return one_by_one
    if isinstance(granularity, NM):
        from compressor_obs_diff import sweep_kernel

        keep, of = granularity.keep, granularity.of
        return lambda score_NOI, _: sweep_kernel.lowest_of_groups(score_NOI, keep, of)
    equal = _equal(rows, sparsities, zeros, len(shares), device)

    def at_once(score_NOI: Tensor, turn: int) -> Tensor:
        found = [_lowest(score_NOI[:, first:last], zeros_TS[turn]) for first, last, zeros_TS in equal]
        return found[0] if len(found) == 1 else torch.cat(found, dim=1)

    return at_once


def _lowest(score_NOB: Tensor, zeros_S: Tensor) -> Tensor:
    """Of layers that have as many rows, one after the other in every problem."""
    from compressor_obs_diff import sweep_kernel

    score_SK = score_NOB.reshape(len(zeros_S), -1).contiguous()
    return sweep_kernel.lowest_of_each(score_SK, zeros_S).view(score_NOB.shape)


def _equal(
    rows: Sequence[int],
    sparsities: Sequence[Sequence[float | None]],
    zeros: Callable[[int, float | None, int], int],
    turns: int,
    device: torch.device,
) -> list[tuple[int, int, Tensor]]:
    """Runs of layers with as many rows: the first row, the last, and how many weights of each leave in every turn."""
    found, first = [], 0
    for outputs, run in groupby(range(len(rows)), key=lambda layer: rows[layer]):
        layers = list(run)
        asked = [problem[layer] for problem in sparsities for layer in layers]
        last = first + outputs * len(layers)
        zeros_TS = torch.tensor([[zeros(outputs, share, turn) for share in asked] for turn in range(turns)])
        found.append((first, last, zeros_TS.to(device)))
        first = last
    return found
