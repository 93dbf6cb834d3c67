"""Solves the layers of one package: one factorisation for all layers that share an input, equal shapes at once."""

# Shapes: N problems of O outputs and I inputs; L layers of each; B blocks of K outputs.

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compressor.calibration.curvature import blocks_of
from compressor.plugin import Elementwise, LayerResult
from compressor_obs_diff import admm, batch
from compressor_obs_diff.least_squares import fit
from compressor_obs_diff.metric import INDEPENDENT, metrics_of
from compressor_obs_diff.quadratic import Quadratic
from compressor_obs_diff.solver import Factor, energy, explain_damping, factorise, sweep_together

if TYPE_CHECKING:
    from compressor.calibration import Group, Moments, Package
    from compressor.structure import Target
    from compressor_obs_diff import OBSDiff

MOST_TOGETHER = 2**26
"""Weights that are solved at once: 256 MB a copy in float32. A layer that has more is solved alone."""
LEAST_SPREAD = 1e-4
"""Of the inputs about their mean, relative to their squares; below it, no bias absorbs the mean."""


@dataclass(frozen=True)
class Problem:
    """What layers that read one input have in common.

    Attributes:
        second_II: the Hessian, undamped, float32.
        damping: asked for, relative to the mean diagonal.
        name: a layer, for errors.
    """

    second_II: Tensor
    damping: float
    name: str

    @cached_property
    def factor(self) -> Factor:
        """The inverse Hessian as a triangle, and the damping that was needed for it."""
        return factorise(self.second_II, self.damping, self.name)


@torch.no_grad()
def prune_package(
    options: OBSDiff, package: Package, moments: dict[str, Moments], zeros: Mapping[str, int] | None = None
) -> Iterator[LayerResult]:
    """Prunes every layer of a package in place, freeing each group's moments when its layers are done.

    On a GPU layers of equal shape are solved at once, from whatever block and stream; then results come in the order of
    the shapes, small ones first.

    Args:
        options: an elementwise granularity, objective, solver, refit, damping and block.
        package: the layers, grouped by the input they share.
        moments: by group; emptied.
        zeros: how many of each layer, by name; as many as `options.zeros` says if none.
    """
    parts = [part for group in package.groups for part in _parts(options, group)]
    left = Counter(part.name for part in parts)
    for chunk in _chunks(options, parts, package, moments):
        results = _solve(options, chunk, [moments[part.name] for part in chunk], zeros)
        left.subtract(part.name for part in chunk)
        for part in chunk:
            if not left[part.name]:
                moments.pop(part.name, None)
        yield from results


def _parts(options: OBSDiff, group: Group) -> Iterator[Group]:
    """A group's layers, as they are solved at once: with one Hessian, and no more than memory is meant for.

    With metrics they have as many outputs, so that these have equal blocks.
    """

    def alike(target: Target) -> tuple[bool, int]:
        absorbs = options.refit and target.module.bias is not None
        return absorbs, target.outputs if options.objective == "network" else 0

    for _, targets in groupby(group.targets, key=alike):
        together: list[Target] = []
        for target in targets:
            if together and sum(each.module.weight.numel() for each in (*together, target)) > MOST_TOGETHER:
                yield replace(group, targets=tuple(together))
                together = []
            together.append(target)
        yield replace(group, targets=tuple(together))


def _chunks(
    options: OBSDiff, parts: Sequence[Group], package: Package, moments: Mapping[str, Moments]
) -> Iterator[Sequence[Group]]:
    """What is solved at once: on a GPU parts of equal shape, as many as memory is meant for; else each by itself.

    The smallest come first, so that the others have the memory of their moments, too.
    """
    if not parts:
        return
    device = moments[parts[0].name].total_I.device
    if not batch.pays(device):
        yield from ([part] for part in parts)
        return
    alike: dict[tuple[int, ...], list[Group]] = {}
    for part in parts:
        alike.setdefault((part.inputs, *(target.outputs for target in part.targets)), []).append(part)
    by_needs = sorted(((_bytes(options, same[0]), same) for same in alike.values()), key=itemgetter(0))
    for needs, same in by_needs:
        yield from batch.equal_batches(same, lambda needs=needs: batch.most(needs, device, package.room(moments)))


def workspace(options: OBSDiff, groups: Iterable[Group]) -> int:
    """The most bytes that solving what has one Hessian takes beside the moments.

    Not counted is a Hessian that only float64 can factorise, where no damping has helped.
    """
    return max((_bytes(options, part) for group in groups for part in _parts(options, group)), default=0)


def _bytes(options: OBSDiff, part: Group) -> int:
    """What a problem takes at the most, its moments aside; all is float32."""
    square, weights = part.inputs**2, part.inputs * sum(target.outputs for target in part.targets)
    if options.solver == "obs" and not options.refit:
        # U, and another inverse in the making, where the first one failed; the weights, old, new, as stored, and on
        # their way to the error
        return 4 * (square + max(5 * square // 2 + weights, 7 * weights))
    # A, it in halves, its inverse in the making; B, what differs from it, its halves and the like
    squares, copies, metric = 6, 13, 0
    if options.solver == "admm":
        levels = 2  # of rho, one of which is in the making
        if options.objective == "network":
            levels = admm.MOST - admm.LEAST + 1
            # K, its eigenvectors, and all of them in halves
            metric = 10 * sum(target.outputs * blocks_of(target.outputs)[1] for target in part.targets)
        squares += -(-3 * levels // 2)
    return 4 * (squares * square + copies * weights + metric)


def _solve(
    options: OBSDiff, parts: Sequence[Group], gathered: Sequence[Moments], zeros: Mapping[str, int] | None
) -> list[LayerResult]:
    start = time.perf_counter()
    assert isinstance(options.granularity, Elementwise)
    members = [list(problems_of(options, part, found)) for part, found in zip(parts, gathered, strict=True)]
    problems = [found[0][1] for found in members]
    hessians = [problem.second_II for problem in problems]
    upper_NII, factors = batch.factorise_batch(hessians, options.damping, [problem.name for problem in problems])
    rows = [target.outputs for target in parts[0].targets]
    weight_NOI = torch.empty(len(parts), sum(rows), parts[0].inputs, device=upper_NII.device)
    for weight_OI, part in zip(weight_NOI, parts, strict=True):
        for new_OI, target in zip(weight_OI.split(rows), part.targets, strict=True):
            new_OI.copy_(target.module.weight)
    counts = [
        [options.zeros(target) if zeros is None else zeros[target.name] for target in part.targets] for part in parts
    ]
    shares = [_shares(options, part.targets, asked) for part, asked in zip(parts, counts, strict=True)]
    known_NL = None
    if options.solver == "obs":
        new_NOI, removed_NOI = _sweep(options, weight_NOI, upper_NII, rows, shares)
        del upper_NII
        quadratic = Quadratic(_damped(hessians, factors)) if options.refit else None
    else:
        del upper_NII
        metric_NBKK = None
        if options.objective == "network":
            metric_NBKK, known_NL = _metrics(parts, gathered)
        quadratic = Quadratic(_damped(hessians, factors), metric_NBKK)
        del metric_NBKK
        masks = batch.masks_of(options.granularity, rows, shares, admm.shares(), parts[0].inputs, weight_NOI.device)
        new_NOI, removed_NOI = admm.choose(weight_NOI, quadratic, masks)
    if quadratic is not None and options.refit:
        new_NOI = fit(weight_NOI, quadratic, removed_NOI, new_NOI).weight_NOI
    del quadratic, removed_NOI
    errors = [
        _keep(found, problem, moments, old_OI, new_OI)
        for found, problem, moments, old_OI, new_OI in zip(
            members, problems, gathered, weight_NOI, new_NOI, strict=True
        )
    ]
    errors = torch.stack(errors).tolist()  # waits for the GPU once, for all of them
    known = known_NL.tolist() if known_NL is not None else [[True] * len(rows)] * len(parts)
    seconds = (time.perf_counter() - start) / (len(parts) * sum(rows))
    return [
        LayerResult(
            name=target.name,
            error=error,
            damping=factor.damping,
            seconds=seconds * target.outputs,
            notes=(
                *explain_damping(factor.damping, options.damping, factor.dtype),
                *(() if has_metric else (INDEPENDENT,)),
            ),
            zeros=count,
        )
        for part, factor, *of_layers in zip(parts, factors, counts, errors, known, strict=True)
        for target, count, error, has_metric in zip(part.targets, *of_layers, strict=True)
    ]


def _shares(options: OBSDiff, targets: Sequence[Target], counts: Sequence[int]) -> list[float | None]:
    return [
        count / target.module.weight.numel() if options.granularity.needs_sparsity else None
        for count, target in zip(counts, targets, strict=True)
    ]


def _sweep(
    options: OBSDiff,
    weight_NOI: Tensor,
    upper_NII: Tensor,
    rows: Sequence[int],
    shares: Sequence[Sequence[float | None]],
) -> tuple[Tensor, Tensor]:
    """The new weights and what was removed."""
    assert isinstance(options.granularity, Elementwise)
    if batch.possible(options.granularity, weight_NOI.device):
        new_NOI = weight_NOI.clone()
        return new_NOI, batch.sweep_batch(new_NOI, upper_NII, rows, options.granularity, shares, options.block)
    swept = [
        sweep_together(weight_OI.split(list(rows)), upper_II, options.granularity, asked, options.block)
        for weight_OI, upper_II, asked in zip(weight_NOI, upper_NII, shares, strict=True)
    ]
    new = [torch.cat([new_OI for new_OI, _ in layers]) for layers in swept]
    removed = [torch.cat([removed_OI for _, removed_OI in layers]) for layers in swept]
    return torch.stack(new), torch.stack(removed)


def _damped(hessians: Sequence[Tensor], factors: Sequence[Factor]) -> Tensor:
    """The Hessians (N x I x I) with the damping that was needed."""
    damped_NII = torch.stack(list(hessians))
    for damped_II, factor in zip(damped_NII, factors, strict=True):
        damped_II.diagonal().add_(factor.damping * damped_II.diagonal().mean())
    return damped_NII


def _metrics(parts: Sequence[Group], gathered: Sequence[Moments]) -> tuple[Tensor, Tensor]:
    """Those of all outputs, in blocks (N x B x K x K), and for which layers there is one (N x L)."""
    second_NBKK = torch.stack(
        [
            torch.cat([moments.gradients[target.name].second_BKK for target in part.targets])
            for part, moments in zip(parts, gathered, strict=True)
        ]
    )
    return metrics_of(second_NBKK, len(parts[0].targets))


Member = tuple["Target", Problem, Tensor | None]
"""A layer, its problem, and the mean of its inputs if its bias absorbs that."""


def _keep(members: Sequence[Member], problem: Problem, gathered: Moments, old_OI: Tensor, new_OI: Tensor) -> Tensor:
    """Writes the layers of one problem back, and gives their relative errors (L), without waiting for a GPU."""
    assert gathered.second_II is not None
    rows = [target.outputs for target, *_ in members]
    kept_OI = torch.empty_like(old_OI)
    for (target, _, absorbed_I), dense_OI, found_OI, stored_OI in zip(
        members, *(whole_OI.split(rows) for whole_OI in (old_OI, new_OI, kept_OI)), strict=True
    ):
        target.module.weight.copy_(found_OI)
        stored_OI.copy_(target.module.weight)
        if target.module.bias is not None and absorbed_I is not None:
            target.module.bias.copy_(target.module.bias.float() + (dense_OI - stored_OI) @ absorbed_I)
    total_O = energy(old_OI, gathered.second_II)
    lost_O = energy(kept_OI.sub_(old_OI), problem.second_II)
    lost, total = (torch.stack([part_O.sum() for part_O in found_O.split(rows)]) for found_O in (lost_O, total_O))
    return torch.where(total > 0, lost / total, 0)


def problems_of(options: OBSDiff, group: Group, moments: Moments) -> Iterator[Member]:
    """Each layer of a group, its problem, which others may share, and the mean that its bias absorbs, if it does."""
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
                target.name,
            )
        yield target, problems[absorbs], absorbed_I


def _mean(moments: Moments) -> Tensor:
    """Of the inputs, or zeros where they hardly differ from it, so that nothing would be left to choose weights by."""
    assert moments.second_II is not None
    mean_I = (moments.total_I / moments.weight).to(moments.total_I.dtype)
    squares = moments.second_II.diagonal().sum()
    spread = squares - moments.weight * mean_I.square().sum()
    return torch.where(spread > LEAST_SPREAD * squares, mean_I, 0)


def _about(mean_I: Tensor, moments: Moments) -> Tensor:
    """The second moment about the mean: what is left of an error once the bias has absorbed its mean."""
    assert moments.second_II is not None
    return torch.addr(moments.second_II, mean_I * moments.weight, mean_I, alpha=-1)
