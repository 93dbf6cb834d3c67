"""The main job on one page: load, prune, prove, save, export, report."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from compressor import calibration, checkpoint, measure, pictures, prompts, report
from compressor import pipeline as pipelines
from compressor.calibration import sampling
from compressor.errors import CompressorError
from compressor.measure import Stopwatch
from compressor.pipeline import Pipeline
from compressor.plugin import LayerResult, Samples
from compressor.progress import Progress
from compressor.recipe import Recipe
from compressor.registry import Choice, find, load
from compressor.structure import Component, Target, Trace, select, trace


@dataclass
class Pruned:
    """What the pruners did, layer by layer, and what the user should know of it."""

    rows: dict[str, report.LayerRow] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def run(recipe: Recipe, progress: Progress, *, overwrite: bool = False) -> Path:
    """Does what a recipe says.

    Args:
        recipe: checked.
        progress: told what is being done.
        overwrite: replace an output folder that is not an earlier result.

    Returns:
        The folder of the result: the pruned pipeline, `compression.json`, `report.json`, `report.html`, and one folder
        for each exporter.

    Raises:
        CompressorError: for anything a user can mend. Until the result is saved, nothing of an earlier one is touched.
    """
    watch = Stopwatch()
    output = Path(recipe.output)
    with watch.phase("load"):
        calibration_prompts, picture_prompts = _read_prompts(recipe)
        metrics = _choose_metrics(recipe)
        _check_exporters(recipe)
        folder = pipelines.open_folder(recipe.model)
        checkpoint.claim(output, folder.path, overwrite)
        progress.say(f"loading {recipe.model.source}")
        pipeline = pipelines.load(recipe.model, recipe.device)
        seen = _trace(recipe, pipeline)
        components = [_choose_targets(entry, pipeline) for entry in recipe.prune]
        before = measure.size(pipeline.module, seen, folder.path / pipeline.component_name)

    with watch.phase("encode"):
        encoded = sampling.encode(pipeline, picture_prompts, recipe.report.guidance, recipe.seed, "pictures")
        samples = _calibration(recipe, pipeline, seen, calibration_prompts, progress)
    dense = _draw(recipe, pipeline, encoded, progress, watch, "dense")

    pruned = Pruned()
    for i, (entry, component) in enumerate(zip(recipe.prune, components, strict=True)):
        name = next(iter(Choice("pruner").write(entry.pruner)))
        with watch.phase("prune"), progress.task(f"pruning with {name}", len(component.targets)) as advance:
            results = []
            for result in entry.pruner.prune(component, samples):
                results.append(result)
                advance(1)
            checkpoint.round_to_stored(pipeline)
            _verify(name, f"prune[{i}]", component, results, pruned)
    if samples is not None:
        watch.move("prune", "calibrate", samples.facts.seconds)
        pruned.warnings += samples.facts.warnings
    after = _draw(recipe, pipeline, encoded, progress, watch, "pruned")

    with watch.phase("save"):
        progress.say(f"saving to {output}")
        checkpoint.save(pipeline, output, _record(recipe, pipeline, pruned))
    with watch.phase("measure"):
        pairs = Samples(tuple(picture_prompts), *_paired(dense, after)) if dense and after else None
        figures, notes = report.measure(metrics, pairs) if pairs else ({}, ())
        sizes = report.Sizes(before, measure.size(pipeline.module, seen, output / pipeline.component_name))
    facts = report.Report(
        recipe=recipe.dump(),
        versions=measure.versions(),
        device=measure.device_name(pipeline.device),
        model=report.ModelFacts(
            recipe.model.source,
            folder.pipeline_class,
            pipeline.component_name,
            pipeline.family.component_class,
            pipeline.family.name,
            str(pipeline.dtype).removeprefix("torch."),
        ),
        layers=tuple(pruned.rows.values()),
        sizes=sizes,
        times=dict(watch.seconds),
        peak_memory=measure.peak_memory(),
        calibration=_calibration_facts(recipe, samples, len(calibration_prompts)),
        metrics=figures,
        warnings=(*pruned.warnings, *notes),
    )
    report.write(facts, pairs, output)
    exports = _export(recipe, output, watch, progress)
    if exports:
        facts = replace(facts, exports=exports, times=dict(watch.seconds), peak_memory=measure.peak_memory())
        report.write(facts, pairs, output)
    for warning in facts.warnings:
        progress.say(f"warning: {warning}")
    return output


def _read_prompts(recipe: Recipe) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The prompts to calibrate with and those to draw."""
    calibrating: tuple[str, ...] = ()
    if recipe.calibration is not None and any(entry.pruner.moments != "none" for entry in recipe.prune):
        found = prompts.read(recipe.calibration.prompts, "calibration")
        calibrating = prompts.draw(found, recipe.calibration.samples, recipe.seed)
    source = recipe.report.prompts or (recipe.calibration.prompts if recipe.calibration else None)
    drawing: tuple[str, ...] = ()
    if recipe.report.images and source is not None:
        drawing = prompts.read(source, "evaluation")[: recipe.report.images]
    return calibrating, drawing


def _choose_metrics(recipe: Recipe) -> dict[str, Any]:
    if recipe.report.metrics is not None:
        return {next(iter(Choice("metric").write(metric))): metric for metric in recipe.report.metrics}
    every = {name: load("metric", name)() for name in find("metric")}
    return {name: metric for name, metric in every.items() if metric.applies(recipe.model.source)}


def _check_exporters(recipe: Recipe) -> None:
    for i, exporter in enumerate(recipe.export):
        if (missing := exporter.available()) is not None:
            raise CompressorError(f"export[{i}]: {missing}")


def _trace(recipe: Recipe, pipeline: Pipeline) -> Trace:
    folder = pipeline.folder
    given = recipe.calibration
    height = (given.height if given else None) or folder.default_size
    width = (given.width if given else None) or folder.default_size
    return trace(
        folder.twin(),
        folder.family,
        height=height // folder.vae_factor,
        width=width // folder.vae_factor,
        sequence=folder.text_tokens,
    )


def _choose_targets(entry: Any, pipeline: Pipeline) -> Component:
    targets = select(pipeline.targets, entry.targets.include, entry.targets.exclude)
    entry.pruner.check(targets)
    return Component(pipeline.component_name, pipeline.module, pipeline.family, targets)


def _calibration(
    recipe: Recipe, pipeline: Pipeline, seen: Trace, texts: tuple[str, ...], progress: Progress
) -> calibration.Calibration | None:
    if not texts or recipe.calibration is None:
        return None
    result = calibration.Calibration(pipeline, seen, recipe.calibration, texts, recipe.seed, progress)
    if len(texts) < recipe.calibration.samples and "samples" in recipe.calibration.model_fields_set:
        result.facts.warnings.append(
            f"calibration.samples asks for {recipe.calibration.samples} prompts and there are {len(texts)}; all were "
            "used"
        )
    return result


def _draw(
    recipe: Recipe,
    pipeline: Pipeline,
    encoded: list[sampling.Encoded],
    progress: Progress,
    watch: Stopwatch,
    which: str,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    if not encoded:
        return None
    given = recipe.calibration
    size = (given.height, given.width) if given else (None, None)
    settings = sampling.Settings(recipe.report.steps, recipe.report.guidance, *size)
    with watch.phase("draw"):
        return pictures.draw(pipeline, encoded, settings, recipe.report.batch, progress, f"drawing, {which}")


def _paired(dense: Any, after: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return dense[0], after[0], dense[1], after[1]


def _verify(name: str, where: str, component: Component, results: list[LayerResult], pruned: Pruned) -> None:
    """Counts the zeros again: every layer must have been pruned, and as much as was promised."""
    by_name = {result.name: result for result in results}
    for target in component.targets:
        result = by_name.get(target.name)
        if result is None:
            raise CompressorError(f"{where}: pruner '{name}' left out {target.name}; nothing was kept")
        weight = target.module.weight
        if not torch.isfinite(weight).all():
            raise CompressorError(
                f"{where}: pruner '{name}' left values in {target.name} that are not finite; nothing was kept"
            )
        zeros = int((weight == 0).sum())
        if zeros < result.zeros:
            raise CompressorError(
                f"{where}: pruner '{name}' should have made {result.zeros} weights of {target.name} zero, found "
                f"{zeros}; "
                "nothing was kept"
            )
        pruned.rows[target.name] = _row(name, target, result, zeros)


def _row(pruner: str, target: Target, result: LayerResult, zeros: int) -> report.LayerRow:
    layer = target.layer
    return report.LayerRow(
        name=target.name,
        block=target.block,
        part=layer.part,
        role=layer.role,
        stream=layer.stream,
        pruner=pruner,
        parameters=target.module.weight.numel(),
        asked=result.zeros,
        zeros=zeros,
        error=result.error,
        damping=result.damping,
        seconds=result.seconds,
        notes=result.notes,
    )


def _record(recipe: Recipe, pipeline: Pipeline, pruned: Pruned) -> dict[str, Any]:
    """What `compression.json` says: nothing in it depends on when or where the run took place."""
    data = recipe.dump()
    del data["output"]
    return {
        "recipe": data,
        "seed": recipe.seed,
        "versions": measure.versions(),
        "component": pipeline.component_name,
        "layers": {
            row.name: {
                "pruner": row.pruner,
                "parameters": row.parameters,
                "zeros": row.zeros,
                "sparsity": row.sparsity,
                "error": row.error,
            }
            for row in pruned.rows.values()
        },
    }


def _calibration_facts(
    recipe: Recipe, samples: calibration.Calibration | None, count: int
) -> report.CalibrationFacts | None:
    if samples is None or recipe.calibration is None:
        return None
    return report.CalibrationFacts(
        prompts=count,
        steps=recipe.calibration.steps,
        guidance=recipe.calibration.guidance,
        batch=samples.facts.batch,
        packages=samples.facts.packages,
        forwards=samples.facts.forwards,
        tokens=samples.facts.tokens,
        nonfinite=samples.facts.skipped,
    )


def _export(recipe: Recipe, output: Path, watch: Stopwatch, progress: Progress) -> tuple[report.ExportFacts, ...]:
    """Exports the result as reloaded from disk, so that what is exported is what was saved."""
    if not recipe.export:
        return ()
    saved = checkpoint.load(output, recipe.device, recipe.model.dtype)
    exports = []
    for exporter in recipe.export:
        name = next(iter(Choice("exporter").write(exporter)))
        folder = output / name
        folder.mkdir()
        progress.say(f"exporting with {name}")
        inner = Stopwatch()
        with watch.phase("export"), inner.phase(name):
            try:
                export = exporter.export(saved, folder)
            except CompressorError as error:
                raise CompressorError(f"{name}: {error}\nthe pruned pipeline is kept in {output}") from error
        sizes = {f"{name}/{file}": (folder / file).stat().st_size for file in export.files}
        exports.append(report.ExportFacts(name, sizes, export.checks, inner.seconds[name]))
    return tuple(exports)
