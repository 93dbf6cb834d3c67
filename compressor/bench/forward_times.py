"""Times a network's forwards, plain ones and those that gather moments, in turns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace

from torch import nn

from compressor.bench import forwards, prune_table
from compressor.bench.gathered import Load, Network, packages
from compressor.bench.networks import free_memory
from compressor.bench.prune_table import ForwardRow
from compressor.bench.timing import in_turns
from compressor.calibration import replay
from compressor.calibration.packages import Group, Package, cut
from compressor.calibration.replay import Replay
from compressor.calibration.sampling import out_of_memory
from compressor.calibration.timing import Meter
from compressor.plugin import MomentKind
from compressor.progress import Progress

PLAIN = "plain"
COMPILED, REPLAYED = prune_table.COMPILED, prune_table.REPLAYED
STRETCH = 4
"""Forwards in a row that are timed as one where one of them is summed."""
SHARE = 1 / STRETCH
"""Of the tokens, in that row."""


class Forwards:
    """The forwards of one network.

    Args:
        network: on its device.
        repeats: turns of every kind of forward; None for 20 on a GPU and 5 on the CPU.
        progress: shows a bar.

    Attributes:
        network: as given.
        names: of the rows, for each entry with moments by its place in the recipe: those of its `packages`, of `all`
            its layers, and of `some` of the tokens; behind these words `COMPILED` for those that run compiled.
    """

    def __init__(self, network: Network, repeats: int | None, progress: Progress) -> None:
        self.network, self._repeats, self._progress = network, repeats, progress
        plain: dict[str, nn.Module] = {PLAIN: network.module}
        if network.blocks is not None:
            plain[PLAIN + COMPILED] = forwards.compiled_network(network.module, network.subject.family, "blocks")
        self._plain: dict[str, tuple[Callable[[], object], nn.Module | None]] = {}
        for name, module in plain.items():
            self._plain[name] = forwards.eager(module, network.given), None
            if network.replays:
                self._plain[name + REPLAYED] = forwards.eager(module, network.given), module
        self._forward: Callable[[], object] = network.forward
        self.names: dict[str, dict[str, list[str]]] = {}
        self._loads_by_name = self._loads()

    def measure(self) -> dict[str, ForwardRow]:
        """Rows by name."""
        loads = self._loads_by_name
        on_gpu = self.network.device.type == "cuda"
        repeats = self._repeats or (20 if on_gpu else 5)
        peaks: dict[str, int | None] = {}
        notes: dict[str, str] = {}
        firsts: dict[str, float] = {}
        every = (*self._plain, *loads)
        for name in every:  # a first forward of each, for its memory, and to compile
            self.network.reset_peak()
            try:
                with self._around()(name):
                    start = self.network.clock()
                    self._forward()
                    if name not in loads or loads[name].stretch == 1:
                        firsts[name] = self.network.clock() - start
                    problem = self._record(1)
                    if problem is not None:
                        notes[name] = f"not replayed: {problem}"
                    peaks[name] = self.network.peak()
            except RuntimeError as error:
                if name == PLAIN or not out_of_memory(error):
                    raise
                notes[name] = "memory ran out"
                free_memory()
        names = [name for name in every if name not in notes]
        with self._progress.task(f"{self.network.subject.name}: timing forwards", repeats * len(names)) as advance:
            times = in_turns(
                dict.fromkeys(names, self._timed),
                repeats,
                4 if on_gpu else 1,
                1,
                self.network.device,
                self._around(record=True),
                advance,
            )
        times = {name: each.each_of(loads[name].stretch if name in loads else 1) for name, each in times.items()}
        return {
            name: ForwardRow(
                name,
                len(loads[name].package.groups) if name in loads else 0,
                loads[name].package.moment_bytes if name in loads else 0,
                times.get(name),
                times[PLAIN] if name in self._plain else times.get(self.plain_of(loads[name].compiled), times[PLAIN]),
                peaks.get(name),
                notes.get(name),
                firsts.get(name),
            )
            for name in every
        }

    def plain_of(self, compiled: bool) -> str:
        """The plain forward that runs as those with moments do."""
        return PLAIN + (COMPILED if compiled else "") + (REPLAYED if self.network.replays else "")

    def compiling(self, rows: Mapping[str, ForwardRow]) -> float:
        """Seconds, once in a job: all kinds of moments run the same graphs, which the first forward compiles."""
        return max(
            row.first - row.times.median
            for name, row in rows.items()
            if name.endswith(COMPILED) and name not in self._plain and row.first is not None and row.times is not None
        )

    def _loads(self) -> dict[str, Load]:
        """Kinds of forwards, by name; pruners that ask for the same moments of the same layers share theirs."""
        found: dict[str, Load] = {}
        alike: dict[tuple[MomentKind, tuple[tuple[Group, ...], ...]], tuple[tuple[Package, ...], list[int]]] = {}
        for i, entry in enumerate(self.network.entries):
            if entry.pruner.moments != "none":
                kind, workspace = entry.pruner.moments, entry.pruner.workspace
                cuts = packages(self.network.subject, self.network.seen, entry.calibrated, kind, workspace)
                _, places = alike.setdefault((kind, tuple(package.groups for package in cuts)), (cuts, []))
                places.append(i)
        for (kind, _), (cuts, places) in alike.items():
            entry = self.network.entries[places[0]]
            (whole,) = cut(entry.calibrated, self.network.seen, kind, 1, None, entry.pruner.workspace)
            what = ", ".join(self.network.subject.cases[i] for i in places)
            loads = {
                "packages": [Load(f"{what}: package {p.number} of {p.count}", p, kind) for p in cuts],
                "all": [Load(f"{what}: all layers", whole, kind)],
                "some": [Load(f"{what}: all layers, {percent(SHARE)}", whole, kind, STRETCH)],
            }
            if len(cuts) == 1:
                loads["packages"] = loads["all"]
            if kind == "gradients":
                loads["some"] = loads["all"]
            if self.network.blocks is not None:
                loads |= {
                    place + COMPILED: [replace(load, name=load.name + COMPILED, compiled=True) for load in these]
                    for place, these in loads.items()
                }
            names: dict[str, list[str]] = {}
            for place, these in loads.items():
                named = [_differentiated(load) for load in these]
                found |= {load.name: load for load in named}
                names[place] = [load.name for load in named]
            self.names |= {self.network.entries[i].where: names for i in places}
        return found

    def _timed(self) -> object:
        """The forward of whatever lasts: `_around` changes it."""
        return self._forward()

    def _around(self, record: bool = False) -> Callable[[str], AbstractContextManager[object]]:
        loads = self._loads_by_name

        @contextmanager
        def around(name: str) -> Iterator[None]:
            with ExitStack() as stack:
                if name in loads:
                    _, self._forward = stack.enter_context(self.network.gathering(loads[name]))
                else:
                    self._forward, replayed = self._plain[name]
                    self.network.replay = Replay(replayed) if replayed is not None else None
                    if self.network.replay is not None:
                        stack.enter_context(self.network.replay.replaying(Meter(self.network.device)))
                if record:
                    self._record(0)
                yield
            self._forward = self.network.forward

        return around

    def _record(self, forwards: int) -> str | None:
        """Runs what is missing after so many forwards until one is recorded, if it is to be; why none was, or None."""
        if self.network.replay is None:
            return None
        for _ in range(replay.BEFORE + 1 - forwards):
            self._forward()
        return self.network.replay.why_not(differentiated=True)


def percent(tokens: float) -> str:
    """A share of the tokens, in names."""
    return f"{100 * tokens:g}{prune_table.OF_THE_TOKENS}"


def _differentiated(load: Load) -> Load:
    """Says so in its name, where it is."""
    return replace(load, name=f"{load.name}, differentiated") if load.kind == "gradients" else load
