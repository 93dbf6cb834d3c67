"""Tries every entry of a recipe's `prune` by itself on the same dense model, and tables what each one does to it."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from compressor import measure, report
from compressor.errors import CompressorError
from compressor.measure import Stopwatch
from compressor.options import Options
from compressor.output import write_whole
from compressor.prepare import Prepared, prepare
from compressor.progress import Progress
from compressor.pruning import prune
from compressor.recipe import Recipe
from compressor.report.pairs import latent_errors
from compressor.structure import Snapshot
from compressor.units import count


@dataclass(frozen=True)
class Ratio:
    """A row's latent error as a multiple of that of a row above, which took as many weights in the same granularity.

    Attributes:
        of: the entry of the row above.
        mean: ratio of the two means over the images.
        standard_error: of `mean`, over pairs of images from equal noise (delta method); None for one image.
    """

    of: str
    mean: float
    standard_error: float | None


@dataclass(frozen=True)
class Row:
    """What one entry did.

    Attributes:
        entry: its place in the recipe.
        pruner: the plugin, the options that differ from its defaults, and its targets where they do.
        sparsity: share of the weights of the layers it changed that left or are zero.
        network: share of all the network's parameters that left or are zero, those included that were zero before.
        parameters: of the network, after.
        operations: multiply-adds of one forward, after, as a dense kernel does them.
        seconds: calibration and solving, without drawing.
        figures: by metric and name.
        ratio: to the first row above that is alike; None if none is.
        warnings: what the user should know.
    """

    entry: str
    pruner: str
    sparsity: float
    network: float
    parameters: int
    operations: int
    seconds: float
    figures: dict[str, dict[str, float]]
    ratio: Ratio | None
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class _Measured:
    """What later rows are held against.

    Attributes:
        entry: its place in the recipe.
        granularity: class of the pruner's own; None for a pruner without.
        gone: how many weights left or are zero.
        errors: of each image's final latents, on the CPU.
    """

    entry: str
    granularity: type | None
    gone: int
    errors: Tensor


ALIKE = 0.01
"""How far the numbers of weights gone may be apart, relatively, for two rows to be held against each other: whole heads
and neurons do not come out at equal numbers."""


def compare(recipe: Recipe, progress: Progress, folder: Path) -> tuple[Row, ...]:
    """Prunes the dense network anew with each entry, draws the same pictures from the same noise, and measures them.

    Args:
        recipe: its `prune` lists alternatives here, not steps; its `output` and `export` are not used.
        progress: told what is being done.
        folder: gets `compare.json` and `compare.md`, written anew after every entry, each in one step: what is done
            survives a process that is ended.

    Raises:
        CompressorError: as the run would, and if the recipe prunes nothing or draws no pictures.
    """
    if not recipe.prune:
        raise CompressorError("prune: should have at least one entry to compare, found none")
    if not recipe.report.images:
        raise CompressorError("report.images: should be at least 1 to compare by, found 0")
    job = prepare(recipe, folder / "unused", Stopwatch(), progress, overwrite=True, alternatives=True)
    dense = job.draw(progress, "drawing, dense")
    targets = {target.name: target for entry in job.entries for target in entry.layers}
    original = Snapshot(targets.values(), [group for entry in job.entries for group in entry.removals])
    whole = sum(p.numel() for p in job.pipeline.module.parameters())
    rows: list[Row] = []
    above: list[_Measured] = []
    for number, entry in enumerate(job.entries, start=1):
        progress.say(f"{number} of {len(job.entries)}: {_describe(recipe, number - 1)}")
        original.restore()
        if job.calibration is not None:
            job.calibration.start_over()
        start = time.perf_counter()
        pruned = prune(entry, job.pipeline, job.calibration, progress)
        seconds = time.perf_counter() - start
        pairs = job.pairs(dense, job.draw(progress, "drawing, pruned"))
        assert pairs is not None
        figures, notes = report.measure(job.metrics, pairs)
        measured = _Measured(
            entry=entry.where,
            granularity=_granularity(recipe.prune[number - 1].pruner),
            gone=sum(layer.gone for layer in pruned.layers),
            errors=latent_errors(pairs).cpu(),
        )
        said = (*job.warnings, *(job.calibration.facts.warnings if job.calibration else ()), *notes)
        rows.append(
            Row(
                entry=entry.where,
                pruner=_describe(recipe, number - 1),
                sparsity=report.sparsity(pruned.layers)[1],
                network=1 - sum(int(p.count_nonzero()) for p in job.pipeline.module.parameters()) / whole,
                parameters=sum(p.numel() for p in job.pipeline.module.parameters()),
                operations=job.trace_left(pruned.groups).macs,
                seconds=seconds,
                figures=figures,
                ratio=_ratio(measured, above),
                warnings=said,
            )
        )
        above.append(measured)
        _write(job, rows, folder)
    return tuple(rows)


def _granularity(pruner: Options) -> type | None:
    """Of pruners that have an option of that name, as those of this project do."""
    found = getattr(pruner, "granularity", None)
    return None if found is None else type(found)


def _ratio(row: _Measured, above: list[_Measured]) -> Ratio | None:
    for other in above:
        if other.granularity is row.granularity and abs(other.gone - row.gone) <= ALIKE * other.gone:
            mean, error = ratio_of_means(row.errors, other.errors)
            return Ratio(other.entry, mean, error) if math.isfinite(mean) else None
    return None


def ratio_of_means(numerator_N: Tensor, denominator_N: Tensor) -> tuple[float, float | None]:
    """The ratio of two means over the same N samples, and its standard error by the delta method.

    With r the ratio, it is that of the mean of numerator - r denominator, over the denominator's mean: what both have
    in common, such as an image that is hard for every pruner, does not blur it.
    """
    ratio = (numerator_N.mean() / denominator_N.mean()).item()
    if len(numerator_N) < 2:
        return ratio, None
    rest_N = numerator_N - ratio * denominator_N
    return ratio, (rest_N.std() / len(rest_N) ** 0.5 / denominator_N.mean()).item()


def table(rows: tuple[Row, ...], names: tuple[str, ...]) -> str:
    """A Markdown table: one row an entry, one column a figure `metric.name`, with standard errors.

    The ratio stands in the last column but one, with the number of the row that it is to.
    """
    lines = [
        "| row | pruner | gone | of the network | parameters | operations | "
        + " | ".join(name.partition(".")[2].replace("_", " ") for name in names)
        + " | latent error, of that of row | seconds |",
        "| --- | --- | --- | --- | --- | --- | " + " | ".join("---" for _ in names) + " | --- | --- |",
    ]
    numbers = {row.entry: number for number, row in enumerate(rows, start=1)}
    for row in rows:
        cells = [_figure(row, name) for name in names]
        cells.append(
            ""
            if row.ratio is None
            else f"{_with_error(row.ratio.mean, row.ratio.standard_error)} of {numbers[row.ratio.of]}"
        )
        sizes = f"{row.sparsity:.1%} | {row.network:.1%} | {count(row.parameters)} | {count(row.operations)}"
        lines.append(f"| {numbers[row.entry]} | {row.pruner} | {sizes} | {' | '.join(cells)} | {row.seconds:.1f} |")
    return "\n".join(lines) + "\n"


def _figure(row: Row, name: str) -> str:
    metric, _, key = name.partition(".")
    figures = row.figures.get(metric, {})
    if key not in figures:
        return "-"
    return _with_error(figures[key], figures.get(f"{key}_se"))


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.4g}" + (f" ± {error:.2g}" if error is not None else "")


def _describe(recipe: Recipe, index: int) -> str:
    """`obs_diff, sparsity 0.5, weighting uniform, include adaln`: the options and targets that were given."""
    entry, given = recipe.dump()["prune"][index], recipe.prune[index]
    name, options = next((key, value) for key, value in entry.items() if key != "targets")
    chosen = [f"{key} {' + '.join(entry['targets'][key])}" for key in entry["targets"] if _differs(given.targets, key)]
    return ", ".join([name, *_given(given.pruner, options), *chosen])


def _differs(options: Options, key: str) -> bool:
    return getattr(options, key) != type(options).model_fields[key].default


def _given(plugin: Options, options: dict[str, Any]) -> list[str]:
    """The options that were given, in words; `{"n_m": {"keep": 2, "of": 4}}` is `n_m keep 2 of 4`."""
    words = []
    for key in (key for key in options if key in plugin.model_fields_set):
        inner = getattr(plugin, key)
        if isinstance(inner, Options):
            name = next(iter(options[key]))
            words.append(" ".join([key, name, *_given(inner, options[key][name])]))
        else:
            words.append(f"{key} {options[key]}")
    return words


def _write(job: Prepared, rows: list[Row], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    data = {
        "recipe": job.recipe.dump(),
        "versions": measure.versions(),
        "device": measure.device_name(job.pipeline.device),
        "rows": [asdict(row) for row in rows],
    }
    figures = rows[0].figures
    names = tuple(f"{m}.{k}" for m in figures for k in figures[m] if not k.endswith("_se") and k != "images")
    changing = tuple(n for n in names if not n.partition(".")[2].startswith("dense_"))
    write_whole(folder / "compare.md", table(tuple(rows), changing))
    write_whole(folder / "compare.json", json.dumps(data, indent=1, ensure_ascii=False) + "\n")
