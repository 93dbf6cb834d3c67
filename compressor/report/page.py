"""The report as one HTML page that needs nothing but itself: images and styles inline, no scripts, no network."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from compressor import units
from compressor.plugin import Samples
from compressor.report import heat, images
from compressor.report.facts import (
    GroupRow,
    LayerRow,
    PartRow,
    ProofFacts,
    Report,
    Size,
    Sizes,
    Structure,
    share,
    sparsity,
)
from compressor.report.pairs import psnr_of

SHOWN = 24
"""Pairs of images on a page; metrics are taken of all."""


def render(report: Report, samples: Samples | None) -> str:
    """The page. Whatever comes from the recipe, the model or the prompts is escaped.

    Args:
        report: what to tell.
        samples: the pairs to show, if any were drawn.

    """
    fate, left = _fate(report), _left(report.structure) if report.structure else None
    return _template().render(
        report=report,
        fate=fate,
        structure=left,
        pruners=_pruners(report.layers),
        parts=_parts(report),
        tiles=tuple(_tiles(report, fate, left)),
        gain=_gain(report, fate),
        sizes=tuple(_sizes(report.sizes, fate)),
        pairs=_pairs(samples) if samples else (),
        drawn=len(samples.prompts) if samples else 0,
        figures=(figures := _figures(report.metrics)),
        sides=any(row.dense or row.pruned for _, rows in figures for row in rows),
        errors=heat.error_map(report.layers),
        zeros=heat.sparsity_map(report.layers),
        uniform=_uniform(report.layers),
        shapes=tuple(_shape(layer) for layer in report.layers),
        counted=fate.zeros or any(layer.zeros for layer in report.layers),
        rows_only=any(layer.error is None and layer.lost_rows for layer in report.layers),
        times=_times(report.times),
        memory=tuple(_memory(report.peak_memory)),
        exports=[(export, tuple(_flat(export.checks))) for export in report.exports],
        recipe=yaml.safe_dump(report.recipe, sort_keys=False, allow_unicode=True, width=100),
        dash=units.DASH,
    )


@cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": units.percent,
        "size": units.size,
        "count": units.count,
        "duration": units.duration,
        "number": units.number,
    }
    return environment.get_template("page.html.j2")


@dataclass(frozen=True)
class Tile:
    """One figure of the headline: what it is, its value, and what to compare it with."""

    label: str
    value: str
    note: str


@dataclass(frozen=True)
class Fate:
    """What became of the weights: whether some left the network, and whether some were to become zero."""

    removed: bool
    zeros: bool

    @property
    def word(self) -> str:
        """What a weight that is no longer of use is called."""
        return "gone or zero" if self.removed and self.zeros else "gone" if self.removed else "zero"


@dataclass(frozen=True)
class Kind:
    """A row of the table of what left: heads or neurons, in how many places, how many, and which share of them."""

    name: str
    places: str
    before: str
    after: str
    reached: str
    asked: str


@dataclass(frozen=True)
class Left:
    """What left the network: by kind, by block, and the sentence that says that nothing else changed.

    Attributes:
        kinds: heads first.
        asked: whether any share asked for is known.
        wide: whether there are widths to tell apart from the number of heads.
        map: by block.
        proof: a sentence; empty without one.
        overrides: of torch-pruning's dependency graph.

    """

    kinds: tuple[Kind, ...]
    asked: bool
    wide: bool
    map: heat.Map
    proof: str
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Pair:
    """Two images as `data:` addresses, the width to show each at in CSS pixels, the caption, and how near they are."""

    dense: str
    pruned: str
    width: int
    pixels: bool
    prompt: str
    psnr: str


@dataclass(frozen=True)
class Figure:
    """A row of the table of figures; `pair` is of the pruned images against the dense ones."""

    label: str
    hint: str
    dense: str
    pruned: str
    pair: str


@dataclass(frozen=True)
class _Name:
    """How a figure is called and written."""

    label: str
    hint: str = ""
    unit: str = ""
    scale: float = 1.0


_NAMES = {
    "pairs": {
        "psnr": _Name("PSNR", "higher is nearer", "dB"),
        "ssim": _Name("SSIM", "1 is equal"),
        "latent_error": _Name("Relative squared distance of final latents, mean", "0 is equal"),
        "latent_error_geometric": _Name("The same, geometric mean", "0 is equal"),
    },
    "shapes": {
        "count": _Name("Number of objects right", unit="%", scale=100),
        "shape": _Name("Shape right", "of each object", "%", 100),
        "colour": _Name("Colour right", "of each object", "%", 100),
        "size": _Name("Size right", "of each object", "%", 100),
        "background": _Name("Background right", unit="%", scale=100),
        "position": _Name("Position right", "of lone objects", "%", 100),
        "relation": _Name("Relation right", "of two objects", "%", 100),
        "one_object": _Name("Everything right, one object", unit="%", scale=100),
        "bound": _Name("Each colour on its shape, two objects", unit="%", scale=100),
        "two_objects": _Name("Everything right, two objects", unit="%", scale=100),
        "frechet": _Name("Frechet distance of the judge's features", "0 is equal"),
    },
}
_TITLES = {"pairs": "Pairs of images", "shapes": "Judge of shapes"}


_PARTS = {
    "attention": "attention",
    "feed_forward": "feed-forward",
    "adaln": "adaLN",
    "other": "all other parameters",
}


def _pruners(layers: tuple[LayerRow, ...]) -> tuple[dict[str, Any], ...]:
    rows = []
    for name in dict.fromkeys(layer.pruner for layer in layers):
        own = tuple(layer for layer in layers if layer.pruner == name)
        weights = sum(layer.parameters for layer in own)
        removed = sum(layer.removed for layer in own)
        shares = {
            "removed": share(removed, weights),
            "asked": share(sum(layer.asked for layer in own) - removed, weights),
            "zeros": share(sum(layer.zeros for layer in own), weights),
        }
        rows.append({"name": name, "layers": len(own), "parameters": weights, **shares})
    return tuple(rows)


def _parts(report: Report) -> tuple[dict[str, str], ...]:
    """Which share of each part, pruned or not, and of the whole network is gone or zero; nothing if that is unknown."""
    if not report.parts:
        return ()
    whole = PartRow(
        "whole",
        sum(row.layers for row in report.parts),
        sum(row.parameters for row in report.parts),
        sum(row.nonzero for row in report.parts),
        sum(row.left for row in report.parts),
    )
    return tuple(
        {
            "name": _PARTS.get(row.part, f"the whole {report.model.component}"),
            "layers": units.count(row.layers) if row.layers else units.DASH,
            "parameters": units.count(row.parameters),
            "share": units.percent(share(row.parameters, whole.parameters)),
            "before": units.percent(share(row.parameters - row.nonzero, row.parameters)),
            "after": units.percent(row.sparsity),
        }
        for row in (*report.parts, whole)
    )


def _fate(report: Report) -> Fate:
    removed = report.structure is not None
    return Fate(removed, not removed or any(layer.asked > layer.removed for layer in report.layers))


def _left(structure: Structure) -> Left:
    by_kind = {kind: [g for g in structure.groups if g.kind == kind] for kind in _kinds(structure)}
    return Left(
        kinds=tuple(_kind(name, groups) for name, groups in by_kind.items()),
        asked=any(group.asked is not None for group in structure.groups),
        wide=any(group.width > 1 for group in structure.groups),
        map=heat.structure_map(structure.groups),
        proof=_proof(structure.proofs),
        overrides=structure.overrides,
    )


def _kinds(structure: Structure) -> tuple[str, ...]:
    return tuple(sorted({group.kind for group in structure.groups}))


def _kind(name: str, groups: Sequence[GroupRow]) -> Kind:
    before, after = sum(group.before for group in groups), sum(group.after for group in groups)
    asked = _asked(groups)
    return Kind(
        name,
        units.several(len(groups), {"heads": "attention", "neurons": "feed-forward"}.get(name, "group")),
        units.count(before),
        units.count(after),
        units.percent(1 - share(after, before)),
        units.DASH if asked is None else units.percent(asked),
    )


def _asked(groups: Sequence[GroupRow]) -> float | None:
    """The share that was asked for, over all groups; None if that of any is unknown."""
    asked = [group.before * group.asked for group in groups if group.asked is not None]
    return share(sum(asked), sum(group.before for group in groups)) if len(asked) == len(groups) else None


def _proof(proofs: Sequence[ProofFacts]) -> str:
    """The worst of all proofs, in a sentence."""
    if not proofs:
        return ""
    layer = max(proofs, key=lambda proof: proof.layer_error / proof.layer_tolerance)
    network = max(proofs, key=lambda proof: proof.network_error / proof.network_tolerance)
    return (
        "Proof that nothing else changed: given the same inputs, every layer and block computes without what left what "
        "it computed with the columns that read it set to zero. The worst of them is off by "
        f"{_off(layer.layer_error, layer.layer_tolerance)} of its output's norm, the whole network by "
        f"{_off(network.network_error, network.network_tolerance)}."
    )


def _off(error: float, tolerance: float) -> str:
    return f"{units.number(error, 2)} (tolerated: {units.number(tolerance, 1)})"


def _tiles(report: Report, fate: Fate, left: Left | None) -> Iterator[Tile]:
    asked, found = sparsity(report.layers)
    before, after = report.sizes.before, report.sizes.after
    nonzero = Tile("Non-zero parameters", units.count(after.nonzero), f"before: {units.count(before.nonzero)}")
    if not report.layers:
        yield Tile(f"Parameters of the {report.model.component}", units.count(before.parameters), "all of them")
        return
    if left is None:
        whole = 1 - share(after.nonzero, after.parameters)
        yield Tile("Zeros in the pruned layers", units.percent(found), f"asked for {units.percent(asked)}")
        yield Tile(
            f"Zeros in the whole {report.model.component}",
            units.percent(whole),
            f"before: {units.percent(1 - share(before.nonzero, before.parameters))}",
        )
        yield nonzero
    else:
        note = _reached(left.kinds)
        if fate.zeros:
            removed = share(sum(row.removed for row in report.layers), sum(row.parameters for row in report.layers))
            note = f"{units.percent(removed)} gone, {units.percent(found - removed)} zero"
        yield Tile(f"Weights {fate.word} in the pruned layers", units.percent(found), note)
        yield Tile(f"Parameters of the {report.model.component}", *_shrunk(before.parameters, after.parameters))
        yield Tile("Multiply-adds of one forward", *_shrunk(before.operations, after.operations))
        if fate.zeros:
            yield nonzero
    if "psnr" in (pairs := report.metrics.get("pairs", {})):
        value = units.measured(pairs["psnr"], pairs.get("psnr_se"), "dB")
        yield Tile("PSNR, pruned against dense", value, f"mean of {_images(pairs)}")
    shapes = report.metrics.get("shapes", {})
    for name, words in (("one_object", "one object"), ("two_objects", "two objects")):
        if f"pruned_{name}" in shapes:
            value, was = (
                units.measured(shapes[f"{side}_{name}"], shapes.get(f"{side}_{name}_se"), "%", 100)
                for side in ("pruned", "dense")
            )
            yield Tile(f"Images all right, {words}", value, f"dense: {was}")


def _reached(kinds: Sequence[Kind]) -> str:
    """What was reached of each kind, and what was asked for: once if it is the same of all."""
    asked = {kind.asked for kind in kinds}
    if len(asked) == 1:
        reached = ", ".join(f"{kind.name} {kind.reached}" for kind in kinds)
        return reached if units.DASH in asked else f"asked for {asked.pop()}: {reached}"
    return "; ".join(
        f"{kind.name} {kind.reached}" + ("" if kind.asked == units.DASH else f", asked for {kind.asked}")
        for kind in kinds
    )


def _shrunk(before: int, after: int) -> tuple[str, str]:
    return units.count(after), f"before: {units.count(before)} ({units.change(before, after)})"


def _gain(report: Report, fate: Fate) -> tuple[str, ...]:
    """What the removal and the zeros buy and what they do not, without embellishment: a paragraph for each."""
    before, after = report.sizes.before, report.sizes.after
    stored = f"{units.size(before.bytes)} on disk before, {units.size(after.bytes)} after"
    parts = []
    if report.structure is not None:
        parts.append(
            f"{units.count(before.parameters - after.parameters)} of {units.count(before.parameters)} parameters left "
            f"with {' and '.join(_kinds(report.structure))}. The matrices are smaller, so that the files are smaller "
            f"({stored}) and every runtime has fewer operations to do, without kernels for sparse weights. The "
            "operations are counted, not timed: how much faster they are done depends on the device and on the widths "
            "that are left."
        )
    if fate.zeros:
        parts.append(_gain_of_zeros(after, "" if fate.removed else f" ({stored})"))
    return tuple(parts)


def _gain_of_zeros(after: Size, stored: str) -> str:
    return (
        f"{units.count(after.parameters - after.nonzero)} of {units.count(after.parameters)} parameters are zero. "
        f"Zeros are stored like any other number, so they make neither the files smaller{stored} nor dense kernels "
        "faster. They pay off only where something skips them: kernels for sparse weights, such as those of NVIDIA "
        "GPUs for 2:4 patterns, or a file format that packs them. The operations on non-zero weights below are what "
        "such kernels could reach at best; they are counted, not timed."
    )


def _sizes(sizes: Sizes, fate: Fate) -> Iterator[tuple[str, str, str, str]]:
    before, after = sizes.before, sizes.after
    for label, name, write, shown in (
        ("Parameters", "parameters", units.count, True),
        ("Non-zero parameters", "nonzero", units.count, fate.zeros),
        ("Multiply-adds of one forward" + (", dense" if fate.zeros else ""), "operations", units.count, True),
        ("Multiply-adds on non-zero weights only", "nonzero_operations", units.count, fate.zeros),
        ("Bytes on disk", "bytes", units.size, True),
    ):
        if shown:
            a, b = getattr(before, name), getattr(after, name)
            yield label, write(a), write(b), units.change(a, b)


def _pairs(samples: Samples) -> tuple[Pair, ...]:
    near = psnr_of(samples.dense[:SHOWN], samples.pruned[:SHOWN]).tolist()
    side = max(samples.dense.shape[-2:])
    pixels = side <= images.SMALL
    width = images.enlarge(images.to_image(samples.dense[0])).width if pixels else 256
    return tuple(
        Pair(
            images.inline(dense),
            images.inline(pruned),
            width,
            pixels,
            prompt,
            f"PSNR {value:.1f} dB" if math.isfinite(value) else "bit for bit equal",
        )
        for dense, pruned, prompt, value in zip(samples.dense, samples.pruned, samples.prompts, near, strict=False)
    )


def _figures(metrics: dict[str, dict[str, float]]) -> list[tuple[str, list[Figure]]]:
    tables = []
    for metric, figures in metrics.items():
        rows: dict[str, dict[str, str]] = {}
        for key, value in figures.items():
            if key == "images" or (key.endswith("_se") and key.removesuffix("_se") in figures):
                continue
            side, name = "pair", key
            for prefix in ("dense", "pruned"):
                if key.startswith(f"{prefix}_"):
                    side, name = prefix, key.removeprefix(f"{prefix}_")
            style = _name(metric, name)
            row = rows.setdefault(
                name, {"label": style.label, "hint": style.hint, "dense": "", "pruned": "", "pair": ""}
            )
            row[side] = units.measured(value, figures.get(f"{key}_se"), style.unit, style.scale)
        title = _TITLES.get(metric, metric)
        tables.append(
            (f"{title}, {_images(figures)}" if "images" in figures else title, [Figure(**r) for r in rows.values()])
        )
    return tables


def _name(metric: str, figure: str) -> _Name:
    return _NAMES.get(metric, {}).get(figure) or _Name(figure.replace("_", " "))


def _images(figures: dict[str, float]) -> str:
    number = round(figures.get("images", 0))
    return f"{number} pair{'' if number == 1 else 's'}"


def _uniform(layers: tuple[LayerRow, ...]) -> str:
    """The share of weights gone or zero of every layer, if it is the same to a tenth of a percent in all."""
    shares = {units.percent(layer.sparsity) for layer in layers}
    return shares.pop() if len(shares) == 1 else ""


def _shape(layer: LayerRow) -> str:
    """Outputs and inputs, before and after if they changed."""
    before, after = (f"{rows} \N{MULTIPLICATION SIGN} {columns}" for rows, columns in
                     (layer.before, (layer.outputs, layer.inputs)))  # fmt: skip
    return after if before == after else f"{before} \N{RIGHTWARDS ARROW} {after}"


def _times(times: dict[str, float]) -> list[tuple[str, str, float]]:
    """Name, time and share of the longest phase, and the sum at the end (its share is 0: no bar)."""
    longest = max(times.values(), default=0.0)
    rows = [(name.replace("_", " "), units.duration(value), share(value, longest)) for name, value in times.items()]
    return [*rows, ("together", units.duration(sum(times.values())), 0.0)]


def _memory(peak: dict[str, int]) -> Iterator[tuple[str, int]]:
    """Kinds in words; a kind of memory that was not used is left out."""
    for kind, used in peak.items():
        if used:
            yield kind.replace("_", " ").replace("cpu", "CPU").replace("gpu", "GPU"), used


def _flat(checks: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Nested checks as `outer, inner: value`."""
    if isinstance(checks, dict):
        for key, value in checks.items():
            yield from _flat(value, f"{name}, {key}" if name else str(key))
    elif isinstance(checks, (list, tuple)) and any(isinstance(entry, (dict, list, tuple)) for entry in checks):
        for i, value in enumerate(checks):
            yield from _flat(value, f"{name} {i + 1}")
    elif isinstance(checks, (list, tuple)):
        yield name, ", ".join(_plain(entry) for entry in checks)
    else:
        yield name, _plain(checks)


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3g}"
    return units.DASH if value is None else str(value)
