"""`compressor probe`: what 2:4 gains over dense on this GPU, for each shape of a model's linear layers."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from compressor import measure, recipe, registry
from compressor import pipeline as pipelines
from compressor.bench import models, networks, results
from compressor.bench.settings import check_size
from compressor.errors import CompressorError
from compressor.pipeline import pick_device
from compressor.progress import Progress
from compressor.structure import Family, Target, Trace, find_targets, select
from compressor.twin import size_of, trace_at
from compressor.two_four import product, table
from compressor.two_four.product import Timed
from compressor.two_four.table import Row, Table


@dataclass(frozen=True)
class Settings:
    """What is to be measured.

    Attributes:
        models: names of known models, or recipes.
        size: height and width of the images in pixels; None for 1024, and for a recipe its own.
        batches: samples of one forward of the network.
        dtype: `bfloat16`.
        device: `auto`, `cuda`, `cuda:1`, ...
        turns: of dense and 2:4, for each shape.
    """

    models: tuple[str, ...]
    size: int | None = None
    batches: tuple[int, ...] = (1,)
    dtype: str = "bfloat16"
    device: str = "auto"
    turns: int = 20


@dataclass(frozen=True)
class Shape:
    """One shape of a model's layers.

    Attributes:
        model: as it was named.
        batch: samples.
        tokens: rows of the input, of all samples together.
        inputs: columns of the weight.
        outputs: rows of the weight.
        layers: how many have it.
        example: the first of them.
        bias: whether any has a bias.
    """

    model: str
    batch: int
    tokens: int
    inputs: int
    outputs: int
    layers: int
    example: str
    bias: bool


def run(settings: Settings, progress: Progress, output: Path | None) -> str:
    """Measures every shape, dense and 2:4 in turns.

    Args:
        settings: what to measure.
        progress: shows a bar, and a line for each shape.
        output: a JSON file, written anew after every row.

    Returns:
        The table.

    Raises:
        CompressorError: if there is no GPU or no cuSPARSELt, or a model cannot be had.
    """
    device = pick_device(settings.device)
    product.check("probe", device)
    size, wanted = shapes(settings)
    if output is not None:
        results.claim(output)
    rows: list[Row] = []
    done: dict[tuple[int, int, int, bool], Timed] = {}
    head = Table(
        " ".join(["compressor", *sys.argv[1:]]),
        product.gpu(device),
        settings.dtype,
        size,
        versions(),
        (),
    )
    with progress.task("measuring shapes", len(wanted)) as advance:
        for shape in wanted:
            key = shape.tokens, shape.inputs, shape.outputs, shape.bias
            if key not in done:
                done[key] = product.measure(
                    *key[:3],
                    bias=shape.bias,
                    dtype=getattr(torch, settings.dtype),
                    device=device,
                    turns=settings.turns,
                )
                torch.cuda.empty_cache()
            rows.append(_row(shape, done[key]))
            if output is not None:
                table.write(Table(**{**vars(head), "rows": tuple(rows)}), output)
            advance(1)
    return table.as_text(Table(**{**vars(head), "rows": tuple(rows)}))


def versions() -> dict[str, str]:
    """Those of a result, and cuSPARSELt's."""
    return measure.versions() | {"cusparselt": product.version()}


def shapes(settings: Settings) -> tuple[int, list[Shape]]:
    """The distinct shapes of every model, batch by batch, and the size that they are of.

    Raises:
        CompressorError: if a model is neither known nor a recipe, or they are of several sizes.
    """
    if not settings.models:
        raise CompressorError(f"should name a recipe or at least one model; known: {models.known()}")
    found: list[Shape] = []
    sizes: dict[str, int] = {}
    for name in dict.fromkeys(settings.models):
        known = name in models.MODELS
        sizes[name], targets, seen = _known(name, settings.size or 1024) if known else _recipe(name, settings.size)
        for batch in dict.fromkeys(settings.batches):
            found += distinct(name, batch, targets, seen)
    if len(set(sizes.values())) > 1:
        raise CompressorError(
            "size: should be the same for all, found "
            + ", ".join(f"{size} for {name}" for name, size in sizes.items())
            + "; give --size, or probe them one by one"
        )
    return next(iter(sizes.values())), found


def distinct(model: str, batch: int, targets: Iterable[Target], seen: Trace) -> list[Shape]:
    """One entry for all layers of a shape, in order of execution."""
    alike: dict[tuple[int, int, int], list[Target]] = {}
    for target in targets:
        alike.setdefault((batch * seen.tokens[target.name], target.inputs, target.outputs), []).append(target)
    return [
        Shape(
            model,
            batch,
            *key,
            layers=len(members),
            example=members[0].name,
            bias=any(member.module.bias is not None for member in members),
        )
        for key, members in alike.items()
    ]


def _known(name: str, size: int) -> tuple[int, tuple[Target, ...], Trace]:
    model = models.find(name)
    check_size(model, size)
    family: Family = registry.load("family", model.family)
    twin = networks.build(model, family, None, torch.device("meta"), torch.float32)
    return size, find_targets(twin, family), networks.trace_of(model, family, twin, size)


def _recipe(file: str, size: int | None) -> tuple[int, tuple[Target, ...], Trace]:
    """All layers that the recipe's `prune` names, at the size that it calibrates at."""
    if not Path(file).exists() and file not in recipe.shipped():
        models.find(file)  # says which are known
    loaded = recipe.load(file)
    folder = pipelines.open_folder(loaded.model, weights=False)
    twin = folder.twin()
    height, width = size_of(loaded, folder)
    if height != width or size not in (None, height):
        raise CompressorError(
            f"{file}: should be probed at the size that it calibrates at, {width} x {height} pixels, found --size "
            f"{size}"
            if size is not None
            else f"{file}: should calibrate at a square size to be probed, found {width} x {height} pixels"
        )
    every = find_targets(twin, folder.family, adaln=True)
    chosen = {target.name for entry in loaded.prune for target in select(every, *_patterns(entry))}
    targets = tuple(target for target in every if target.name in chosen)
    return height, targets, trace_at(twin, loaded, folder)


def _patterns(entry: recipe.Pruning) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return entry.targets.include, entry.targets.exclude


def _row(shape: Shape, timed: Timed) -> Row:
    return Row(
        model=shape.model,
        batch=shape.batch,
        tokens=shape.tokens,
        inputs=shape.inputs,
        outputs=shape.outputs,
        layers=shape.layers,
        example=shape.example,
        dense=timed.dense,
        sparse=timed.sparse,
        algorithm=timed.algorithm,
        error=timed.error,
        note=timed.note,
    )
