"""Benchmark `prune`: what calibrating and solving take, by the code that a run uses, on a network of random weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from compressor.bench import models, networks, prune_table, results, subjects
from compressor.bench.forward_times import COMPILED, PLAIN, SHARE, Forwards, percent
from compressor.bench.gathered import Network, packages
from compressor.bench.networks import free_memory
from compressor.bench.prune_table import Case, ForwardRow, Job, Measured
from compressor.bench.solve_times import Solves
from compressor.bench.subjects import Asked, Subject
from compressor.calibration import gradients
from compressor.calibration.compiled import check as check_compiler
from compressor.calibration.strides import mean_runs
from compressor.entries import Entry, enter
from compressor.errors import CompressorError
from compressor.output import write_whole
from compressor.pipeline import current, pick_device
from compressor.progress import Progress
from compressor.structure import Trace, many_shapes, trace
from compressor.units import several


@dataclass(frozen=True)
class Settings:
    """What is to be timed.

    Attributes:
        models: names of known models, or recipes.
        asked: what changes the paper's setting, or a recipe's.
        device: `auto`, `cpu`, `cuda`, ...
        dtype: `float32`, `float16`, `bfloat16`; None for float16 on a GPU and float32 on the CPU.
        repeats: turns of every kind of forward; None for 20 on a GPU and 5 on the CPU.
        turns: of solving all layers; None for 3 on a GPU and 1 on the CPU.
    """

    models: tuple[str, ...]
    asked: Asked = field(default_factory=Asked)
    device: str = "auto"
    dtype: str | None = None
    repeats: int | None = None
    turns: int | None = None


def run(settings: Settings, progress: Progress, output: Path | None) -> str:
    """Times forwards with and without moments, and the solves, of each model, and extrapolates whole jobs.

    Args:
        settings: what to time.
        progress: shows bars.
        output: a JSON file, written anew after every model.

    Returns:
        The tables.

    Raises:
        CompressorError: if the settings do not go together, or a layer cannot be solved.
    """
    if not settings.models:
        raise CompressorError(f"should name a recipe or at least one model; known: {models.known()}")
    device = pick_device(settings.device)
    if device.type not in ("cpu", "cuda"):
        raise CompressorError(f"device: should be cpu or cuda to be timed, found '{device}'")
    found = [subjects.find(name, settings.asked) for name in dict.fromkeys(settings.models)]
    dtype = settings.dtype or ("float16" if device.type == "cuda" else "float32")
    if any(subject.calibration.compile for subject in found):
        check_compiler(device)
    plans = [_plan(subject) for subject in found]  # on the meta device, to fail before the work
    if output is not None:
        results.claim(output)
    done: list[Measured] = []
    for subject, seen in zip(found, plans, strict=True):
        progress.say(f"{subject.name}: building random weights")
        done.append(measure(subject, seen, settings, device, dtype, progress))
        if output is not None:
            write_whole(output, prune_table.as_json(settings, device, dtype, done))
        free_memory()
    return prune_table.as_text(device, dtype, done)


def _plan(subject: Subject) -> Trace:
    twin = networks.build(subject.model, subject.family, subject.layers, torch.device("meta"), torch.float32)
    seen = trace(twin, subject.family, height=subject.height, width=subject.width, sequence=subject.model.tokens)
    for entry in enter(subject.recipe, "network", twin, subject.family, seen):
        if entry.pruner.moments != "none":
            packages(subject, seen, entry.calibrated, entry.pruner.moments, entry.pruner.workspace)
    return seen


def measure(
    subject: Subject, seen: Trace, settings: Settings, device: torch.device, dtype: str, progress: Progress
) -> Measured:
    """Times forwards and solves of one network, and extrapolates what a whole job would take.

    Args:
        subject: which, and the recipe that is timed on it.
        seen: one forward of it, traced.
        settings: how often.
        device: the CPU or a GPU.
        dtype: name of the type of all parameters.
        progress: shows bars.
    """
    network = Network(subject, seen, device, dtype)
    timed = Forwards(network, settings.repeats, progress)
    with current(device):
        with many_shapes():
            rows = timed.measure()
        cases = Solves(network, settings.turns, progress).measure(rows[PLAIN].plain.median)
    jobs = [job for entry, case in zip(network.entries, cases, strict=True) for job in _jobs(timed, entry, case, rows)]
    return Measured(subject, networks.parameters(network.module), tuple(rows.values()), tuple(cases), tuple(jobs))


def _jobs(timed: Forwards, entry: Entry, case: Case, rows: Mapping[str, ForwardRow]) -> Iterator[Job]:
    """What the job would take with one package, some tokens, and the recipe's packages."""
    if entry.where not in timed.names:
        yield Job(case.name, "no calibration", 0, 0.0, 0.0, case.median)
        return
    names = timed.names[entry.where]
    given = timed.network.subject.calibration

    differentiated = entry.pruner.moments == "gradients"

    def share(tokens: float) -> float:
        runs = mean_runs(given.steps, timed.network.subject.stride)
        return gradients.share_of(given.samples, runs, tokens) if differentiated else tokens

    of_some = share(SHARE) if differentiated else 1.0  # plain ones are timed with them
    found = [("1 package", "all", share(1.0)), (f"1 package, {percent(SHARE)}", "some", of_some)]
    count = len(names["packages"])
    if count > 1 or given.tokens not in (1.0, SHARE):
        drawn = "" if given.tokens == 1 else f", {percent(given.tokens)}"
        found.append((several(count, "package") + drawn, "packages", share(given.tokens)))
    for end in ("", COMPILED) if timed.network.blocks is not None else ("",):
        for how, place, summed in found:
            passes = entry.pruner.passes(len(names[place]))
            yield _job(timed, case, how + end, names[place + end], rows, passes, summed)


def _job(
    timed: Forwards,
    case: Case,
    how: str,
    parts: Sequence[str],
    rows: Mapping[str, ForwardRow],
    passes: int,
    share: float,
) -> Job:
    """A share of the forwards take as long as those of the parts, the others as long as plain ones."""
    count = timed.network.subject.forwards * passes
    compiled = how.endswith(COMPILED)
    plain = rows[timed.plain_of(compiled)].times
    added = 0.0
    for name in parts:
        times = rows[name].times
        if times is None or plain is None:
            return Job(case.name, how, count, None, None, case.median)
        added += share * (times.median - plain.median) / len(parts)
    assert plain is not None
    compiling = timed.compiling(rows) if compiled else 0.0
    return Job(case.name, how, count, count * plain.median, count * added, case.median, compiling)
