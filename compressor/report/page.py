"""The report as one HTML page that needs nothing but itself: images and styles inline, no scripts, no network."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from compressor import units
from compressor.plugin import Samples
from compressor.report import heat, images
from compressor.report.facts import LayerRow, Report, Sizes, share, sparsity
from compressor.report.pairs import psnr_of

SHOWN = 24
"""Pairs of images on a page; metrics are taken of all."""


def render(report: Report, samples: Samples | None) -> str:
    """The page. Whatever comes from the recipe, the model or the prompts is escaped.

    Args:
        report: what to tell.
        samples: the pairs to show, if any were drawn.

    """
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
    }
    environment.filters["number"] = units.number
    return environment.get_template("page.html.j2").render(
        report=report,
        pruners=_pruners(report.layers),
        tiles=tuple(_tiles(report)),
        gain=_gain(report.sizes),
        sizes=tuple(_sizes(report.sizes)),
        pairs=_pairs(samples) if samples else (),
        drawn=len(samples.prompts) if samples else 0,
        figures=(figures := _figures(report.metrics)),
        sides=any(row.dense or row.pruned for _, rows in figures for row in rows),
        errors=heat.error_map(report.layers),
        zeros=heat.sparsity_map(report.layers),
        uniform=_uniform(report.layers),
        times=_times(report.times),
        memory=tuple(_memory(report.peak_memory)),
        exports=[(export, tuple(_flat(export.checks))) for export in report.exports],
        recipe=yaml.safe_dump(report.recipe, sort_keys=False, allow_unicode=True, width=100),
        dash=units.DASH,
    )


@dataclass(frozen=True)
class Tile:
    """One figure of the headline: what it is, its value, and what to compare it with."""

    label: str
    value: str
    note: str


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


def _pruners(layers: tuple[LayerRow, ...]) -> tuple[dict[str, Any], ...]:
    rows = []
    for name in dict.fromkeys(layer.pruner for layer in layers):
        own = tuple(layer for layer in layers if layer.pruner == name)
        weights = sum(layer.parameters for layer in own)
        asked, found = sparsity(own)
        rows.append({"name": name, "layers": len(own), "parameters": weights, "asked": asked, "found": found})
    return tuple(rows)


def _tiles(report: Report) -> Iterator[Tile]:
    asked, found = sparsity(report.layers)
    before, after = report.sizes.before, report.sizes.after
    whole = 1 - share(after.nonzero, after.parameters)
    yield Tile("Zeros in the pruned layers", units.percent(found), f"asked for {units.percent(asked)}")
    yield Tile(
        f"Zeros in the whole {report.model.component}",
        units.percent(whole),
        f"before: {units.percent(1 - share(before.nonzero, before.parameters))}",
    )
    yield Tile("Non-zero parameters", units.count(after.nonzero), f"before: {units.count(before.nonzero)}")
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


def _gain(sizes: Sizes) -> str:
    """What the zeros buy and what they do not, without embellishment."""
    before, after = sizes.before, sizes.after
    zeros = after.parameters - after.nonzero
    stored = f"{units.size(before.bytes)} on disk before, {units.size(after.bytes)} after"
    removed = before.parameters - after.parameters
    parts = []
    if removed:
        parts.append(
            f"{units.count(removed)} of {units.count(before.parameters)} parameters are gone for good: "
            f"the matrices are smaller, and any runtime gains from that ({stored})."
        )
    parts.append(
        f"{units.count(zeros)} of {units.count(after.parameters)} parameters are zero. Zeros are stored like any other "
        f"number, so they make neither the files smaller{'' if removed else f' ({stored})'} nor dense kernels faster. "
        "They pay off only where something skips them: kernels for sparse weights, such as those of NVIDIA GPUs for "
        "2:4 patterns, or a file format that packs them. The operations on non-zero weights below are what such "
        "kernels could reach at best; they are counted, not timed."
    )
    return " ".join(parts)


def _sizes(sizes: Sizes) -> Iterator[tuple[str, str, str, str]]:
    before, after = sizes.before, sizes.after
    for label, name, write in (
        ("Parameters", "parameters", units.count),
        ("Non-zero parameters", "nonzero", units.count),
        ("Multiply-adds of one forward, dense", "operations", units.count),
        ("Multiply-adds on non-zero weights only", "nonzero_operations", units.count),
        ("Bytes on disk", "bytes", units.size),
    ):
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
    """The share of zeros of every layer, if it is the same to a tenth of a percent in all."""
    shares = {units.percent(layer.sparsity) for layer in layers}
    return shares.pop() if len(shares) == 1 else ""


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
