"""Everything that a recipe needs before its first weight changes: model, targets, prompts, calibration, metrics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from compressor import checkpoint, pictures, prompts
from compressor import pipeline as pipelines
from compressor.calibration import Calibration, sampling
from compressor.errors import CompressorError
from compressor.measure import Stopwatch, versions
from compressor.output import claim
from compressor.pipeline import Pipeline
from compressor.plugin import Metric, Pruner, Samples
from compressor.progress import Progress
from compressor.ranks import ALONE, Ranks, digest, fingerprint, sources
from compressor.recipe import Recipe
from compressor.registry import KINDS, Choice, find, load
from compressor.report import GroupSize
from compressor.structure import (
    Component,
    Family,
    Group,
    Target,
    Trace,
    consumers,
    cross_check,
    find_groups,
    find_targets,
    keep,
    select,
    trace,
)
from compressor.units import several

Drawn = tuple[Tensor, Tensor]

_NO_UNITS = "adaLN, which has neither heads nor neurons"
"""Why a structured pruner leaves a layer as it is."""


@dataclass(frozen=True)
class Entry:
    """One entry of the recipe's `prune`, with the layers it is given.

    Attributes:
        where: its place in the recipe, as `prune[0]`.
        name: the plugin's name.
        pruner: the plugin.
        component: the network and the chosen layers.
        removals: how many heads or neurons will leave, by group, 0 for those of which none by rounding; empty unless
            the pruner is structured.
        choices: from which numbers calibration will choose instead, by the same groups.
        left_out: layers that the recipe chose and the pruner leaves as they are, and why.
    """

    where: str
    name: str
    pruner: Pruner
    component: Component
    removals: Mapping[Group, int] = field(default_factory=dict)
    choices: Mapping[Group, tuple[int, ...]] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)

    @property
    def layers(self) -> tuple[Target, ...]:
        """Those that may change, in order of execution: all that were chosen, or the linears of the groups."""
        if not self.removals:
            return self.component.targets
        changing = {target.name for group in self.removals for target in (*group.producers, *group.consumers)}
        every = find_targets(self.component.module, self.component.family)
        return tuple(target for target in every if target.name in changing)

    @property
    def calibrated(self) -> tuple[Target, ...]:
        """Those whose inputs the pruner asks for, if it asks for any, and for each of which it gives a result."""
        return consumers(self.shrinking) if self.removals else self.component.targets

    @property
    def shrinking(self) -> tuple[Group, ...]:
        """The groups that lose heads or neurons, or may."""
        return tuple(group for group, numbers in self.choices.items() if numbers[-1])


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
        progress.say(f"loading {recipe.model.source}")
        device = ranks.device(recipe.device)
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


def trace_at(twin: nn.Module, recipe: Recipe, folder: pipelines.Folder) -> Trace:
    """One forward of the meta-device twin, as `folder.twin()` makes it, at the size that the recipe calibrates at."""
    return trace(twin, folder.family, **_dimensions(recipe, folder))


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


def check_table(entries: tuple[Entry, ...], recipe: Recipe, folder: pipelines.Folder) -> tuple[str, ...]:
    """Holds the family's table of groups against torch-pruning's dependency graph, where something is to be removed.

    Args:
        entries: on the network's meta-device twin, as it is before anything is removed.
        recipe: whose size is used.
        folder: of the model.

    Returns:
        A line for each row of the table where they differ and the table is known to be right.

    Raises:
        CompressorError: if they differ and nothing is known.
    """
    removing = [entry for entry in entries if entry.removals]
    if not removing:
        return ()
    twin = removing[0].component.module
    return cross_check(twin, folder.family, folder.family.inputs(twin, batch=1, **_dimensions(recipe, folder)))


def _dimensions(recipe: Recipe, folder: pipelines.Folder) -> dict[str, int]:
    """Latent rows and columns, and text tokens."""
    height, width = size_of(recipe, folder)
    factor = folder.vae_factor
    sequence = folder.text_tokens(recipe.calibration.max_sequence_length if recipe.calibration else None)
    return {"height": height // factor, "width": width // factor, "sequence": sequence}


def size_of(recipe: Recipe, folder: pipelines.Folder) -> tuple[int, int]:
    """Height and width of images in pixels.

    Raises:
        CompressorError: if the network cannot draw at the size that the recipe gives.
    """
    given, shown = recipe.calibration, recipe.report
    folder.check_size(shown.height, shown.width, "report.")
    if given is not None:
        folder.check_size(given.height, given.width, "calibration.")
        folder.check_sequence(given.max_sequence_length, "calibration.max_sequence_length")
    at = given or shown
    return at.height or folder.default_size, at.width or folder.default_size


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


def enter(recipe: Recipe, name: str, module: nn.Module, family: Family, seen: Trace) -> tuple[Entry, ...]:
    """Gives every entry of the recipe's `prune` its layers.

    Args:
        recipe: checked.
        name: of the network.
        module: the network, possibly on the meta device.
        family: its table.
        seen: a forward of one sample, which says how many tokens each layer is given.

    Raises:
        CompressorError: if a pattern matches nothing, or a pruner leaves out all layers that it is given, or cannot
            prune one of the others.
    """
    linears = find_targets(module, family, adaln=True)
    entries = []
    for i, entry in enumerate(recipe.prune):
        try:
            targets = select(linears, entry.targets.include, entry.targets.exclude)
        except CompressorError as error:
            raise CompressorError(f"prune[{i}].{error}") from None
        left_out = _leave_out(f"prune[{i}]", entry.pruner, targets, seen)
        targets = tuple(target for target in targets if target.name not in left_out)
        entry.pruner.check(targets)
        component = Component(name, module, family, targets)
        try:
            removals = entry.pruner.removals(component)
        except CompressorError as error:
            raise CompressorError(f"prune[{i}]: {error}") from None
        if removals:
            whole = {target.name: _NO_UNITS for target in targets if target.layer.part == "adaln"}
            component = replace(component, targets=tuple(t for t in targets if t.name not in whole))
            left_out |= whole
        plugin = Choice("pruner").name(entry.pruner)
        choices = {group: entry.pruner.choices(group, count) for group, count in removals.items()}
        entries.append(Entry(f"prune[{i}]", plugin, entry.pruner, component, removals, choices, left_out))
    return tuple(entries)


def _leave_out(where: str, pruner: Pruner, targets: tuple[Target, ...], seen: Trace) -> dict[str, str]:
    """The layers that a pruner leaves as they are, and why."""
    try:
        reasons = {target.name: pruner.leaves_out(target, seen.tokens[target.name]) for target in targets}
    except CompressorError as error:
        raise CompressorError(f"{where}: {error}") from None
    left_out = {name: reason for name, reason in reasons.items() if reason is not None}
    if len(left_out) == len(targets):
        name, reason = next(iter(left_out.items()))
        raise CompressorError(
            f"{where}: leaves all {len(targets)} layers as they are, so that nothing is to be done; {name}: {reason}"
        )
    return left_out


def explain_left_out(entries: tuple[Entry, ...]) -> tuple[str, ...]:
    """A warning for each entry that leaves some of its layers as they are, with the reasons and how often each."""
    found = []
    for entry in entries:
        if entry.left_out:
            reasons = Counter(entry.left_out.values())
            found.append(
                f"{entry.where}: {several(len(entry.left_out), 'layer')} of "
                f"{len(entry.left_out) + len(entry.component.targets)} stay as they are: "
                + "; ".join(f"{several(count, 'layer')} of {reason}" for reason, count in reasons.items())
            )
    return tuple(found)


def shrink_twin(entries: tuple[Entry, ...]) -> bool:
    """Takes as many heads and neurons out of the entries' network, on the meta device, as will leave the real one.

    Returns:
        Whether any did.
    """
    removals = [pair for entry in entries for pair in entry.removals.items()]
    for group, count in removals:
        keep(group, range(group.count - count))
    return any(count for _, count in removals)


def check_apart(entries: tuple[Entry, ...]) -> None:
    """Refuses a layer that two entries would prune: the second would not know of the first one's zeros.

    Raises:
        CompressorError: naming the first such layer.
    """
    taken: dict[str, Entry] = {}
    for entry in entries:
        for target in entry.layers:
            other = taken.setdefault(target.name, entry)
            if other is not entry:
                raise CompressorError(
                    f"{entry.where}: {target.name} is pruned by {other.where} already; "
                    "give each its own layers by targets"
                )
