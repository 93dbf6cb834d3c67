"""Solves the heads and neurons of one package: which of them leave, and how what is left makes up for them."""

# Shapes: O outputs, I inputs, G groups of inputs, D inputs of a group, K inputs kept; B x K x K: blocks of a metric.

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compressor.plugin import LayerResult, Removed
from compressor_obs_diff.metric import INDEPENDENT, slopes_of
from compressor_obs_diff.removal import Fusion, Refit, Stream, refit, remove_greedily
from compressor_obs_diff.solver import explain_damping

if TYPE_CHECKING:
    from compressor.calibration import Moments, Package
    from compressor.structure import Group, Target
    from compressor_obs_diff import OBSDiff


@torch.no_grad()
def prune_groups(
    options: OBSDiff, removals: Mapping[Group, int], package: Package, moments: dict[str, Moments]
) -> Iterator[LayerResult | Removed]:
    """Zeroes the columns of what leaves, in place, and refits the other columns and the bias.

    Groups that the same linears read (heads and neurons of a Flux single block) are removed one after the other, the
    second in view of what the first has left, and refitted together.

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
    for groups in together.values():
        start = time.perf_counter()
        readers = groups[0].consumers
        streams = streams_of(options, readers, inputs, moments)
        units, columns, fits = _choose(options, streams, groups, removals)
        for group in groups:
            yield Removed(group, units[group])
        seconds = time.perf_counter() - start
        for target, fitted in zip(readers, fits, strict=True):
            _write(target, fitted, columns)
            moments.pop(inputs[target.name])
            notes = explain_damping(fitted.damping, options.damping)
            if options.objective == "network" and rule(options, streams) != "sum":
                notes += (INDEPENDENT,)
            if options.fusion == "rank_fusion" and len(readers) == 1:
                notes += ("fusion rank_fusion has no effect here: no other layer reads what left",)
            yield LayerResult(target.name, fitted.error, fitted.damping, seconds / len(readers), notes)


def _choose(
    options: OBSDiff, dense: Sequence[Stream], groups: Sequence[Group], removals: Mapping[Group, int]
) -> tuple[dict[Group, tuple[int, ...]], list[int], list[Refit]]:
    """The units that leave, by group, the columns that stay, and what each stream's weights there become."""
    units: dict[Group, tuple[int, ...]] = {}
    fits: list[Refit] = []
    columns = list(range(dense[0].weight_OI.shape[1]))
    streams = list(dense)
    for group in groups:
        place = {column: i for i, column in enumerate(columns)}
        wide = group.columns(group.consumers[0], range(group.count)).tolist()
        groups_GD = torch.tensor([place[column] for column in wide]).view(group.count, group.width)
        found = remove_greedily(
            streams,
            groups_GD.to(dense[0].weight_OI.device),
            removals[group],
            options.damping,
            rule(options, dense),
        )
        units[group] = tuple(sorted(found.removed))
        fits = found.refits
        streams = [_rest(stream, found.columns, fitted) for stream, fitted in zip(streams, fits, strict=True)]
        columns = [columns[i] for i in found.columns]
    if len(groups) > 1:  # errors are to be against the dense weights
        fits = [refit(stream, columns, options.damping) for stream in dense]
    return units, columns, fits


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
        gradients = [moments[inputs[target.name]].gradients[target.name] for target in readers]
        metrics = [slopes_of(found) for found in gradients]
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
