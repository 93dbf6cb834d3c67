"""Benchmark `prune`: what calibrating and solving take, by the code that a run uses, on a network of random weights."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from compressor.bench import forwards, models, networks, prune_table, results, subjects
from compressor.bench.prune_table import Case, ForwardRow, Job, Measured, SolveRow
from compressor.bench.subjects import Asked, Subject
from compressor.bench.timing import in_turns
from compressor.calibration import Calibration, Moments, Package, StepCounter, gathering, gradients, replay
from compressor.calibration.calls import Calls
from compressor.calibration.compiled import Blocks
from compressor.calibration.compiled import check as check_compiler
from compressor.calibration.packages import cut
from compressor.calibration.replay import Replay
from compressor.calibration.sampling import out_of_memory
from compressor.calibration.timing import Meter
from compressor.entries import Entry, enter
from compressor.errors import CompressorError
from compressor.output import write_whole
from compressor.pipeline import current, pick_device
from compressor.plugin import MomentKind, Removed, Weighting
from compressor.progress import Progress
from compressor.structure import Target, Trace, many_shapes, trace
from compressor.units import several

T = TypeVar("T")

PLAIN = "plain"
COMPILED, REPLAYED = prune_table.COMPILED, prune_table.REPLAYED
STRETCH = 4
"""Forwards in a row that are timed as one where one of them is summed."""
SHARE = 1 / STRETCH
"""Of the tokens, in that row."""


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
        done.append(_Bench(subject, seen, settings, device, dtype, progress).measure())
        if output is not None:
            write_whole(output, prune_table.as_json(settings, device, dtype, done))
        _free_memory()
    return prune_table.as_text(device, dtype, done)


def _plan(subject: Subject) -> Trace:
    twin = networks.build(subject.model, subject.family, subject.layers, torch.device("meta"), torch.float32)
    seen = trace(twin, subject.family, height=subject.height, width=subject.width, sequence=subject.model.tokens)
    for entry in enter(subject.recipe, "network", twin, subject.family, seen):
        if entry.pruner.moments != "none":
            _packages(subject, seen, entry)
    return seen


def _packages(subject: Subject, seen: Trace, entry: Entry) -> tuple[Package, ...]:
    given = subject.calibration
    return cut(entry.calibrated, seen, entry.pruner.moments, given.packages, given.memory)


@dataclass(frozen=True)
class _Load:
    """What one kind of forward gathers, of how many forwards in a row one is summed, and whether it runs compiled."""

    name: str
    package: Package
    kind: MomentKind
    stretch: int = 1
    compiled: bool = False


class _Source:
    """Gives a pruner moments of the network's forwards on random inputs, as a `Calibration` does of sampled ones."""

    def __init__(self, bench: _Bench) -> None:
        self._bench = bench
        self.seconds = 0.0
        self.bytes = 0

    def packages(self, targets: Sequence[Target], kind: MomentKind, *, deal_out: bool = False) -> tuple[Package, ...]:
        """As the recipe says, for one process."""
        given = self._bench.subject.calibration
        return cut(targets, self._bench.seen, kind, given.packages, given.memory)

    def collect(self, package: Package, kind: MomentKind, _weighting: Weighting) -> dict[str, Moments]:
        """Of one forward."""
        start = self._bench.clock()
        with self._bench.gathering(_Load("", package, kind)) as (moments, forward):
            forward()
        found = {name: m.finish() for name, m in moments.items()}
        self.bytes = max(self.bytes, package.moment_bytes)
        self.seconds += self._bench.clock() - start
        return found

    def gather(self, thing: T) -> list[T]:
        """Of one process."""
        return [thing]

    def warn(self, text: str) -> None:
        """At once."""
        self._bench.say(f"warning: {text}")


class _Bench:
    """One network on its device."""

    def __init__(
        self, subject: Subject, seen: Trace, settings: Settings, device: torch.device, dtype: str, progress: Progress
    ) -> None:
        self.subject, self.seen, self._settings, self._device, self._progress = (
            subject,
            seen,
            settings,
            device,
            progress,
        )
        self._network = networks.build(subject.model, subject.family, subject.layers, device, getattr(torch, dtype))
        given = dict(
            subject.family.inputs(
                self._network,
                batch=subject.samples,
                height=subject.height,
                width=subject.width,
                sequence=subject.model.tokens,
            )
        )
        self._timestep = float(cast(Tensor, given["timestep"]).reshape(-1)[0])
        self.forward = forwards.eager(self._network, given)
        self._forward: Callable[[], object] = self.forward
        obstacle = replay.obstacle(self._network, device, getattr(torch, dtype))
        self._replays = subject.calibration.cuda_graphs and obstacle is None
        self._replay: Replay | None = None
        plain = {PLAIN: self._network}
        self._blocks: Blocks | None = None
        if subject.calibration.compile:
            self._blocks = Blocks(self._network, subject.family, seen)
            plain[PLAIN + COMPILED] = forwards.compiled_network(self._network, subject.family, "blocks")
        self._plain: dict[str, tuple[Callable[[], object], nn.Module | None]] = {}
        for name, network in plain.items():
            self._plain[name] = forwards.eager(network, given), None
            if self._replays:
                self._plain[name + REPLAYED] = forwards.eager(network, given), network
        self._entries = enter(subject.recipe, "network", self._network, subject.family, seen)

    def measure(self) -> Measured:
        """Forwards, solves, and what a whole job would take."""
        with current(self._device):
            with many_shapes():
                rows = self._time_forwards(self._loads())
            cases = self._time_solves(rows[PLAIN].plain.median)
        jobs = [job for entry, case in zip(self._entries, cases, strict=True) for job in self._jobs(entry, case, rows)]
        return Measured(
            self.subject, networks.parameters(self._network), tuple(rows.values()), tuple(cases), tuple(jobs)
        )

    def say(self, text: str) -> None:
        """Tells the user."""
        self._progress.say(text)

    def clock(self) -> float:
        """Seconds, when the device has done what it was given."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    @contextmanager
    def gathering(self, load: _Load) -> Iterator[tuple[dict[str, Moments], Callable[[], object]]]:
        """While it lasts, forwards add to moments by the hooks that a calibration uses.

        It gives these, and a forward, or a stretch of forwards; where gradients are gathered, one that is
        differentiated, as the first one of a calibration is and as some of the others are, which alone are summed.
        """
        counter = StepCounter(torch.tensor([self._timestep]))
        meter = Meter(self._device)
        self._replay = Replay(self._network) if self._replays else None
        with gathering.watch(
            self._network,
            load.package,
            load.kind,
            lambda timestep: 1.0 + counter.step(timestep),
            Calls(1 / load.stretch, 0, load.stretch, 1),
            meter,
            self._blocks if load.compiled else None,
            replay=self._replay,
        ) as (moments, next_batch):

            def forward() -> object:
                next_batch(0)
                return [self.forward() for _ in range(load.stretch)]

            yield moments, forward

    def _loads(self) -> dict[str, _Load]:
        """Kinds of forwards, by name; pruners that ask for the same moments of the same layers share theirs."""
        found: dict[str, _Load] = {}
        self._names: dict[str, dict[str, list[str]]] = {}
        alike: dict[tuple[MomentKind, tuple[str, ...]], list[int]] = {}
        for i, entry in enumerate(self._entries):
            if entry.pruner.moments != "none":
                key = entry.pruner.moments, tuple(target.name for target in entry.calibrated)
                alike.setdefault(key, []).append(i)
        for (kind, _), places in alike.items():
            entry = self._entries[places[0]]
            cuts = _packages(self.subject, self.seen, entry)
            (whole,) = cut(entry.calibrated, self.seen, kind, 1, None)
            what = ", ".join(self.subject.cases[i] for i in places)
            loads = {
                "packages": [_Load(f"{what}: package {p.number} of {p.count}", p, kind) for p in cuts],
                "all": [_Load(f"{what}: all layers", whole, kind)],
                "some": [_Load(f"{what}: all layers, {_percent(SHARE)}", whole, kind, STRETCH)],
            }
            if len(cuts) == 1:
                loads["packages"] = loads["all"]
            if kind == "gradients":
                loads["some"] = loads["all"]
            if self._blocks is not None:
                loads |= {
                    place + COMPILED: [replace(load, name=load.name + COMPILED, compiled=True) for load in these]
                    for place, these in loads.items()
                }
            names: dict[str, list[str]] = {}
            for place, these in loads.items():
                named = [_differentiated(load) for load in these]
                found |= {load.name: load for load in named}
                names[place] = [load.name for load in named]
            self._names |= {self._entries[i].where: names for i in places}
        return found

    def _time_forwards(self, loads: Mapping[str, _Load]) -> dict[str, ForwardRow]:
        on_gpu = self._device.type == "cuda"
        repeats = self._settings.repeats or (20 if on_gpu else 5)
        peaks: dict[str, int | None] = {}
        notes: dict[str, str] = {}
        firsts: dict[str, float] = {}
        every = (*self._plain, *loads)
        for name in every:  # a first forward of each, for its memory, and to compile
            self._reset_peak()
            try:
                with self._around(loads)(name):
                    start = self.clock()
                    self._forward()
                    if name not in loads or loads[name].stretch == 1:
                        firsts[name] = self.clock() - start
                    problem = self._record(1)
                    if problem is not None:
                        notes[name] = f"not replayed: {problem}"
                    peaks[name] = self._peak()
            except RuntimeError as error:
                if name == PLAIN or not out_of_memory(error):
                    raise
                notes[name] = "memory ran out"
                _free_memory()
        names = [name for name in every if name not in notes]
        with self._progress.task(f"{self.subject.name}: timing forwards", repeats * len(names)) as advance:
            times = in_turns(
                dict.fromkeys(names, self._timed),
                repeats,
                4 if on_gpu else 1,
                1,
                self._device,
                self._around(loads, record=True),
                advance,
            )
        times = {name: each.each_of(loads[name].stretch if name in loads else 1) for name, each in times.items()}
        return {
            name: ForwardRow(
                name,
                len(loads[name].package.groups) if name in loads else 0,
                loads[name].package.moment_bytes if name in loads else 0,
                times.get(name),
                times[PLAIN] if name in self._plain else times.get(self._plain_of(loads[name].compiled), times[PLAIN]),
                peaks.get(name),
                notes.get(name),
                firsts.get(name),
            )
            for name in every
        }

    def _timed(self) -> object:
        """The forward of whatever lasts: `_around` changes it."""
        return self._forward()

    def _plain_of(self, compiled: bool) -> str:
        """The plain forward that runs as those with moments do."""
        return PLAIN + (COMPILED if compiled else "") + (REPLAYED if self._replays else "")

    def _around(
        self, loads: Mapping[str, _Load], record: bool = False
    ) -> Callable[[str], AbstractContextManager[object]]:
        @contextmanager
        def around(name: str) -> Iterator[None]:
            with ExitStack() as stack:
                if name in loads:
                    _, self._forward = stack.enter_context(self.gathering(loads[name]))
                else:
                    self._forward, replayed = self._plain[name]
                    self._replay = Replay(replayed) if replayed is not None else None
                    if self._replay is not None:
                        stack.enter_context(self._replay.replaying(Meter(self._device)))
                if record:
                    self._record(0)
                yield
            self._forward = self.forward

        return around

    def _record(self, forwards: int) -> str | None:
        """Runs what is missing after so many forwards until one is recorded, if it is to be; why none was, or None."""
        if self._replay is None:
            return None
        for _ in range(replay.BEFORE + 1 - forwards):
            self._forward()
        return self._replay.why_not(differentiated=True)

    def _time_solves(self, plain: float) -> list[Case]:
        turns = self._settings.turns or (3 if self._device.type == "cuda" else 1)
        seconds: list[list[float]] = [[] for _ in self._entries]
        of_layers: list[dict[str, list[float]]] = [{} for _ in self._entries]
        peaks: list[list[int]] = [[] for _ in self._entries]
        moment_bytes = [0] * len(self._entries)
        errors: list[dict[str, float]] = [{} for _ in self._entries]
        total = turns * sum(len(entry.calibrated) for entry in self._entries)
        with self._progress.task(f"{self.subject.name}: solving layers", total) as advance:
            for _ in range(turns):
                for i, entry in enumerate(self._entries):
                    source = _Source(self)
                    self._reset_peak()
                    start = self.clock()
                    for result in entry.pruner.prune(entry.component, cast(Calibration, source)):
                        if not isinstance(result, Removed):
                            of_layers[i].setdefault(result.name, []).append(result.seconds)
                            if result.error is not None:
                                errors[i][result.name] = result.error
                            advance(1)
                    seconds[i].append(self.clock() - start - source.seconds)
                    moment_bytes[i] = source.bytes
                    peak = self._peak()
                    peaks[i] += [] if peak is None else [peak]
                    for target in entry.layers:
                        target.module.reset_parameters()
                    _free_memory()
        return [
            Case(
                self.subject.cases[i],
                prune_table.describe(entry.pruner),
                tuple(self._rows(entry, of_layers[i])),
                tuple(seconds[i]),
                sum(errors[i].values()) / len(errors[i]) if errors[i] else None,
                max(peaks[i]) if peaks[i] else None,
                moment_bytes[i],
                plain,
            )
            for i, entry in enumerate(self._entries)
        ]

    def _rows(self, entry: Entry, of_layers: Mapping[str, list[float]]) -> Iterator[SolveRow]:
        alike: dict[tuple[int, int], list[str]] = {}
        for target in entry.calibrated:
            alike.setdefault((target.outputs, target.inputs), []).append(target.name)
        for (outputs, inputs), names in alike.items():
            yield SolveRow(outputs, inputs, tuple(tuple(of_layers[name]) for name in names))

    def _jobs(self, entry: Entry, case: Case, rows: Mapping[str, ForwardRow]) -> Iterator[Job]:
        """What the job would take with one package, some tokens, and the recipe's packages."""
        if entry.where not in self._names:
            yield Job(case.name, "no calibration", 0, 0.0, 0.0, case.median)
            return
        names = self._names[entry.where]
        given = self.subject.calibration

        def share(tokens: float) -> float:
            differentiated = entry.pruner.moments == "gradients"
            return gradients.share_of(given.samples, given.steps, tokens) if differentiated else tokens

        of_some = 1.0 if names["some"] != names["all"] else share(SHARE)  # plain ones are timed with them
        found = [("1 package", "all", share(1.0)), (f"1 package, {_percent(SHARE)}", "some", of_some)]
        packages = len(names["packages"])
        if packages > 1 or given.tokens not in (1.0, SHARE):
            drawn = "" if given.tokens == 1 else f", {_percent(given.tokens)}"
            found.append((several(packages, "package") + drawn, "packages", share(given.tokens)))
        for end in ("", COMPILED) if self._blocks is not None else ("",):
            for how, place, summed in found:
                passes = entry.pruner.passes(len(names[place]))
                yield self._job(case, how + end, names[place + end], rows, passes, summed)

    def _job(
        self, case: Case, how: str, parts: Sequence[str], rows: Mapping[str, ForwardRow], passes: int, share: float
    ) -> Job:
        """A share of the forwards take as long as those of the parts, the others as long as plain ones."""
        count = self.subject.forwards * passes
        compiled = how.endswith(COMPILED)
        plain = rows[self._plain_of(compiled)].times
        added = 0.0
        for name in parts:
            times = rows[name].times
            if times is None or plain is None:
                return Job(case.name, how, count, None, None, case.median)
            added += share * (times.median - plain.median) / len(parts)
        assert plain is not None
        compiling = self._compiling(rows) if compiled else 0.0
        return Job(case.name, how, count, count * plain.median, count * added, case.median, compiling)

    def _compiling(self, rows: Mapping[str, ForwardRow]) -> float:
        """Seconds, once in a job: all kinds of moments run the same graphs, which the first forward compiles."""
        return max(
            row.first - row.times.median
            for name, row in rows.items()
            if name.endswith(COMPILED) and name not in self._plain and row.first is not None and row.times is not None
        )

    def _reset_peak(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)

    def _peak(self) -> int | None:
        return torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else None


def _percent(tokens: float) -> str:
    return f"{100 * tokens:g}{prune_table.OF_THE_TOKENS}"


def _differentiated(load: _Load) -> _Load:
    """Says so in its name, where it is."""
    return replace(load, name=f"{load.name}, differentiated") if load.kind == "gradients" else load


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
