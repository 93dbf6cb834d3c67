"""Lets a pruner do its work, takes out what it gave up, and counts afterwards whether it did what it promised."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch

from compressor import checkpoint, offload
from compressor.calibration import Calibration
from compressor.entries import Entry
from compressor.errors import CompressorError
from compressor.pipeline import Pipeline, current
from compressor.plugin import LayerResult, Removed
from compressor.progress import Progress
from compressor.ranks import ALONE, Ranks, fingerprint
from compressor.report import GroupRow, LayerRow
from compressor.structure import Group, Proof, Target, shrink

Shape = tuple[int, int]


@dataclass(frozen=True)
class Pruned:
    """What was done.

    Attributes:
        layers: one row for each layer that changed, in order of execution.
        groups: one row for each group of heads or neurons that might lose some.
        proof: that the network without them computes what it did with their columns zeroed; None if none left.
        seconds: time spent in the pruner, calibration included.
    """

    layers: tuple[LayerRow, ...]
    groups: tuple[GroupRow, ...]
    proof: Proof | None
    seconds: float


def prune(
    entry: Entry, pipeline: Pipeline, calibration: Calibration | None, progress: Progress, ranks: Ranks = ALONE
) -> Pruned:
    """Prunes the layers of one entry in place and rounds the network to the dtype that it will be saved in.

    Args:
        entry: the pruner and its layers.
        pipeline: whose network is changed.
        calibration: for pruners that ask for one.
        progress: shows a bar.
        ranks: the processes that share the job; all of them end with the same network.

    Raises:
        CompressorError: if the pruner fails, leaves a layer or a group out, leaves a weight that is not finite, makes
            fewer zeros or removes other numbers of heads or neurons than it promised, or spreads its zeros otherwise;
            or if the network does not compute the same without them.
    """
    layers = entry.layers
    shapes = {target.name: (target.outputs, target.inputs) for target in layers}
    counts = {group.name: group.count for group in entry.removals}
    results: dict[str, LayerResult] = {}
    removed: dict[str, Removed] = {}
    offload.bring(pipeline.module)
    start = time.perf_counter()
    with (
        current(pipeline.device),
        progress.task(f"pruning with {entry.name}", len(entry.calibrated)) as advance,
    ):
        for result in entry.pruner.prune(entry.component, calibration):
            if isinstance(result, Removed):
                removed[result.group.name] = result
            else:
                advance(result.name not in results)
                results[result.name] = result
        if ranks.count > 1:
            own = len(results)
            _merge(entry, calibration, results, removed, ranks)
            advance(len(results) - own)
    if pipeline.device.type == "cuda":
        torch.cuda.synchronize(pipeline.device)
    seconds = time.perf_counter() - start
    _check_results(entry, results, removed)
    checkpoint.round_to_stored(pipeline)
    units = {group: removed[group.name].units for group in entry.shrinking}
    proof = _shrink(entry, pipeline, units, progress)
    shares = entry.pruner.shares()
    return Pruned(
        layers=tuple(_verify(entry, target, results.get(target.name), shapes[target.name]) for target in layers),
        groups=tuple(
            GroupRow(
                name=group.name,
                block=group.block,
                kind=group.kind,
                width=group.width,
                before=counts[group.name],
                after=group.count,
                removed=units.get(group, ()),
                asked=shares.get(group.kind) if len(entry.choices[group]) == 1 else None,
            )
            for group in entry.removals
        ),
        proof=proof,
        seconds=seconds,
    )


def _merge(
    entry: Entry,
    calibration: Calibration | None,
    results: dict[str, LayerResult],
    removed: dict[str, Removed],
    ranks: Ranks,
) -> None:
    """Brings together what all processes found and made; of a layer that none was given, what rank 0 made."""
    owners = calibration.owners if calibration is not None else {}
    groups = {group.name: group for group in entry.removals}
    units = {name: found.units for name, found in removed.items()}
    every = ranks.gather((dict(results), units))
    results.clear()
    removed.clear()
    for found, gone in reversed(every):  # the first one counts
        results.update(found)
        removed.update({name: Removed(groups[name], indices) for name, indices in gone.items() if name in groups})
    ranks.meet()
    for target in entry.layers:
        ranks.send(target.module, owners.get(target.name, 0))
    if calibration is not None:
        calibration.owners.clear()
    module = entry.component.module
    sums = {name: fingerprint(tensor) for name, tensor in module.state_dict().items()}
    for other in ranks.gather(sums):
        for name, value in sums.items():
            if other[name] != value:
                raise CompressorError(
                    f"{entry.where}: pruner '{entry.name}' has changed {name}, which is not among its layers, "
                    "differently in every process; nothing was kept"
                )


def _check_results(entry: Entry, results: Mapping[str, LayerResult], removed: Mapping[str, Removed]) -> None:
    start = f"{entry.where}: pruner '{entry.name}'"
    for target in entry.calibrated:
        if target.name not in results:
            raise CompressorError(f"{start} left out {target.name}; nothing was kept")
        least, most = entry.pruner.bounds(target)
        chosen = _asked(entry, target, results[target.name])
        if not least <= chosen <= most:
            raise CompressorError(
                f"{start} should have given {target.name} from {least} to {most} zeros, found {chosen}; "
                "nothing was kept"
            )
    promised = sum(entry.pruner.zeros(target) for target in entry.calibrated)
    given = sum(_asked(entry, target, results[target.name]) for target in entry.calibrated)
    if given != promised:
        raise CompressorError(
            f"{start} should have spread {promised} zeros over its layers, found {given}; nothing was kept"
        )
    missing = step = 0  # weights
    for group, numbers in entry.choices.items():
        units = removed[group.name].units if group.name in removed else ()
        if len(units) != len(set(units)) or len(units) not in numbers:
            wanted = str(numbers[0])
            if len(numbers) > 1:
                wanted = f"one of {len(numbers)} numbers from {numbers[0]} to {numbers[-1]}"
            raise CompressorError(
                f"{start} should have given up {wanted} of {group.name}, found {len(set(units))} in {len(units)} "
                "indices; nothing was kept"
            )
        missing += (entry.removals[group] - len(units)) * group.unit_weights
        step = max(step, *((b - a) * group.unit_weights for a, b in pairwise(numbers)), 0)
        for consumer in group.consumers:
            weight_OI = consumer.module.weight
            if weight_OI[:, group.columns(consumer, units).to(weight_OI.device)].any():
                raise CompressorError(
                    f"{start} should have zeroed the columns of {consumer.name} that belong to what it gave up of "
                    f"{group.name}; nothing was kept"
                )
    if abs(missing) >= max(step, 1):
        promised = sum(count * group.unit_weights for group, count in entry.removals.items())
        raise CompressorError(
            f"{start} should have given up {promised} weights with heads and neurons, to within {step}, found "
            f"{promised - missing}; nothing was kept"
        )


def _shrink(
    entry: Entry, pipeline: Pipeline, units: Mapping[Group, tuple[int, ...]], progress: Progress
) -> Proof | None:
    if not units:
        return None
    progress.say(f"removing heads and neurons of {len(units)} groups, and proving that nothing else changes")
    try:
        return shrink(pipeline.module, units, pipeline.example_inputs())
    except CompressorError as error:
        raise CompressorError(f"{entry.where}: {error}; nothing was kept") from error


def _verify(entry: Entry, target: Target, result: LayerResult | None, shape: Shape) -> LayerRow:
    start = f"{entry.where}: pruner '{entry.name}'"
    weight = target.module.weight
    if not torch.isfinite(weight).all():
        raise CompressorError(f"{start} left values in {target.name} that are not finite; nothing was kept")
    zeros = int((weight == 0).sum())
    asked = _asked(entry, target, result)
    if zeros < asked:
        raise CompressorError(
            f"{start} should have made {asked} weights of {target.name} zero, found {zeros}; nothing was kept"
        )
    if not entry.pruner.holds(target):
        raise CompressorError(f"{start} left {target.name} without the pattern that it promised; nothing was kept")
    layer, removed = target.layer, shape[0] * shape[1] - weight.numel()
    result = result or LayerResult(target.name)
    return LayerRow(
        name=target.name,
        block=target.block,
        part=layer.part,
        role=layer.role,
        stream=layer.stream,
        pruner=entry.name,
        outputs=target.outputs,
        inputs=target.inputs,
        parameters=shape[0] * shape[1],
        removed=removed,
        asked=asked + removed,
        zeros=zeros,
        error=result.error,
        damping=result.damping,
        seconds=result.seconds,
        notes=(*result.notes, *_explain_more(zeros - asked)),
    )


def _asked(entry: Entry, target: Target, result: LayerResult | None) -> int:
    """How many weights of a layer were to become zero."""
    return entry.pruner.zeros(target) if result is None or result.zeros is None else result.zeros


def _explain_more(more: int) -> tuple[str, ...]:
    if more == 0:
        return ()
    return (
        f"{more} more weights are zero than asked: they were before, or are too small for the dtype they are saved in",
    )
