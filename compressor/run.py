"""The main job on one page: prepare, prune, prove, save, report, export."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from compressor import checkpoint, exported, measure, report
from compressor import pipeline as pipelines
from compressor.errors import CompressorError
from compressor.measure import Stopwatch
from compressor.plugin import Samples
from compressor.prepare import Prepared, prepare
from compressor.progress import Progress
from compressor.pruning import Pruned, prune
from compressor.ranks import ALONE, Ranks
from compressor.recipe import Recipe
from compressor.registry import Choice


def run(recipe: Recipe, progress: Progress, *, overwrite: bool = False, ranks: Ranks = ALONE) -> Path:
    """Does what a recipe says.

    Args:
        recipe: checked.
        progress: told what is being done.
        overwrite: replace an output folder that is not an earlier result.
        ranks: the processes that share the job, of which rank 0 writes.

    Returns:
        The folder of the result: the pruned pipeline, `compression.json`, `report.json`, `report.html`, and one folder
        for each exporter.

    Raises:
        CompressorError: for anything a user can mend. Until the result is saved, nothing of an earlier one is touched.
    """
    watch = Stopwatch()
    output = Path(recipe.output)
    job = prepare(recipe, output, watch, progress, overwrite=overwrite, ranks=ranks)
    pipeline = job.pipeline
    weights = job.pipeline.folder.path / pipeline.component_name
    with watch.phase("measure"):
        before = measure.size(pipeline.module, job.trace, weights)
        parts_before = measure.parts(pipeline.module, pipeline.family)
    with watch.phase("draw"):
        dense = job.draw(progress, "drawing, dense")

    done: list[Pruned] = []
    for entry in job.entries:
        with watch.phase("check"):
            done.append(prune(entry, pipeline, job.calibration, progress, ranks))
    rows = tuple(row for pruned in done for row in pruned.layers)
    _split(watch, done, job)

    with watch.phase("draw"):
        pairs = job.pairs(dense, job.draw(progress, "drawing, pruned"))
    processes, peaks = ranks.count, ranks.gather(measure.peak_memory(pipeline.device))
    ranks.leave()
    if not ranks.first:
        return output
    with watch.phase("save"):
        progress.say(f"saving to {output}")
        checkpoint.save(pipeline, output, _record(recipe, pipeline.component_name, rows))
    with watch.phase("measure"):
        figures, notes = report.measure(job.metrics, pairs) if pairs else ({}, ())
        seen = job.trace_left(row for pruned in done for row in pruned.groups)
        after = measure.size(pipeline.module, seen, output / pipeline.component_name)
        parts = _parts(parts_before, measure.parts(pipeline.module, pipeline.family)) if done else ()
    facts = _facts(job, done, report.Sizes(before, after), parts, watch, figures, notes)
    if processes > 1:
        facts = replace(
            facts,
            device=f"{facts.device}, {processes} processes",
            peak_memory=_most(*peaks, facts.peak_memory),
        )
    _tell(facts, pairs, output)

    if recipe.export:
        exports = _export(recipe, output, watch, progress)
        facts = replace(
            facts,
            exports=exports,
            times=dict(watch.seconds),
            peak_memory=_most(facts.peak_memory, measure.peak_memory(pipeline.device)),
        )
        _tell(facts, pairs, output)
    told = {*job.warnings, *(job.calibration.facts.warnings if job.calibration else [])}
    for warning in (text for text in facts.warnings if text not in told):
        progress.say(f"warning: {warning}")
    return output


def _most(*peaks: dict[str, int]) -> dict[str, int]:
    """The most of each kind of memory that any process had at any time."""
    return {kind: max(peak[kind] for peak in peaks) for kind in peaks[0]}


def _split(watch: Stopwatch, done: list[Pruned], job: Prepared) -> None:
    """Tells apart what the pruning took: `forwards` with all else of sampling, `moments`, `solves`, and the `check`."""
    pruning = sum(pruned.seconds for pruned in done)
    if job.calibration is not None:
        facts = job.calibration.facts
        watch.move("check", "forwards", facts.seconds - facts.moment_seconds)
        watch.move("check", "moments", facts.moment_seconds)
        pruning -= facts.seconds
    watch.move("check", "solves", pruning)


def _record(recipe: Recipe, component: str, rows: tuple[report.LayerRow, ...]) -> dict[str, Any]:
    """What `compression.json` says: nothing in it depends on when or where the run took place."""
    data = recipe.dump()
    del data["output"]
    layers = {
        row.name: {
            "pruner": row.pruner,
            "parameters": row.parameters,
            "removed": row.removed,
            "zeros": row.zeros,
            "sparsity": row.sparsity,
            "error": row.error,
        }
        for row in rows
    }
    return {
        "recipe": data,
        "seed": recipe.seed,
        "versions": measure.versions(),
        "component": component,
        "layers": layers,
    }


def _facts(
    job: Prepared,
    done: list[Pruned],
    sizes: report.Sizes,
    parts: tuple[report.PartRow, ...],
    watch: Stopwatch,
    figures: dict[str, dict[str, float]],
    notes: tuple[str, ...],
) -> report.Report:
    pipeline, recipe, calibration = job.pipeline, job.recipe, None
    if job.calibration is not None and recipe.calibration is not None:
        facts = job.calibration.facts
        calibration = report.CalibrationFacts(
            prompts=facts.prompts,
            steps=recipe.calibration.steps,
            guidance=recipe.calibration.guidance,
            batch=facts.batch,
            packages=facts.packages,
            forwards=facts.forwards,
            held=facts.held,
            differentiated=facts.differentiated,
            tokens=facts.tokens,
            nonfinite=facts.skipped,
        )
    return report.Report(
        recipe=recipe.dump(),
        versions=measure.versions(),
        device=measure.device_name(pipeline.device),
        model=report.ModelFacts(
            source=recipe.model.source,
            pipeline=pipeline.folder.pipeline_class,
            component=pipeline.component_name,
            component_class=pipeline.family.component_class,
            family=pipeline.family.name,
            dtype=str(pipeline.dtype).removeprefix("torch."),
        ),
        layers=tuple(row for pruned in done for row in pruned.layers),
        structure=_structure(job, done),
        parts=parts,
        sizes=sizes,
        times=dict(watch.seconds),
        peak_memory=measure.peak_memory(pipeline.device),
        calibration=calibration,
        metrics=figures,
        left_out={name: reason for entry in job.entries for name, reason in entry.left_out.items()},
        warnings=(
            *job.warnings,
            *(job.calibration.facts.warnings if job.calibration else _explain_idle(recipe)),
            *notes,
        ),
    )


def _parts(before: dict[str, measure.Part], after: dict[str, measure.Part]) -> tuple[report.PartRow, ...]:
    """What became of each part of the network."""
    return tuple(
        report.PartRow(name, part.layers, part.parameters, part.nonzero, after[name].nonzero)
        for name, part in before.items()
    )


def _structure(job: Prepared, done: list[Pruned]) -> report.Structure | None:
    """What left the network, and the proofs that nothing else changed."""
    groups = tuple(row for pruned in done for row in pruned.groups)
    if not groups:
        return None
    proofs = tuple(
        report.ProofFacts(
            layer_error=max(proof.errors.values()),
            layer_tolerance=proof.tolerance,
            network_error=proof.network_error,
            network_tolerance=proof.network_tolerance,
        )
        for proof in (pruned.proof for pruned in done)
        if proof is not None
    )
    return report.Structure(groups, job.overrides, proofs)


def _explain_idle(recipe: Recipe) -> tuple[str, ...]:
    if recipe.calibration is None:
        return ()
    return ("nothing was calibrated: no pruner of this recipe asks for the inputs of its layers",)


def _tell(facts: report.Report, pairs: Samples | None, output: Path) -> None:
    try:
        report.write(facts, pairs, output)
    except OSError as error:
        raise CompressorError(
            f"the report cannot be written to {output}: {error.strerror}; the pruned pipeline there is complete"
        ) from error


def _export(recipe: Recipe, output: Path, watch: Stopwatch, progress: Progress) -> tuple[report.ExportFacts, ...]:
    """Exports the result as reloaded from disk, so that what is exported is what was saved."""
    device = "cpu" if recipe.offload == "model" else recipe.device
    saved = checkpoint.load(output, device, recipe.model.dtype)
    exports = []
    for exporter in recipe.export:
        name = Choice("exporter").name(exporter)
        folder = output / name
        folder.mkdir()
        progress.say(f"exporting with {name}")
        inner = Stopwatch()
        inner.device = saved.device
        with watch.phase("export"), inner.phase(name), pipelines.current(saved.device):
            try:
                export = exporter.export(saved, folder)
                exported.write(exporter, export, folder, output)
            except BaseException as error:
                shutil.rmtree(folder, ignore_errors=True)
                if not isinstance(error, (CompressorError, OSError)):
                    raise
                words = f"{folder}: {error.strerror or error}" if isinstance(error, OSError) else error
                raise CompressorError(f"{name}: {words}\nthe pruned pipeline is kept in {output}") from error
        sizes = {f"{name}/{file}": (folder / file).stat().st_size for file in export.files}
        exports.append(report.ExportFacts(name, sizes, export.checks, inner.seconds[name]))
    return tuple(exports)
