"""What `bench prune` measured, and what it extrapolates: rows, Markdown tables for people, JSON for programs."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from compressor import measure
from compressor.bench.subjects import Subject
from compressor.bench.timing import Times
from compressor.plugin import Pruner
from compressor.registry import Choice
from compressor.units import DASH, count, duration, number, several, size

FORWARDS = ("forward", "inputs", "their moments", "median", "spread", "ratio", "peak memory")
SOLVES = (
    "solves",
    "outputs x inputs",
    "layers",
    "a layer",
    "spread",
    "all of them",
    "forwards",
    "error",
    "peak memory",
)
COMPILED = ", compiled"
"""Behind the name of a compiled forward."""
REPLAYED = ", replayed"
"""Behind the name of a plain forward that is replayed by a CUDA graph, as all with moments are where one is."""
OF_THE_TOKENS = " % of the tokens"
"""Behind the share of the forwards that are summed, in the names of those where it is not all."""
JOBS = ("whole job, extrapolated", "calibrated in", "forwards", "forwards alone", "moments", "solves", "together")


@dataclass(frozen=True)
class ForwardRow:
    """One kind of forward.

    Attributes:
        name: what it gathers.
        inputs: distinct ones whose moments it adds to.
        moment_bytes: of these moments.
        times: in the same turns as the plain forward's; None if it could not run. With a share of the tokens, of a
            forward on average, in stretches of which one is summed.
        plain: the plain forward's; of one with moments that of the plain one that is compiled and replayed as it is.
        peak: the most bytes allocated on the GPU, the network's among them; None on the CPU.
        note: why it could not run.
        first: seconds of the first forward, in which a compiled one is compiled; None if it could not run, or was timed
            with others.
    """

    name: str
    inputs: int
    moment_bytes: int
    times: Times | None
    plain: Times
    peak: int | None
    note: str | None
    first: float | None = None

    @property
    def ratio(self) -> float | None:
        """How many times as long as the plain forward."""
        return None if self.times is None else self.times.median / self.plain.median


@dataclass(frozen=True)
class SolveRow:
    """All layers of one shape.

    Attributes:
        outputs: rows of the weight.
        inputs: columns of the weight.
        seconds: of each layer, in each turn.
    """

    outputs: int
    inputs: int
    seconds: tuple[tuple[float, ...], ...]

    @property
    def each(self) -> tuple[float, ...]:
        """Of each layer, the median of its turns."""
        return tuple(statistics.median(found) for found in self.seconds)


@dataclass(frozen=True)
class Case:
    """One pruner, and what its solves took.

    Attributes:
        name: what it is called in the tables.
        options: the plugin and its options, as in a recipe.
        shapes: its layers.
        seconds: of all layers together, in each turn; without the forwards that their moments are of.
        error: the layers' mean relative error on the made-up inputs, in the last turn; None if it has none.
        peak: the most bytes allocated on the GPU; None on the CPU.
        moment_bytes: the most that one package's moments took.
        plain: seconds of a plain forward of the same run.
    """

    name: str
    options: dict[str, Any]
    shapes: tuple[SolveRow, ...]
    seconds: tuple[float, ...]
    error: float | None
    peak: int | None
    moment_bytes: int
    plain: float

    @property
    def median(self) -> float:
        """Of the seconds."""
        return statistics.median(self.seconds)

    @property
    def ratio(self) -> float:
        """How many times as long as a plain forward."""
        return self.median / self.plain


@dataclass(frozen=True)
class Job:
    """A whole job as the sum of what was measured. Nothing of it was run.

    Attributes:
        name: the case.
        how: how it is calibrated.
        forwards: calls of the network.
        plain: seconds that these take without moments; None if a kind of forward could not run.
        moments: seconds that the moments add; None likewise.
        solves: seconds.
        compiling: seconds that are spent once before compiled forwards; 0 for eager ones.
    """

    name: str
    how: str
    forwards: int
    plain: float | None
    moments: float | None
    solves: float
    compiling: float = 0.0

    @property
    def seconds(self) -> float | None:
        """All together."""
        if self.plain is None or self.moments is None:
            return None
        return self.compiling + self.plain + self.moments + self.solves


@dataclass(frozen=True)
class Measured:
    """All of one network.

    Attributes:
        subject: what was timed.
        parameters: of the network.
        forwards: the plain one first.
        cases: a pruner each.
        jobs: extrapolated.
    """

    subject: Subject
    parameters: int
    forwards: tuple[ForwardRow, ...]
    cases: tuple[Case, ...]
    jobs: tuple[Job, ...]


def describe(pruner: Pruner) -> dict[str, Any]:
    """The plugin and its options, every default spelled out."""
    return {Choice("pruner").name(pruner): pruner.model_dump(mode="json")}


def as_text(device: torch.device, dtype: str, measured: Sequence[Measured]) -> str:
    """Markdown tables of every network."""
    versions = measure.versions()
    where = measure.device_name(device)
    lines = [f"{where}; torch {versions['torch']}, diffusers {versions['diffusers']}; random weights, {dtype}"]
    for found in measured:
        lines += ["", *_head(found), "", *_table(FORWARDS, [_forward(row) for row in found.forwards])]
        lines += [*_of_what(found), *_on_average(found), *_first_calls(found)]
        lines += ["", *_table(SOLVES, [cells for case in found.cases for cells in _case(case)])]
        lines += ["", *_explain(found), "", *_table(JOBS, [_job(job) for job in found.jobs])]
    if not any(row.peak for found in measured for row in found.forwards):
        resident = measure.peak_memory(device)["cpu_resident"]
        lines += ["", f"peak memory of the whole process: {size(resident)} resident"]
    return "\n".join(lines) + "\n"


def as_json(settings: Any, device: torch.device, dtype: str, measured: Sequence[Measured]) -> str:
    """Everything: settings, versions, every timed forward and solve, and what is extrapolated from them."""
    data = {
        "benchmark": "prune",
        "command": ["compressor", *sys.argv[1:]],
        "settings": asdict(settings),
        "device": measure.device_name(device),
        "dtype": dtype,
        "versions": measure.versions(),
        "peak_memory": measure.peak_memory(device),
        "models": [
            {
                "model": found.subject.name,
                "pixels": found.subject.pixels,
                "layers": found.subject.layers,
                "samples_of_a_forward": found.subject.samples,
                "calibration": found.subject.calibration.model_dump(mode="json", exclude={"prompts"}),
                "parameters": found.parameters,
                "forwards": [{**asdict(row), "ratio": row.ratio} for row in found.forwards],
                "solves": [{**asdict(case), "median": case.median, "ratio": case.ratio} for case in found.cases],
                "extrapolated": [{**asdict(job), "seconds": job.seconds} for job in found.jobs],
            }
            for found in measured
        ],
    }
    return json.dumps(data, indent=1) + "\n"


def _head(found: Measured) -> list[str]:
    subject = found.subject
    height, width = subject.pixels
    shortened = "" if subject.layers is None else f", shortened to {several(subject.layers, 'layer')} a part"
    turns = len(found.cases[0].seconds) if found.cases else 0
    plain = found.forwards[0].times
    assert plain is not None
    return [
        f"{subject.name}: {count(found.parameters)} parameters{shortened}; {width} x {height} pixels, "
        f"{several(subject.samples, 'sample')} a forward; medians of {several(len(plain.seconds), 'turn')} of forwards "
        f"and {several(turns, 'turn')} of solves, whose errors are of made-up inputs and say nothing of a model",
    ]


def _explain(found: Measured) -> list[str]:
    given = found.subject.calibration
    return [
        f"Extrapolated from the medians above, not run: {several(given.samples, 'prompt')}, {given.batch} at a time, "
        f"{several(given.steps, 'step')}{_stride(found.subject.stride)}. Loading, encoding, the scheduler, checks and "
        "saving come on top."
    ]


def _stride(stride: int) -> str:
    return f", of which the network runs the first and one of every {stride}" if stride > 1 else ""


def _of_what(found: Measured) -> list[str]:
    """What the ratios are to, where there are several plain forwards."""
    plain = [row.name for row in found.forwards if not row.inputs]
    if len(plain) == 1:
        return []
    how = " and ".join(kind.strip(", ") for kind in (COMPILED, REPLAYED) if any(kind in name for name in plain))
    return [
        "",
        f"Ratios of plain forwards are to the first, those with moments to the plain one that is {how} as they are.",
    ]


def _on_average(found: Measured) -> list[str]:
    """What is timed where a share of the tokens is summed."""
    if not any(OF_THE_TOKENS in row.name for row in found.forwards):
        return []
    return [
        "",
        "Of a share of the tokens: that share of the forwards is summed, and the time is a forward's on average.",
    ]


def _first_calls(found: Measured) -> list[str]:
    """What compiling took, where something was compiled."""
    rows = [row for row in found.forwards if row.name.endswith(COMPILED) and row.first is not None]
    if not rows:
        return []
    longest = max([row for row in rows if row.inputs], key=lambda row: row.first or 0.0, default=None)
    moments = "" if longest is None else f", {duration(longest.first or 0.0)} with moments, once for all kinds of them"
    return ["", f"The first compiled forward took {duration(rows[0].first or 0.0)}{moments}; that is compiling."]


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [
        f"| {' | '.join(columns)} |",
        f"|{' --- |' * len(columns)}",
        *(f"| {' | '.join(cells)} |" for cells in rows),
    ]


def _forward(row: ForwardRow) -> tuple[str, ...]:
    first = row.name, str(row.inputs) if row.inputs else DASH, size(row.moment_bytes) if row.inputs else DASH
    if row.times is None:
        return (*first, row.note or DASH, DASH, DASH, DASH)
    return (*first, _milliseconds(row.times.median), _spread(row.times.seconds), f"{row.ratio:.2f}x", _size(row.peak))


def _case(case: Case) -> list[tuple[str, ...]]:
    rows = [
        (
            case.name,
            f"{row.outputs} x {row.inputs}",
            str(len(row.seconds)),
            _milliseconds(statistics.median(row.each)),
            _spread(row.each),
            duration(sum(row.each)),
            "",
            "",
            "",
        )
        for row in case.shapes
    ]
    layers = sum(len(row.seconds) for row in case.shapes)
    error = DASH if case.error is None else number(case.error)
    spread = f"{duration(min(case.seconds))} to {duration(max(case.seconds))}"
    return [
        *rows,
        (
            case.name,
            "all",
            str(layers),
            DASH,
            spread,
            duration(case.median),
            f"{case.ratio:.0f}x",
            error,
            _size(case.peak),
        ),
    ]


def _job(job: Job) -> tuple[str, ...]:
    parts = [DASH if seconds is None else duration(seconds) for seconds in (job.plain, job.moments)]
    together = DASH if job.seconds is None else duration(job.seconds)
    how = f"{job.how} ({duration(job.compiling)} of it compiling)" if job.compiling else job.how
    return job.name, how, str(job.forwards), *parts, duration(job.solves), together


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.2f} ms" if seconds < 1 else f"{1000 * seconds:.0f} ms"


def _spread(seconds: Sequence[float]) -> str:
    return f"{_milliseconds(min(seconds))} to {_milliseconds(max(seconds))}"


def _size(peak: int | None) -> str:
    return DASH if peak is None else size(peak)
