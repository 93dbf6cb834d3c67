"""What a recipe would do, worked out on the meta device: seconds even for the largest models, and no weights."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from compressor import pipeline as pipelines
from compressor import prompts
from compressor.calibration import sampling
from compressor.calibration.foretold import foretell, foretell_sampling
from compressor.calibration.noise import adds_noise
from compressor.calibration.packages import Package, cut
from compressor.calibration.strides import all_runs, stride_of
from compressor.entries import Entry, check_apart, enter, explain_left_out
from compressor.prepare import check_exporters, explain_dense, explain_guidance
from compressor.recipe import Recipe
from compressor.report import GroupSize
from compressor.structure import Trace, find_groups, find_targets
from compressor.twin import check_table, shrink_twin, size_of, trace_at


@dataclass(frozen=True)
class PlannedLayer:
    """One layer: how many weights it has, and how many will leave with heads and neurons or be zero.

    Where the pruner decides late how to spread its zeros, from `least` to `most` will be zero, and `zeros` is the
    layer's part of the sum.
    """

    name: str
    part: str
    role: str
    stream: str
    weights: int
    removed: int
    zeros: int
    least: int
    most: int

    @property
    def gone(self) -> int:
        """How many weights will leave or be zero."""
        return self.removed + self.zeros


@dataclass(frozen=True)
class PlannedGroup(GroupSize):
    """The heads of an attention or the neurons of a feed-forward: how many will be left, from `least` to `most`.

    Where the pruner decides late which blocks lose how many, `after` is the group's part of the sum.
    """

    least: int
    most: int


@dataclass(frozen=True)
class PlannedPruning:
    """One entry of the recipe's `prune`.

    Attributes:
        pruner: the plugin's name.
        layers: those that may change, in order of execution.
        groups: those that will or may lose heads or neurons; none unless the pruner is structured.
        shares: of heads and of neurons, as asked for.
        whole: blocks that keep all their heads and neurons, though others lose some.
        packages: in order; none if nothing is calibrated.
        forwards: of the network, that calibration runs, if the scheduler calls once a step.
        left_out: layers that stay as they are though the recipe chose them, and why.
    """

    pruner: str
    layers: tuple[PlannedLayer, ...]
    groups: tuple[PlannedGroup, ...]
    shares: dict[str, float]
    whole: tuple[str, ...]
    packages: tuple[Package, ...]
    forwards: int
    left_out: dict[str, str]


@dataclass(frozen=True)
class PlannedPart:
    """All linears of one part, pruned or not, or all other parameters: what a share of the network is made of.

    Attributes:
        name: `attention`, `feed_forward`, `adaln`, or `other`: convolutions, embeddings, norms and all biases.
        layers: how many linears; 0 of `other`.
        parameters: before.
        gone: how many will leave or be zero.
    """

    name: str
    layers: int
    parameters: int
    gone: int


@dataclass(frozen=True)
class Plan:
    """What a recipe would do.

    Attributes:
        source: the model, as in the recipe.
        network: `transformer` or `unet`, and its class.
        family: the table that named its layers.
        height: pixels.
        width: pixels.
        linears: how many layers the family's table found, those of adaLN apart.
        parameters: of the network.
        parameters_after: when heads and neurons have left.
        zeros: weights that will be zero.
        parts: of the network, in order of execution, and at last `other`.
        macs: multiply-adds of one forward of one sample.
        macs_after: when heads and neurons have left.
        nonzero_macs: the same, without those whose weight will be zero.
        prompts: how many will be used.
        entries: one for each pruner.
        overrides: where torch-pruning's dependency graph and the family's table differ, and why the table counts.
        warnings: what the user should know.
    """

    source: str
    network: str
    family: str
    height: int
    width: int
    linears: int
    parameters: int
    parameters_after: int
    zeros: int
    parts: tuple[PlannedPart, ...]
    macs: int
    macs_after: int
    nonzero_macs: int
    prompts: int
    entries: tuple[PlannedPruning, ...]
    overrides: tuple[str, ...]
    warnings: tuple[str, ...]


def plan(recipe: Recipe) -> Plan:
    """Works out what a recipe would do.

    Args:
        recipe: checked. Its model needs its JSON files only, not its weights.

    Raises:
        CompressorError: as the run would, for a model, layers or prompts that do not fit.
    """
    folder = pipelines.open_folder(recipe.model, weights=False)
    check_exporters(recipe, folder)
    twin = folder.twin()
    given = recipe.calibration
    height, width = size_of(recipe, folder)
    seen = trace_at(twin, recipe, folder)
    linears = find_targets(twin, folder.family, adaln=True)
    texts = 0
    if given is not None:
        texts = min(len(prompts.read(given.prompts, "calibration")), given.samples)
    warnings: list[str] = [
        *folder.warnings,
        *pipelines.inspect(folder, twin),
        *explain_guidance(recipe, folder),
        *explain_dense(recipe),
    ]
    entries = []
    zeros: dict[str, int] = {}
    removed: dict[str, int] = {}
    found = enter(recipe, folder.network, twin, folder.family, seen)
    check_apart(found)
    warnings += explain_left_out(found)
    stride = 1
    if given is not None and any(entry.pruner.moments != "none" for entry in found):
        scheduler = folder.scheduler()
        noisy = adds_noise(scheduler, given.steps)
        stride = stride_of(given, texts, noisy)
        warnings += foretell_sampling(texts, given, scheduler, noisy)
    for entry in found:
        planned, notes = _plan_entry(recipe, entry, seen, texts, folder, stride)
        entries.append(planned)
        warnings += [note for note in notes if note not in warnings]
        zeros |= {layer.name: layer.zeros for layer in planned.layers}
        removed |= {layer.name: layer.removed for layer in planned.layers}
    parameters = sum(p.numel() for p in twin.parameters())
    before = [(target.layer.part, target.name, target.module.weight.numel()) for target in linears]
    overrides = check_table(found, recipe, folder)
    after = trace_at(twin, recipe, folder) if shrink_twin(found) else seen
    weights = {target.name: target.module.weight.numel() for target in linears}
    parameters_after = sum(p.numel() for p in twin.parameters())
    saved = sum(after.macs_of[name] * count // weights[name] for name, count in zeros.items())
    return Plan(
        source=recipe.model.source,
        network=f"{folder.network} ({folder.family.component_class})",
        family=folder.family.name,
        height=height,
        width=width,
        linears=sum(target.layer.part != "adaln" for target in linears),
        parameters=parameters,
        parameters_after=parameters_after,
        zeros=sum(zeros.values()),
        parts=_plan_parts(before, zeros, removed, parameters, parameters_after),
        macs=seen.macs,
        macs_after=after.macs,
        nonzero_macs=after.macs - saved,
        prompts=texts,
        entries=tuple(entries),
        overrides=overrides,
        warnings=tuple(warnings),
    )


def _plan_parts(
    weights: list[tuple[str, str, int]],
    zeros: Mapping[str, int],
    removed: Mapping[str, int],
    parameters: int,
    parameters_after: int,
) -> tuple[PlannedPart, ...]:
    """What becomes of each part, of the part, name and weights of all linears, as they were."""
    parts = tuple(
        PlannedPart(
            name=part,
            layers=sum(of == part for of, _, _ in weights),
            parameters=sum(count for of, _, count in weights if of == part),
            gone=sum(zeros.get(name, 0) + removed.get(name, 0) for of, name, _ in weights if of == part),
        )
        for part in dict.fromkeys(part for part, _, _ in weights)
    )
    others = parameters - sum(part.parameters for part in parts)
    return (*parts, PlannedPart("other", 0, others, parameters - parameters_after - sum(removed.values())))


def _plan_entry(
    recipe: Recipe, entry: Entry, seen: Trace, texts: int, folder: pipelines.Folder, stride: int
) -> tuple[PlannedPruning, list[str]]:
    targets = entry.calibrated
    notes: list[str] = []
    packages: tuple[Package, ...] = ()
    forwards = 0
    given = recipe.calibration
    if entry.pruner.moments != "none" and given is not None:
        packages = cut(targets, seen, entry.pruner.moments, given.packages, given.memory, entry.pruner.workspace)
        runs = all_runs(given.steps, stride, math.ceil(texts / given.batch))
        forwards = entry.pruner.passes(len(packages)) * runs
        guided = sampling.guided(folder, given.guidance)
        notes += foretell(targets, seen, entry.pruner.moments, texts, guided, given, stride)
    groups = tuple(
        PlannedGroup(
            group.name,
            group.block,
            group.kind,
            group.width,
            group.count,
            group.count - removed,
            group.count - entry.choices[group][-1],
            group.count - entry.choices[group][0],
        )
        for group, removed in entry.removals.items()
    )
    whole: dict[str, None] = {}
    if entry.removals:
        every = find_groups(entry.component.module, entry.component.family)
        whole = dict.fromkeys(group.block for group in every)
        whole = {block: None for block in whole if block not in {group.block for group in groups}}
    planned = PlannedPruning(
        pruner=entry.name,
        layers=_plan_layers(entry),
        groups=groups,
        shares=dict(entry.pruner.shares()),
        whole=tuple(whole),
        packages=packages,
        forwards=forwards,
        left_out=dict(entry.left_out),
    )
    return planned, notes


def _plan_layers(entry: Entry) -> tuple[PlannedLayer, ...]:
    removed: Counter[str] = Counter()
    for group, count in entry.removals.items():
        for layer in group.producers:
            removed[layer.name] += len(group.rows(layer, range(count))) * layer.inputs
        for layer in group.consumers:
            removed[layer.name] += len(group.columns(layer, range(count))) * layer.outputs
    return tuple(
        PlannedLayer(
            name=target.name,
            part=target.layer.part,
            role=target.layer.role,
            stream=target.layer.stream,
            weights=target.outputs * target.inputs,
            removed=removed[target.name],
            zeros=entry.pruner.zeros(target),
            least=entry.pruner.bounds(target)[0],
            most=entry.pruner.bounds(target)[1],
        )
        for target in entry.layers
    )
