"""Benchmark `shrunk`: what removing heads and neurons gains in time, by the multiple that widths are rounded to."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compressor import registry
from compressor.bench import forwards, networks, results
from compressor.bench.models import KnownModel
from compressor.bench.rows import Plan, Row
from compressor.bench.settings import Conditions, Settings, conditions, threads
from compressor.bench.timing import in_turns
from compressor.output import write_whole
from compressor.progress import Progress
from compressor.structure import Family, find_groups, many_shapes
from compressor.units import count


def run(settings: Settings, progress: Progress, output: Path | None) -> str:
    """Builds each network, shrinks it for each multiple, and times both in turns.

    Args:
        settings: what to time.
        progress: told of every row.
        output: a JSON file, written anew after every row, so that nothing is lost if a later one fails.

    Returns:
        The table.

    Raises:
        CompressorError: if the settings do not go together, or would remove nothing, or all that there is.
    """
    found = conditions(settings)
    planned = [(model, *_plans(model, settings)) for model in found.models]  # first, to fail before the work
    if output is not None:
        results.claim(output)
    rows: list[Row] = []
    with threads(settings.threads), many_shapes():
        for model, family, plans in planned:
            progress.say(f"{model.name}: building {count(plans[0].dense_parameters)} random weights")
            for row in _timed(_Bench(model, family, settings, found), plans):
                rows.append(row)
                progress.say(results.as_line(row))
                if output is not None:
                    write_whole(output, results.as_json(settings, found, rows))
    return results.as_text(settings, found, rows)


@dataclass(frozen=True)
class _Bench:
    model: KnownModel
    family: Family
    settings: Settings
    conditions: Conditions

    @property
    def forwards(self) -> tuple[str, ...]:
        if self.settings.runtime == "onnxruntime":
            return ("onnxruntime",)
        return ("eager",) if self.conditions.extent is None else ("eager", "compiled")

    def prepare(self, forward: str, network: nn.Module, folder: Path) -> tuple[Callable[[], object], float]:
        """The forward, having run once, and the seconds that this took."""
        given = networks.inputs(self.model, self.family, network, self.settings.batch, self.settings.size)
        start = time.perf_counter()
        if forward == "onnxruntime":
            folder.mkdir()
            call = forwards.onnx(network, self.family, given, folder, self.settings.threads)
        elif forward == "compiled":
            assert self.conditions.extent is not None
            call = forwards.compiled(network, self.family, self.conditions.extent, given)
        else:
            call = forwards.eager(network, given)
        call()
        if self.conditions.device.type == "cuda":
            torch.cuda.synchronize(self.conditions.device)
        return call, time.perf_counter() - start


def _plans(model: KnownModel, settings: Settings) -> tuple[Family, list[Plan]]:
    """What every multiple keeps, found on the meta device."""
    family: Family = registry.load("family", model.family)
    meta = torch.device("meta")
    twin = networks.build(model, family, settings.layers, meta, torch.float32)
    groups = find_groups(twin, family)
    of = {group.name: group.count for group in groups}
    dense = networks.parameters(twin), networks.trace_of(model, family, twin, settings.size).macs
    plans: list[Plan] = []
    for multiple in dict.fromkeys(settings.multiples):
        kept = networks.kept_counts(groups, settings.heads, settings.neurons, multiple, settings.keep_ends)
        smaller = networks.shrink(twin, family, kept)
        macs = networks.trace_of(model, family, smaller, settings.size).macs
        plans.append(Plan(multiple, kept, of, networks.parameters(smaller), dense[0], macs, dense[1]))
    return family, plans


def _timed(bench: _Bench, plans: list[Plan]) -> Iterator[Row]:
    """For every plan first the eager forward, then the compiled one."""
    dtype = getattr(torch, bench.conditions.dtype)
    dense = networks.build(bench.model, bench.family, bench.settings.layers, bench.conditions.device, dtype)
    of_dense: dict[str, Callable[[], object]] = {}
    with tempfile.TemporaryDirectory(prefix="bench-") as temporary:
        for plan in plans:
            smaller = networks.shrink(dense, bench.family, plan.kept)
            for forward in bench.forwards:
                if forward not in of_dense:
                    of_dense[forward], _ = bench.prepare(forward, dense, Path(temporary, "dense"))
                folder = Path(temporary, f"multiple-{plan.multiple}")
                call, preparing = bench.prepare(forward, smaller, folder)
                yield _row(bench, forward, plan, of_dense[forward], call, preparing)
                del call
            del smaller
            networks.free_memory()


def _row(bench: _Bench, forward: str, plan: Plan, dense: Any, shrunk: Any, preparing: float) -> Row:
    found = bench.conditions
    calls = {"dense": dense, "shrunk": shrunk}
    warmups = 3 if found.device.type == "cuda" else 1
    times = in_turns(calls, found.repeats, found.in_a_row, warmups, found.device)
    return Row(bench.model.name, forward, plan, times["shrunk"], times["dense"], preparing)
