"""Solves the layers of one package: one factorisation for all layers that share an input."""

# Shapes: N problems of O outputs and I inputs.

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from compressor.plugin import Elementwise, LayerResult
from compressor_obs_diff import batch
from compressor_obs_diff.least_squares import MOST_STEPS, fit
from compressor_obs_diff.metric import INDEPENDENT, metric_of
from compressor_obs_diff.solver import energy, explain_damping, relative_error
from compressor_obs_diff.solvers import SOLVERS, Problem

if TYPE_CHECKING:
    from compressor.calibration import Group, Moments, Package
    from compressor.structure import Target
    from compressor_obs_diff import OBSDiff

T = TypeVar("T")

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

    The sweep takes problems of equal shape at once on a GPU; then results come in the order of the shapes.

    Args:
        options: an elementwise granularity, objective, solver, refit, damping and block.
        package: the layers, grouped by the input they share.
        moments: by group; emptied.
        zeros: how many of each layer, by name; as many as `options.zeros` says if none.
    """
    assert isinstance(options.granularity, Elementwise)
    devices = {found.total_I.device for found in moments.values()}
    if options.solver == "obs" and all(batch.possible(options.granularity, device) for device in devices):
        yield from _prune_alike(options, package, moments, zeros)
        return
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


def _prune_alike(
    options: OBSDiff, package: Package, moments: dict[str, Moments], zeros: Mapping[str, int] | None
) -> Iterator[LayerResult]:
    """The layers of a package, those of equal shape at once, from whatever block and stream."""
    alike: dict[tuple[int, tuple[int, ...]], list[Group]] = {}
    for group in package.groups:
        for part in _parts(options, group):
            alike.setdefault((part.inputs, tuple(target.outputs for target in part.targets)), []).append(part)
    left = Counter(part.name for parts in alike.values() for part in parts)
    for (inputs, rows), parts in alike.items():
        most = batch.most(sum(rows), inputs, moments[parts[0].name].total_I.device)
        size = -(-len(parts) // -(-len(parts) // most))  # as equal as can be
        for start in range(0, len(parts), size):
            chunk = parts[start : start + size]
            found = _solve_alike(options, chunk, [moments[part.name] for part in chunk], zeros)
            left.subtract(part.name for part in chunk)
            for part in chunk:
                if not left[part.name]:
                    moments.pop(part.name, None)
            yield from found


def _parts(options: OBSDiff, group: Group) -> Iterator[Group]:
    """A group's layers, as they are solved at once: with one Hessian, and no more than memory is meant for."""
    absorbing = groupby(group.targets, key=lambda target: options.refit and target.module.bias is not None)
    for _, targets in absorbing:
        for together in _cut(list(targets), lambda target: target.module.weight.numel()):
            yield replace(group, targets=tuple(together))


def _solve_alike(
    options: OBSDiff, parts: Sequence[Group], gathered: Sequence[Moments], zeros: Mapping[str, int] | None
) -> list[LayerResult]:
    start = time.perf_counter()
    assert isinstance(options.granularity, Elementwise)
    members = [list(problems_of(options, part, found)) for part, found in zip(parts, gathered, strict=True)]
    problems = [found[0][1] for found in members]
    upper_NII, factors = batch.factorise_batch(
        [problem.second_II for problem in problems], options.damping, [problem.name for problem in problems]
    )
    problems = [replace(problem, factored=factor) for problem, factor in zip(problems, factors, strict=True)]
    rows = [target.outputs for target in parts[0].targets]
    weight_NOI = torch.empty(len(parts), sum(rows), parts[0].inputs, device=upper_NII.device)
    for weight_OI, part in zip(weight_NOI, parts, strict=True):
        for new_OI, target in zip(weight_OI.split(rows), part.targets, strict=True):
            new_OI.copy_(target.module.weight)
    counts = [
        [options.zeros(target) if zeros is None else zeros[target.name] for target in part.targets] for part in parts
    ]
    shares = [_shares(options, part.targets, asked) for part, asked in zip(parts, counts, strict=True)]
    removed_NOI = batch.sweep_batch(weight_NOI, upper_NII, rows, options.granularity, shares, options.block)
    errors = [
        _keep(options, found, problem, moments, new_OI, removed_OI)
        for found, problem, moments, new_OI, removed_OI in zip(
            members, problems, gathered, weight_NOI, removed_NOI, strict=True
        )
    ]
    errors = torch.stack(errors).tolist()  # one wait for the GPU, for all of them
    seconds = (time.perf_counter() - start) / (len(parts) * sum(rows))
    return [
        LayerResult(
            name=target.name,
            error=error,
            damping=problem.factor.damping,
            seconds=seconds * target.outputs,
            notes=explain_damping(problem.factor.damping, options.damping, problem.factor.dtype),
            zeros=count,
        )
        for part, problem, asked, lost in zip(parts, problems, counts, errors, strict=True)
        for target, count, error in zip(part.targets, asked, lost, strict=True)
    ]


def _keep(
    options: OBSDiff, members: Sequence[Member], problem: Problem, gathered: Moments, new_OI: Tensor, removed_OI: Tensor
) -> Tensor:
    """Writes the layers of one problem back, and gives their relative errors; only a refit waits for the GPU."""
    assert gathered.second_II is not None
    rows = [target.outputs for target, *_ in members]
    old_OI = torch.cat([target.module.weight.detach().float() for target, *_ in members])
    kept_OI = torch.empty_like(old_OI)
    for (target, _, absorbed_I), dense_OI, gone_OI, found_OI, stored_OI in zip(
        members, *(whole_OI.split(rows) for whole_OI in (old_OI, removed_OI, new_OI, kept_OI)), strict=True
    ):
        if options.refit:  # each by itself, as its own error says when to end
            found_OI = fit(dense_OI, problem.damped_II, gone_OI, found_OI).weight_OI  # noqa: PLW2901
        target.module.weight.copy_(found_OI)
        stored_OI.copy_(target.module.weight)
        if target.module.bias is not None and absorbed_I is not None:
            target.module.bias.copy_(target.module.bias.float() + (dense_OI - stored_OI) @ absorbed_I)
    total_O = energy(old_OI, gathered.second_II)
    lost_O = energy(kept_OI.sub_(old_OI), problem.second_II)
    lost, total = (torch.stack([part_O.sum() for part_O in found_O.split(rows)]) for found_O in (lost_O, total_O))
    return torch.where(total > 0, lost / total, 0)


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
        yield from _cut(list(found), lambda member: member[0].module.weight.numel())


def _cut(found: Sequence[T], weights: Callable[[T], int]) -> Iterator[list[T]]:
    """Cuts what comes one after the other where it would have too many weights together."""
    together: list[T] = []
    for one in found:
        if together and sum(map(weights, [*together, one])) > MOST_TOGETHER:
            yield together
            together = []
        together.append(one)
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
    shares = _shares(options, [target for target, *_ in members], counts)
    found = SOLVERS[options.solver](old, problem, shares, metrics)
    new = [new_OI for new_OI, _ in found]
    if options.refit:
        new = [
            fit(old_OI, problem.damped_II, removed_OI, new_OI, metric_BKK, _most_steps(metric_BKK)).weight_OI
            for old_OI, (new_OI, removed_OI), metric_BKK in zip(old, found, metrics, strict=True)
        ]
    return list(zip(old, new, notes, strict=True))


def _shares(options: OBSDiff, targets: Sequence[Target], counts: Sequence[int]) -> list[float | None]:
    return [
        count / target.module.weight.numel() if options.granularity.needs_sparsity else None
        for count, target in zip(counts, targets, strict=True)
    ]


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
