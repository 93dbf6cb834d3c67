"""Everything that a recipe needs before its first weight changes: model, targets, prompts, calibration, metrics."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from compressor import checkpoint, pictures, prompts
from compressor import pipeline as pipelines
from compressor.calibration import Calibration, compiled, sampling
from compressor.entries import Entry, check_apart, enter, explain_left_out
from compressor.errors import CompressorError
from compressor.measure import Stopwatch, versions
from compressor.output import claim
from compressor.pipeline import Pipeline
from compressor.plugin import Metric, Samples
from compressor.progress import Progress
from compressor.ranks import ALONE, Ranks, digest, fingerprint, sources
from compressor.recipe import Recipe
from compressor.registry import KINDS, Choice, find, load
from compressor.report import GroupSize
from compressor.structure import Trace, find_groups, keep
from compressor.twin import check_table, shrink_twin, trace_at

Drawn = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Prepared:
    """A recipe, ready to be carried out.

    Attributes:
        recipe: as it was read.
        pipeline: on its device.
        trace: one forward of the network's meta-device twin.
        entries: one for each pruner.
        overrides: where the dependency graph differs from the family's table of groups, which counts, and why.
        warnings: what the user was told already.
        calibration: None if no pruner asks for one.
        prompts: what is drawn, dense and pruned.
        encoded: the same, as the network is given them.
        metrics: by name.
        ranks: the processes that share the job; `encoded` are this one's prompts.
    """

    recipe: Recipe
    pipeline: Pipeline
    trace: Trace
    entries: tuple[Entry, ...]
    overrides: tuple[str, ...]
    warnings: tuple[str, ...]
    calibration: Calibration | None
    prompts: tuple[str, ...]
    encoded: tuple[sampling.Encoded, ...]
    metrics: dict[str, Metric]
    ranks: Ranks = ALONE

    def draw(self, progress: Progress, title: str) -> Drawn | None:
        """Draws every prompt with the network as it is now: images and final latents, or None if there is none."""
        if not self.prompts:
            return None
        recipe = self.recipe
        given, other = recipe.report, recipe.calibration
        height = given.height or (other.height if other else None)
        width = given.width or (other.width if other else None)
        settings = sampling.Settings(given.steps, given.guidance, height, width)
        drawn = None
        if self.encoded:
            drawn = pictures.draw(self.pipeline, self.encoded, settings, recipe.report.batch, progress, title)
        every = [pair for pair in self.ranks.gather(drawn) if pair is not None]
        return _merge([images for images, _ in every]), _merge([latents for _, latents in every])

    def trace_left(self, rows: Iterable[GroupSize]) -> Trace:
        """One forward of the network's meta-device twin with as many heads and neurons as are left of some groups."""
        left = {row.name: row.after for row in rows if row.after < row.before}
        if not left:
            return self.trace
        folder = self.pipeline.folder
        twin = folder.twin()
        for group in find_groups(twin, folder.family):
            keep(group, range(left.get(group.name, group.count)))
        return trace_at(twin, self.recipe, folder)

    def pairs(self, dense: Drawn | None, pruned: Drawn | None) -> Samples | None:
        """What was drawn before and after, side by side."""
        if dense is None or pruned is None:
            return None
        return Samples(self.prompts, dense[0], pruned[0], dense[1], pruned[1])


def prepare(
    recipe: Recipe,
    output: Path,
    watch: Stopwatch,
    progress: Progress,
    *,
    overwrite: bool = False,
    alternatives: bool = False,
    ranks: Ranks = ALONE,
) -> Prepared:
    """Finds everything that could be wrong before anything slow is done, and loads the model.

    Args:
        recipe: checked.
        output: where the result will go.
        watch: gets the phases `load` and `encode`.
        progress: told what is being done.
        overwrite: replace an output folder that is not an earlier result.
        alternatives: the entries of `prune` are tried one at a time, so that they may name the same layers.
        ranks: the processes that share the job.

    Raises:
        CompressorError: for prompts, exporters, a model, layers or an output folder that do not fit.
    """
    with watch.phase("load"):
        calibrating, drawing = _read_prompts(recipe)
        metrics = _choose_metrics(recipe)
        _check_installed(recipe)
        folder = pipelines.open_folder(recipe.model)
        check_exporters(recipe, folder)
        ranks.agree(_what_decides(recipe, calibrating, drawing) if ranks.count > 1 else {})
        if ranks.first:
            claim(output, folder.path, overwrite)
        twin = folder.twin()
        seen = trace_at(twin, recipe, folder)
        planned = enter(recipe, folder.network, twin, folder.family, seen)
        overrides = check_table(planned, recipe, folder)
        if not alternatives:
            check_apart(planned)
            if shrink_twin(planned):
                trace_at(twin, recipe, folder)  # or this is where it would fail
        device = ranks.device(recipe.device)
        if calibrating and recipe.calibration is not None and recipe.calibration.compile:
            compiled.check(pipelines.pick_device(device))
        progress.say(f"loading {recipe.model.source}")
        pipeline = pipelines.load(recipe.model, device, folder, turns=recipe.offload == "model")
        watch.device = pipeline.device
        explained = (*explain_guidance(recipe, folder), *explain_left_out(planned), *explain_dense(recipe))
        warnings = (*pipeline.warnings, *explained)
        for warning in warnings:
            progress.say(f"warning: {warning}")
        space = {} if alternatives else exports_space(recipe, pipeline)
        if ranks.first:
            checkpoint.check_space(pipeline, output, space)
        if ranks.count > 1:
            weights = sum(fingerprint(tensor) for tensor in pipeline.module.state_dict().values())
            ranks.agree({f"the weights of {recipe.model.source}": weights})
        entries = enter(recipe, pipeline.component_name, pipeline.module, folder.family, seen)
        ranks.agree({f"the layers of {entry.where}": _digest(entry) for entry in entries})
    with watch.phase("encode"):
        length = recipe.calibration.max_sequence_length if recipe.calibration else None
        mine = ranks.mine(range(len(drawing)))
        encoded = sampling.encode(pipeline, drawing, recipe.report.guidance, recipe.seed, "pictures", length, mine)
        calibration = None
        if calibrating and recipe.calibration is not None:
            calibration = Calibration(pipeline, seen, recipe.calibration, calibrating, recipe.seed, progress, ranks)
    return Prepared(
        recipe=recipe,
        pipeline=pipeline,
        trace=seen,
        entries=entries,
        overrides=overrides,
        warnings=warnings,
        calibration=calibration,
        prompts=drawing,
        encoded=tuple(encoded),
        metrics=metrics,
        ranks=ranks,
    )


def _what_decides(recipe: Recipe, *prompts: tuple[str, ...]) -> dict[str, object]:
    """What has to be the same in all processes for their results to fit together, in words."""
    plugins = {entry.module.split(".")[0] for kind in KINDS for entry in find(kind).values()}
    return {
        **{f"{key} of the recipe": value for key, value in recipe.dump().items()},
        "the prompts": digest(prompts),
        **{f"the version of {name}": version for name, version in versions().items()},
        **sources(["compressor", *sorted(plugins - {"compressor"})]),
    }


def _digest(entry: Entry) -> str:
    """The layers of an entry in short, and how many heads or neurons leave."""
    names = [target.name for target in entry.layers]
    return f"{len(names)} ({digest((names, {group.name: count for group, count in entry.removals.items()}))})"


def _merge(shares: list[Tensor]) -> Tensor:
    """What several processes drew, in the order of the prompts: each drew every so manieth."""
    if len(shares) == 1:
        return shares[0]  # all pictures would be held twice
    return torch.stack([shares[i % len(shares)][i // len(shares)] for i in range(sum(map(len, shares)))])


def explain_guidance(recipe: Recipe, folder: pipelines.Folder) -> tuple[str, ...]:
    """A warning for each guidance scale that the recipe gives to a pipeline that takes none."""
    given = {"calibration": recipe.calibration, "report": recipe.report}
    useless = [
        f"{name}.guidance"
        for name, options in given.items()
        if options is not None and "guidance" in options.model_fields_set and options.guidance > 1
    ]
    if sampling.takes_guidance(folder):
        return ()
    return tuple(
        f"{name} has no effect: this {folder.pipeline_class} was trained without a guidance scale" for name in useless
    )


def explain_dense(recipe: Recipe) -> tuple[str, ...]:
    """A warning if the recipe asks for pictures before and after a pruning that it has none of."""
    if recipe.prune or "report" not in recipe.model_fields_set or not recipe.report.images:
        return ()
    return ("report has no effect: nothing is pruned, so that there is nothing to compare",)


def check_exporters(recipe: Recipe, folder: pipelines.Folder) -> None:
    """Lets each exporter look at the model.

    Raises:
        CompressorError: naming the first one whose options do not suit it.
    """
    for i, exporter in enumerate(recipe.export):
        try:
            exporter.check(folder)
        except CompressorError as error:
            raise CompressorError(f"export[{i}].{Choice('exporter').name(exporter)}.{error}") from None


def exports_space(recipe: Recipe, pipeline: Pipeline) -> dict[str, int]:
    """About how many bytes each export will take, by the exporter's name.

    Raises:
        CompressorError: naming the first one that cannot export something it was asked for.
    """
    space: dict[str, int] = {}
    for i, exporter in enumerate(recipe.export):
        name = Choice("exporter").name(exporter)
        try:
            space[name] = exporter.space(pipeline)
        except CompressorError as error:
            raise CompressorError(f"export[{i}].{name}.{error}") from None
    return space


def _read_prompts(recipe: Recipe) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The prompts to calibrate with and those to draw."""
    calibrating: tuple[str, ...] = ()
    if recipe.calibration is not None and any(entry.pruner.moments != "none" for entry in recipe.prune):
        found = prompts.read(recipe.calibration.prompts, "calibration")
        calibrating = prompts.draw(found, recipe.calibration.samples, recipe.seed)
    source = recipe.report.prompts or (recipe.calibration.prompts if recipe.calibration else None)
    drawing: tuple[str, ...] = ()
    if recipe.prune and recipe.report.images and source is not None:
        drawing = prompts.read(source, "evaluation")[: recipe.report.images]
    return calibrating, drawing


def _choose_metrics(recipe: Recipe) -> dict[str, Metric]:
    if recipe.report.metrics is not None:
        return {Choice("metric").name(metric): metric for metric in recipe.report.metrics}
    classes = {name: load("metric", name) for name in find("metric")}
    every = {name: cls() for name, cls in classes.items() if not cls.required_options()}
    return {name: metric for name, metric in every.items() if metric.applies(recipe.model.source)}


def _check_installed(recipe: Recipe) -> None:
    for i, exporter in enumerate(recipe.export):
        if (missing := exporter.available()) is not None:
            raise CompressorError(f"export[{i}]: {missing}")
