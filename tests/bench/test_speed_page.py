"""docs/speed.md against the file of what was measured."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

import pytest

from compressor.units import MINUS

DOCS = Path(__file__).parents[2] / "docs"
RUNS: list[dict[str, Any]] = json.loads((DOCS / "evidence" / "speed-shrunk.json").read_text(encoding="utf-8"))["runs"]
TABLED = [run for run in RUNS if "--multiple 1" in run["command"].replace("--multiple 128", "")]
LINES = (DOCS / "speed.md").read_text(encoding="utf-8").splitlines()


def test_ratios_are_of_medians_of_the_same_run():
    for row in (row for run in RUNS for row in run["rows"]):
        dense, shrunk = (statistics.median(row[key]["seconds"]) for key in ("dense_times", "times"))
        assert row["ratio"] == pytest.approx(dense / shrunk, rel=2e-3)


@pytest.mark.parametrize("run", TABLED, ids=lambda run: run["command"])
def test_every_row_of_the_page_is_as_measured(run):
    model = run["rows"][0]["model"]
    heads, neurons = (max(run["rows"][0]["of"][kind]) for kind in ("heads", "neurons"))
    for row in run["rows"]:
        time = 1000 * row["seconds"]
        shown = f"{time:.0f} ms" if row["forward"] == "onnxruntime" else f"{time:.1f} ms"
        percent = 100 * (1 - row["operations"] / row["dense_operations"])
        found = [
            line
            for line in LINES
            if re.search(rf"\| {row['multiple']} \|", line)
            and f"| {shown} |" in line
            and f"{row['ratio']:.2f}x" in line
            and f"| {MINUS}{percent:.1f} % |" in line
            and all(
                part in line
                for kind, of in (("heads", heads), ("neurons", neurons))
                for part in _widths(row["kept"][kind], of)
            )
        ]
        assert len(found) == 1, f"{model}, {row['multiple']}, {row['forward']}: {shown}, {row['ratio']:.2f}x"


def _widths(kept: dict[str, int], of: int) -> list[str]:
    shrunk = {number: times for number, times in kept.items() if int(number) < of}
    return [f"{times} x {number}" for number, times in shrunk.items()] if len(shrunk) > 1 else [f"| {min(shrunk)} |"]
