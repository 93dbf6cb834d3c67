"""Solves the heads and neurons of one package: which of them leave, and how what is left makes up for them."""

# Shapes: O outputs, I inputs, G groups of inputs, D inputs of a group, K inputs kept; B x K x K: blocks of a metric.

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compressor.plugin import LayerResult, Removed
from compressor_obs_diff.batch import equal_batches
from compressor_obs_diff.greedy import Fusion
from compressor_obs_diff.metric import INDEPENDENT, slopes_of
from compressor_obs_diff.removal import (
    Problem,
    Refit,
    Stream,
    bytes_of,
    fitting_together,
    refit_together,
    remove_together,
)
from compressor_obs_diff.solver import explain_damping

if TYPE_CHECKING:
    from compressor.calibration import Group as Inputs
    from compressor.calibration import Moments, Package
    from compressor.structure import Group, Target
    from compressor_obs_diff import OBSDiff


@dataclass
class _Job:
    """What reads the same heads and neurons, and what is known of it so far.

    Attributes:
        groups: heads or neurons that leave, one after the other.
        dense: the layers that read them.
        streams: the same without what has left.
        columns: which of the dense layers' inputs are left.
        units: which heads or neurons have left, by group.
        fits: of `streams`.
        dampings: of `dense`.
    """

    groups: Sequence[Group]
    dense: list[Stream]
    streams: list[Stream]
    columns: list[int]
    units: dict[Group, tuple[int, ...]]
    fits: list[Refit]
    dampings: list[float]


@torch.no_grad()
def prune_groups(
    options: OBSDiff, removals: Mapping[Group, int], package: Package, moments: dict[str, Moments]
) -> Iterator[LayerResult | Removed]:
    """Zeroes the columns of what leaves, in place, and refits the other columns and the bias.

    Groups that the same linears read (heads and neurons of a Flux single block) are removed one after the other, the
    second in view of what the first has left, and refitted together. On a GPU blocks of one shape are solved together.

    Args:
        options: objective, damping and fusion.
        removals: how many heads or neurons leave, by group; the consumers of each lie in one package.
        package: consumers, by the input they read.
        moments: by group of the package; emptied.
    """
    inputs = {target.name: group.name for group in package.groups for target in group.targets}
    together: dict[tuple[str, ...], list[Group]] = {}
    for group in removals:
        if group.consumers[0].name in inputs:
            together.setdefault(tuple(target.name for target in group.consumers), []).append(group)
    for batch in batches(list(together.values()), removals, package, moments):
        yield from _prune(options, removals, batch, inputs, moments)


def _prune(
    options: OBSDiff,
    removals: Mapping[Group, int],
    batch: Sequence[Sequence[Group]],
    inputs: Mapping[str, str],
    moments: dict[str, Moments],
) -> list[LayerResult | Removed]:
    """What is solved together, of which nothing is kept: what comes next needs the memory."""
    start = time.perf_counter()
    jobs = [_begin(groups, streams_of(options, groups[0].consumers, inputs, moments)) for groups in batch]
    _solve(options, jobs, removals)
    for job in jobs:
        for target, fitted in zip(job.groups[0].consumers, job.fits, strict=True):
            _write(target, fitted, job.columns)
            moments.pop(inputs[target.name])
    seconds = (time.perf_counter() - start) / sum(len(job.dense) for job in jobs)
    results: list[LayerResult | Removed] = []
    for job in jobs:
        results += [Removed(group, job.units[group]) for group in job.groups]
        readers = job.groups[0].consumers
        for target, fitted in zip(readers, job.fits, strict=True):
            notes = explain_damping(fitted.damping, options.damping)
            if options.objective == "network" and rule(options, job.dense) != "sum":
                notes += (INDEPENDENT,)
            if options.fusion == "rank_fusion" and len(readers) == 1:
                notes += ("fusion rank_fusion has no effect here: no other layer reads what left",)
            results.append(LayerResult(target.name, fitted.error, fitted.damping, seconds, notes))
    return results


def workspace(groups: Iterable[Inputs]) -> int:
    """The most bytes that solving one problem takes beside the moments.

    The attention outputs of a block's streams are one, since they read the same heads; every other layer is one alone.
    """
    found: Counter[object] = Counter()
    for target in (target for group in groups for target in group.targets):
        problem = target.unit if target.layer.part == "attention" else target.name
        found[problem] += bytes_of(target.outputs, target.inputs)
    return max(found.values(), default=0)


def batches(
    found: Sequence[Sequence[Group]], counts: Mapping[Group, int], package: Package, moments: Mapping[str, Moments]
) -> Iterator[list[Sequence[Group]]]:
    """What is solved together: what has one shape, as much as fits.

    Args:
        found: groups by those who read them.
        counts: how many heads or neurons leave, by group. Similar ones come together, since all that is solved together
            takes as long as the most.
        package: tells what room there is.
        moments: those that are still held, whenever a batch is asked for.
    """
    alike: dict[object, list[Sequence[Group]]] = {}
    for groups in found:
        readers = groups[0].consumers
        places = tuple((group.start, group.count, group.width) for group in groups)
        alike.setdefault((readers[0].inputs, len(readers), places), []).append(groups)
    for members in alike.values():
        readers = members[0][0].consumers
        members.sort(key=lambda groups: [counts[group] for group in groups])
        needs = sum(bytes_of(target.outputs, target.inputs) for target in readers)
        device = readers[0].module.weight.device
        yield from equal_batches(
            members, lambda needs=needs, device=device: fitting_together(needs, device, package.room(moments))
        )


def _begin(groups: Sequence[Group], streams: list[Stream]) -> _Job:
    return _Job(groups, streams, streams, list(range(streams[0].weight_OI.shape[1])), {}, [], [])


def _solve(options: OBSDiff, jobs: Sequence[_Job], removals: Mapping[Group, int]) -> None:
    """Decides which units of each group leave, and what the layers become. All jobs have as many groups."""
    for stage in range(len(jobs[0].groups)):
        alike: dict[object, list[_Job]] = {}
        for job in jobs:
            key = (rule(options, job.dense), len(job.columns), tuple(_places(job, stage).flatten().tolist()))
            alike.setdefault(key, []).append(job)
        for members in alike.values():
            found = remove_together(
                [Problem(job.streams, removals[job.groups[stage]]) for job in members],
                _places(members[0], stage),
                options.damping,
                rule(options, members[0].dense),
            )
            for job, each in zip(members, found, strict=True):
                job.units[job.groups[stage]] = tuple(sorted(each.removed))
                job.fits = each.refits
                job.dampings = job.dampings or [fitted.damping for fitted in each.refits]
                job.columns = [job.columns[i] for i in each.columns]
                if stage < len(job.groups) - 1:
                    pairs = zip(job.streams, each.refits, strict=True)
                    job.streams = [_rest(stream, each.columns, fitted) for stream, fitted in pairs]
    if len(jobs[0].groups) > 1:  # errors are to be against the dense weights
        streams = [stream for job in jobs for stream in job.dense]
        dampings = [damping for job in jobs for damping in job.dampings]
        fits = iter(refit_together(streams, [job.columns for job in jobs for _ in job.dense], dampings))
        for job in jobs:
            job.fits = list(itertools.islice(fits, len(job.dense)))


def _places(job: _Job, stage: int) -> Tensor:
    """Where the inputs of each unit are among those left, G x D."""
    group = job.groups[stage]
    wide = group.columns(group.consumers[0], range(group.count))
    return torch.searchsorted(torch.tensor(job.columns), wide).view(group.count, group.width)


def streams_of(
    options: OBSDiff, readers: Sequence[Target], inputs: Mapping[str, str], moments: Mapping[str, Moments]
) -> list[Stream]:
    """The layers that read the same heads or neurons, as problems of least squares.

    Args:
        options: objective. Where it is the network's output, and this depends on any of them, all have a metric.
        readers: the layers.
        inputs: the name of the input that each reads.
        moments: by that name.
    """
    metrics: list[Tensor | None] = [None] * len(readers)
    if options.objective == "network":
        read = [moments[inputs[target.name]] for target in readers]
        gradients = [found.gradients[target.name] for found, target in zip(read, readers, strict=True)]
        metrics = [slopes_of(found, each.weight) for found, each in zip(gradients, read, strict=True)]
        if any(metric_BKK is not None for metric_BKK in metrics):  # then an output that counts nothing costs nothing
            metrics = [
                torch.zeros_like(found.second_BKK) if metric_BKK is None else metric_BKK
                for metric_BKK, found in zip(metrics, gradients, strict=True)
            ]
    streams = []
    for target, metric_BKK in zip(readers, metrics, strict=True):
        found = moments[inputs[target.name]]
        assert found.second_II is not None
        linear = target.module
        streams.append(
            Stream(
                name=target.name,
                weight_OI=linear.weight.detach().float(),
                second_II=found.second_II,
                bias_O=None if linear.bias is None else linear.bias.detach().float(),
                total_I=found.total_I,
                tokens=float(found.weight),
                metric_BKK=metric_BKK,
            )
        )
    return streams


def rule(options: OBSDiff, streams: Sequence[Stream]) -> Fusion:
    """How the costs of several streams are compared: as errors of the network's output they add up."""
    return options.fusion if streams[0].metric_BKK is None else "sum"


def _rest(stream: Stream, columns: Sequence[int], fitted: Refit) -> Stream:
    """The stream as it is after a removal."""
    index_K = torch.tensor(columns, device=stream.weight_OI.device)
    total_K: Tensor | None = None if stream.total_I is None else stream.total_I[index_K]
    return replace(
        stream,
        weight_OI=fitted.weight_OK,
        second_II=stream.second_II[index_K][:, index_K],
        bias_O=fitted.bias_O,
        total_I=total_K,
    )


def _write(target: Target, fitted: Refit, columns: Sequence[int]) -> None:
    linear = target.module
    index_K = torch.tensor(columns, device=linear.weight.device)
    linear.weight.zero_()
    linear.weight[:, index_K] = fitted.weight_OK.to(linear.weight.dtype)
    if fitted.bias_O is not None:
        linear.bias.copy_(fitted.bias_O)
