"""What a recipe would do, worked out on the meta device: seconds even for the largest models, and no weights."""

from __future__ import annotations

import math
from dataclasses import dataclass

from compressor import pipeline as pipelines
from compressor import prompts
from compressor.calibration import explain_rank, sampling
from compressor.calibration.packages import Package, cut
from compressor.prepare import Entry, check_apart, enter, size_of, trace_at
from compressor.recipe import Recipe
from compressor.structure import Trace, find_targets


@dataclass(frozen=True)
class PlannedLayer:
    """One layer: how many weights it has, and how many will be zero."""

    name: str
    part: str
    role: str
    stream: str
    weights: int
    zeros: int


@dataclass(frozen=True)
class PlannedPruning:
    """One entry of the recipe's `prune`.

    Attributes:
        pruner: the plugin's name.
        layers: in order of execution.
        packages: in order; none if nothing is calibrated.
        forwards: calls of the network that calibration takes, if the scheduler calls once a step.
    """

    pruner: str
    layers: tuple[PlannedLayer, ...]
    packages: tuple[Package, ...]
    forwards: int


@dataclass(frozen=True)
class Plan:
    """What a recipe would do.

    Attributes:
        source: the model, as in the recipe.
        network: `transformer` or `unet`, and its class.
        family: the table that named its layers.
        height: pixels.
        width: pixels.
        linears: how many layers the family's table found.
        parameters: of the network.
        zeros: weights that will be zero.
        macs: multiply-adds of one forward of one sample.
        nonzero_macs: the same, without those whose weight will be zero.
        prompts: how many will be used.
        entries: one for each pruner.
        warnings: what the user should know.
    """

    source: str
    network: str
    family: str
    height: int
    width: int
    linears: int
    parameters: int
    zeros: int
    macs: int
    nonzero_macs: int
    prompts: int
    entries: tuple[PlannedPruning, ...]
    warnings: tuple[str, ...]


def plan(recipe: Recipe) -> Plan:
    """Works out what a recipe would do.

    Args:
        recipe: checked. Its model needs its JSON files only, not its weights.

    Raises:
        CompressorError: as the run would, for a model, layers or prompts that do not fit.
    """
    folder = pipelines.open_folder(recipe.model, weights=False)
    twin = folder.twin()
    given = recipe.calibration
    height, width = size_of(recipe, folder)
    seen = trace_at(twin, recipe, folder)
    linears = find_targets(twin, folder.family)
    texts = 0
    if given is not None:
        texts = min(len(prompts.read(given.prompts, "calibration")), given.samples)
    warnings: list[str] = []
    entries = []
    zeros: dict[str, int] = {}
    found = enter(recipe, folder.network, twin, folder.family)
    check_apart(found)
    for entry in found:
        planned, notes = _plan_entry(recipe, entry, seen, texts, folder.pipeline_class)
        entries.append(planned)
        warnings += [note for note in notes if note not in warnings]
        zeros |= {layer.name: layer.zeros for layer in planned.layers}
    weights = {target.name: target.module.weight.numel() for target in linears}
    saved = sum(seen.macs_of[name] * count // weights[name] for name, count in zeros.items())
    return Plan(
        source=recipe.model.source,
        network=f"{folder.network} ({folder.family.component_class})",
        family=folder.family.name,
        height=height,
        width=width,
        linears=len(linears),
        parameters=sum(p.numel() for p in twin.parameters()),
        zeros=sum(zeros.values()),
        macs=seen.macs,
        nonzero_macs=seen.macs - saved,
        prompts=texts,
        entries=tuple(entries),
        warnings=tuple(warnings),
    )


def _plan_entry(
    recipe: Recipe, entry: Entry, seen: Trace, texts: int, pipeline_class: str
) -> tuple[PlannedPruning, list[str]]:
    targets = entry.component.targets
    notes: list[str] = []
    packages: tuple[Package, ...] = ()
    forwards = 0
    given = recipe.calibration
    if entry.pruner.moments != "none" and given is not None:
        packages = cut(targets, seen, entry.pruner.moments, given.packages, given.memory)
        forwards = len(packages) * given.steps * math.ceil(texts / given.batch)
        if entry.pruner.moments == "second":
            guided = sampling.guided(pipeline_class, given.guidance)
            note = explain_rank(targets, seen, texts, given.steps, guided)
            notes += [note] if note else []
    layers = tuple(
        PlannedLayer(t.name, t.layer.part, t.layer.role, t.layer.stream, t.outputs * t.inputs, entry.pruner.zeros(t))
        for t in targets
    )
    return PlannedPruning(entry.name, layers, packages, forwards), notes
