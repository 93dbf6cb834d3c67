"""Solves the layers of one package: one factorisation for all layers that share an input."""

# Shapes: O outputs, I inputs.

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compressor.plugin import Elementwise, LayerResult
from compressor_obs_diff.least_squares import MOST_STEPS, fit
from compressor_obs_diff.metric import INDEPENDENT, metric_of
from compressor_obs_diff.solver import explain_damping, relative_error
from compressor_obs_diff.solvers import SOLVERS, Problem

if TYPE_CHECKING:
    from compressor.calibration import Group, Moments, Package
    from compressor.structure import Target
    from compressor_obs_diff import OBSDiff

COUPLED_STEPS = 50
"""Of the refit in the outputs' metric, whose rows depend on one another: ADMM leaves little to do."""
MOST_TOGETHER = 2**26
"""Weights that are swept at once: 256 MB a copy in float32. A layer that has more is swept alone."""
LEAST_SPREAD = 1e-4
"""Of the inputs about their mean, relative to their squares; below it, no bias absorbs the mean."""


@torch.no_grad()
def prune_package(
    options: OBSDiff, package: Package, moments: dict[str, Moments], zeros: Mapping[str, int] | None = None
) -> Iterator[LayerResult]:
    """Prunes every layer of a package in place, freeing each group's moments when its layers are done.

    Args:
        options: an elementwise granularity, objective, solver, refit, damping and block.
        package: the layers, grouped by the input they share.
        moments: by group; emptied.
        zeros: how many of each layer, by name; as many as `options.zeros` says if none.
    """
    for group in package.groups:
        start = time.perf_counter()
        gathered = moments.pop(group.name)
        for members in _together(options, problems_of(options, group, gathered)):
            counts = [options.zeros(target) if zeros is None else zeros[target.name] for target, *_ in members]
            solved = _solve(options, members, counts, gathered)
            seconds = time.perf_counter() - start
            rows = sum(target.outputs for target, *_ in members)
            for (target, problem, absorbed_I), count, (old_OI, new_OI, notes) in zip(
                members, counts, solved, strict=True
            ):
                start = time.perf_counter()
                weight, bias = target.module.weight, target.module.bias
                weight.copy_(new_OI)
                if bias is not None and absorbed_I is not None:
                    bias.copy_(bias.float() + (old_OI - weight.float()) @ absorbed_I)
                error = relative_error(old_OI, weight.float(), problem.second_II, gathered.second_II)
                yield LayerResult(
                    name=target.name,
                    error=error,
                    damping=problem.factor.damping,
                    seconds=seconds * target.outputs / rows + time.perf_counter() - start,
                    notes=notes,
                    zeros=count,
                )
            start = time.perf_counter()


Member = tuple["Target", Problem, Tensor | None]
"""A layer, its problem, and the mean of its inputs if its bias absorbs that."""


def _together(options: OBSDiff, members: Iterator[Member]) -> Iterator[list[Member]]:
    """Layers one after the other that are solved at once: the sweep takes all rows that share a factor, as q, k and v.

    ADMM takes each by itself, as the metrics of their outputs need memory.
    """
    if options.solver != "obs":
        yield from ([member] for member in members)
        return
    for _, found in groupby(list(members), key=lambda member: id(member[1])):
        together: list[Member] = []
        for member in found:
            if together and sum(target.module.weight.numel() for target, *_ in [*together, member]) > MOST_TOGETHER:
                yield together
                together = []
            together.append(member)
        yield together


def _solve(
    options: OBSDiff, members: Sequence[Member], counts: Sequence[int], gathered: Moments
) -> list[tuple[Tensor, Tensor, tuple[str, ...]]]:
    """For each layer the old weights in float32, the new ones, and what the user should know."""
    problem = members[0][1]
    notes = [explain_damping(problem.factor.damping, options.damping, problem.factor.dtype)] * len(members)
    metrics: list[Tensor | None] = [None] * len(members)
    if options.objective == "network":
        metrics = [metric_of(gathered.gradients.pop(target.name)) for target, *_ in members]
        notes = [
            note if metric is not None else (*note, INDEPENDENT) for note, metric in zip(notes, metrics, strict=True)
        ]
    old = [target.module.weight.detach().to(torch.float32, copy=True) for target, *_ in members]
    assert isinstance(options.granularity, Elementwise)
    shares = [
        count / weight_OI.numel() if options.granularity.needs_sparsity else None
        for count, weight_OI in zip(counts, old, strict=True)
    ]
    found = SOLVERS[options.solver](old, problem, shares, metrics)
    new = [new_OI for new_OI, _ in found]
    if options.refit:
        new = [
            fit(old_OI, problem.damped_II, removed_OI, new_OI, metric_BKK, _most_steps(metric_BKK)).weight_OI
            for old_OI, (new_OI, removed_OI), metric_BKK in zip(old, found, metrics, strict=True)
        ]
    return list(zip(old, new, notes, strict=True))


def _most_steps(metric_BKK: Tensor | None) -> int:
    return MOST_STEPS if metric_BKK is None else COUPLED_STEPS


def problems_of(options: OBSDiff, group: Group, moments: Moments) -> Iterator[Member]:
    """Each layer of a group, its problem, which others may share, and the mean that its bias absorbs, if it does."""
    assert isinstance(options.granularity, Elementwise)
    assert moments.second_II is not None
    mean_I = _mean(moments) if options.refit else None
    problems: dict[bool, Problem] = {}
    for target in group.targets:
        absorbed_I = mean_I if target.module.bias is not None else None
        absorbs = absorbed_I is not None
        if absorbs not in problems:
            problems[absorbs] = Problem(
                moments.second_II if absorbed_I is None else _about(absorbed_I, moments),
                options.damping,
                options.granularity,
                options.block,
                target.name,
            )
        yield target, problems[absorbs], absorbed_I


def _mean(moments: Moments) -> Tensor | None:
    """Of the inputs, or None where they hardly differ from it, so that nothing would be left to choose weights by."""
    assert moments.second_II is not None
    mean_I = (moments.total_I / moments.weight).to(moments.total_I.dtype)
    squares = moments.second_II.diagonal().sum()
    spread = squares - moments.weight * mean_I.square().sum()
    return mean_I if spread > LEAST_SPREAD * squares else None


def _about(mean_I: Tensor, moments: Moments) -> Tensor:
    """The second moment about the mean: what is left of an error once the bias has absorbed its mean."""
    assert moments.second_II is not None
    return torch.addr(moments.second_II, mean_I, mean_I, alpha=-moments.weight.item())
