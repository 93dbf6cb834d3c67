"""Problems of equal shape solved at once on a GPU, which one of them does not fill: factors, sweeps.

Every problem has a Hessian of its own, and the layers that read one input, such as q, k and v, as its rows.
"""

# Shapes: N problems of O outputs and I inputs; S layers of K scores in a block of B columns.

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from itertools import groupby

import torch
from torch import Tensor

from compressor.plugin import Elementwise
from compressor_obs_diff.granularities import NM, Unstructured
from compressor_obs_diff.solver import Factor, factorise
from compressor_obs_diff.triangular import inverse_factor

MOST_BYTES = 2**33
"""That the problems of a batch take while they are solved, at the most."""
FREE = 0.5
"""Nor do they take more than this share of the GPU memory that is free."""


def possible(granularity: Elementwise, device: torch.device) -> bool:
    """Whether there is a kernel for that; any other granularity has its masks asked for block by block."""
    return type(granularity) in (Unstructured, NM) and device.type == "cuda" and works(device)


@cache
def works(device: torch.device) -> bool:
    """Whether Triton is there and can compile, for which it needs a C compiler and Python's headers."""
    if find_spec("triton") is None:
        return False
    try:
        from compressor_obs_diff import sweep_kernel

        sweep_kernel.trial(device)
    except (ImportError, OSError, RuntimeError, subprocess.CalledProcessError):
        return False
    return True


def most(outputs: int, inputs: int, device: torch.device) -> int:
    """How many problems are solved at once, by the memory that they need."""
    free = MOST_BYTES
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free = FREE * (torch.cuda.mem_get_info(device)[0] + cached)
    one = 4 * 3 * inputs * (inputs + outputs)  # at most three copies in float32, first of the Hessian
    return max(1, int(min(MOST_BYTES, free) / one))


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
    for damped_II, hessian_II in zip(damped_NII, hessians, strict=True):
        damped_II.copy_(hessian_II.flip(0, 1))
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

    problems, _, inputs = weight_NOI.shape
    removed_NOI = torch.zeros_like(weight_NOI, dtype=torch.bool)
    diagonal_NI = upper_NII.diagonal(dim1=1, dim2=2)
    step = min(granularity.columns(block), inputs)
    block = max(block // step, 1) * step
    starts = range(0, inputs, block)
    stops = [min(start + block, inputs) for start in starts]
    n_m = (granularity.keep, granularity.of) if isinstance(granularity, NM) else None
    equal = [] if n_m else _equal(rows, granularity, sparsities, stops, weight_NOI.device)
    for turn, (start, stop) in enumerate(zip(starts, stops, strict=True)):
        for first, last, zeros_TS in equal:
            score_NOB = (weight_NOI[:, first:last, start:stop] / diagonal_NI[:, None, start:stop]).square_()
            score_SK = score_NOB.reshape(zeros_TS.shape[1], -1)
            chosen_SK = sweep_kernel.lowest_of_each(score_SK, zeros_TS[turn])
            removed_NOI[:, first:last, start:stop] = chosen_SK.view(problems, last - first, stop - start)
        error_NOB = sweep_kernel.sweep_block(weight_NOI, upper_NII, removed_NOI, start, stop - start, n_m)
        if stop < inputs:
            weight_NOI[:, :, stop:].baddbmm_(error_NOB, upper_NII[:, start:stop, stop:], alpha=-1)
    return removed_NOI


def _equal(
    rows: Sequence[int],
    granularity: Elementwise,
    sparsities: Sequence[Sequence[float | None]],
    stops: Sequence[int],
    device: torch.device,
) -> list[tuple[int, int, Tensor]]:
    """Runs of layers with as many rows: the first row, the last, and how many weights of each leave in every block."""
    found, first = [], 0
    for outputs, run in groupby(range(len(rows)), key=lambda layer: rows[layer]):
        layers = list(run)
        shares = [problem[layer] for problem in sparsities for layer in layers]
        until_TS = torch.tensor([[granularity.zeros(outputs, stop, share) for share in shares] for stop in stops])
        last = first + outputs * len(layers)
        found.append((first, last, until_TS.diff(dim=0, prepend=torch.zeros(1, len(shares)).long()).to(device)))
        first = last
    return found
