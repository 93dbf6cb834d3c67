"""Lets a pruner do its work and counts afterwards whether it did what it promised."""

from __future__ import annotations

import torch

from compressor import checkpoint
from compressor.calibration import Calibration
from compressor.errors import CompressorError
from compressor.pipeline import Pipeline
from compressor.plugin import LayerResult
from compressor.prepare import Entry
from compressor.progress import Progress
from compressor.report import LayerRow
from compressor.structure import Target


def prune(entry: Entry, pipeline: Pipeline, calibration: Calibration | None, progress: Progress) -> list[LayerRow]:
    """Prunes the layers of one entry in place and rounds the network to the dtype that it will be saved in.

    Args:
        entry: the pruner and its layers.
        pipeline: whose network is changed.
        calibration: for pruners that ask for one.
        progress: shows a bar.

    Returns:
        One row a layer, in order of execution.

    Raises:
        CompressorError: if the pruner fails, leaves a layer out, leaves a weight that is not finite, or makes fewer
            zeros than it promised.
    """
    results: dict[str, LayerResult] = {}
    with progress.task(f"pruning with {entry.name}", len(entry.component.targets)) as advance:
        for result in entry.pruner.prune(entry.component, calibration):
            results[result.name] = result
            advance(1)
    checkpoint.round_to_stored(pipeline)
    return [_verify(entry, target, results.get(target.name)) for target in entry.component.targets]


def _verify(entry: Entry, target: Target, result: LayerResult | None) -> LayerRow:
    start = f"{entry.where}: pruner '{entry.name}'"
    if result is None:
        raise CompressorError(f"{start} left out {target.name}; nothing was kept")
    weight = target.module.weight
    if not torch.isfinite(weight).all():
        raise CompressorError(f"{start} left values in {target.name} that are not finite; nothing was kept")
    zeros = int((weight == 0).sum())
    asked = entry.pruner.zeros(target)
    if zeros < asked:
        raise CompressorError(
            f"{start} should have made {asked} weights of {target.name} zero, found {zeros}; nothing was kept"
        )
    if not entry.pruner.holds(target):
        raise CompressorError(f"{start} left {target.name} without the pattern that it promised; nothing was kept")
    layer = target.layer
    return LayerRow(
        name=target.name,
        block=target.block,
        part=layer.part,
        role=layer.role,
        stream=layer.stream,
        pruner=entry.name,
        parameters=weight.numel(),
        asked=asked,
        zeros=zeros,
        error=result.error,
        damping=result.damping,
        seconds=result.seconds,
        notes=(*result.notes, *_explain_more(zeros - asked)),
    )


def _explain_more(more: int) -> tuple[str, ...]:
    if more == 0:
        return ()
    return (
        f"{more} more weights are zero than asked: they were before, or are too small for the dtype they are saved in",
    )
