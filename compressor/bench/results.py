"""The rows of a benchmark, as a table for people and as JSON for programs."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from compressor.bench.rows import Plan, Row
from compressor.bench.settings import Conditions, Settings
from compressor.errors import CompressorError
from compressor.units import change, count, duration, several

COLUMNS = ("model", "multiple", "forward", "heads", "neurons", "parameters", "operations", "dense", "shrunk", "ratio")


def as_text(settings: Settings, conditions: Conditions, rows: Sequence[Row]) -> str:
    """A Markdown table, with what it was measured on above it."""
    removed = f"{100 * settings.heads:g} % of heads, {100 * settings.neurons:g} % of neurons removed"
    where = "but in the first and the last block" if settings.keep_ends else "in every block"
    shortened = "" if settings.layers is None else f", shortened to {several(settings.layers, 'layer')} a part"
    versions = ", ".join(f"{name} {conditions.versions[name]}" for name in _shown(settings, conditions))
    lines = [
        f"{conditions.device_name}; {versions}",
        f"{settings.size} x {settings.size} pixels, batch {settings.batch}, {conditions.dtype}{shortened}; {removed} "
        f"{where}; medians of {several(conditions.repeats, 'turn')}, dense and shrunk, "
        f"{several(conditions.in_a_row, 'forward')} in a row",
        "",
        f"| {' | '.join(COLUMNS)} |",
        f"|{' --- |' * len(COLUMNS)}",
    ]
    lines += [f"| {' | '.join(_cells(row))} |" for row in rows]
    return "\n".join(lines) + "\n"


def as_line(row: Row) -> str:
    """One row, to be told as soon as it is measured."""
    return (
        f"{row.model}, multiple {row.plan.multiple}, {row.forward}: {_milliseconds(row.shrunk.median)} against "
        f"{_milliseconds(row.dense.median)} dense, {row.ratio:.2f}x; made ready in {duration(row.preparing)}"
    )


def as_json(settings: Settings, conditions: Conditions, rows: Sequence[Row]) -> str:
    """Everything: settings, versions, every timed forward, what each group keeps."""
    data: dict[str, Any] = {
        "benchmark": "shrunk",
        "command": ["compressor", *sys.argv[1:]],
        "settings": asdict(settings),
        "device": conditions.device_name,
        "dtype": conditions.dtype,
        "repeats": conditions.repeats,
        "in_a_row": conditions.in_a_row,
        "versions": conditions.versions,
        "rows": [
            {
                "model": row.model,
                "forward": row.forward,
                "ratio": row.ratio,
                "seconds": row.shrunk.median,
                "dense_seconds": row.dense.median,
                "preparing_seconds": row.preparing,
                "times": asdict(row.shrunk),
                "dense_times": asdict(row.dense),
                **asdict(row.plan),
            }
            for row in rows
        ],
    }
    return json.dumps(data, indent=2) + "\n"


def claim(output: Path) -> None:
    """Makes sure that a file can be written, before anything is measured.

    Raises:
        CompressorError: if it is a folder.
    """
    if output.is_dir():
        raise CompressorError(f"output: should be a file to write, found the folder {output}")
    output.parent.mkdir(parents=True, exist_ok=True)


def _cells(row: Row) -> tuple[str, ...]:
    plan = row.plan
    return (
        row.model,
        str(plan.multiple),
        row.forward,
        _widths(plan, "heads"),
        _widths(plan, "neurons"),
        f"{count(plan.parameters)} ({change(plan.dense_parameters, plan.parameters)})",
        f"{count(plan.operations)} ({change(plan.dense_operations, plan.operations)})",
        _milliseconds(row.dense.median),
        _milliseconds(row.shrunk.median),
        f"{row.ratio:.2f}x",
    )


def _widths(plan: Plan, kind: str) -> str:
    """`18 x 17, 4 x 16 of 24`: how many are kept of what was shrunk, the most frequent first."""
    names = [name for name in plan.kept if name.endswith(f".{kind}") and plan.kept[name] < plan.of[name]]
    if not names:
        return "all"
    parts = [
        f"{_most_frequent_first(plan.kept[name] for name in names if plan.of[name] == total)} of {total}"
        for total in sorted({plan.of[name] for name in names})
    ]
    return "; ".join(parts)


def _most_frequent_first(counts: Iterable[int]) -> str:
    found = Counter(counts).most_common()
    return ", ".join(f"{times} x {number}" if len(found) > 1 else str(number) for number, times in found)


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms" if seconds < 1 else f"{1000 * seconds:.0f} ms"


def _shown(settings: Settings, conditions: Conditions) -> list[str]:
    names = ("torch", "diffusers", "onnxruntime" if settings.runtime == "onnxruntime" else "triton")
    return [name for name in names if name in conditions.versions]
