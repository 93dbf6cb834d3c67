"""Times the solves of a recipe's pruners on moments of a network's forwards on random inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar, cast

from compressor.bench import prune_table
from compressor.bench.gathered import Load, Network, packages
from compressor.bench.networks import free_memory
from compressor.bench.prune_table import Case, SolveRow
from compressor.calibration import Calibration, Moments, Package
from compressor.calibration.packages import Workspace
from compressor.entries import Entry
from compressor.plugin import MomentKind, Removed, Weighting
from compressor.progress import Progress
from compressor.structure import Target

T = TypeVar("T")


class Source:
    """Gives a pruner moments of the network's forwards on random inputs, as a `Calibration` does of sampled ones."""

    def __init__(self, network: Network, say: Callable[[str], None]) -> None:
        self._network, self._say = network, say
        self.seconds = 0.0
        self.bytes = 0

    def packages(
        self,
        targets: Sequence[Target],
        kind: MomentKind,
        workspace: Workspace,
        *,
        deal_out: bool = False,
    ) -> tuple[Package, ...]:
        """As the recipe says, for one process."""
        return packages(self._network.subject, self._network.seen, targets, kind, workspace)

    def collect(self, package: Package, kind: MomentKind, _weighting: Weighting) -> dict[str, Moments]:
        """Of one forward."""
        start = self._network.clock()
        with self._network.gathering(Load("", package, kind)) as (moments, forward):
            forward()
        found = {name: m.finish() for name, m in moments.items()}
        self.bytes = max(self.bytes, package.moment_bytes)
        self.seconds += self._network.clock() - start
        return found

    def gather(self, thing: T) -> list[T]:
        """Of one process."""
        return [thing]

    def warn(self, text: str) -> None:
        """At once."""
        self._say(f"warning: {text}")


class Solves:
    """Of one network's layers.

    Args:
        network: on its device; its weights are drawn anew behind every pruner.
        turns: of solving all layers; None for 3 on a GPU and 1 on the CPU.
        progress: shows a bar.
    """

    def __init__(self, network: Network, turns: int | None, progress: Progress) -> None:
        self._network, self._turns, self._progress = network, turns, progress

    def measure(self, plain: float) -> list[Case]:
        """Of every entry; `plain` is what a plain forward takes, for comparison."""
        turns = self._turns or (3 if self._network.device.type == "cuda" else 1)
        seconds: list[list[float]] = [[] for _ in self._network.entries]
        of_layers: list[dict[str, list[float]]] = [{} for _ in self._network.entries]
        peaks: list[list[int]] = [[] for _ in self._network.entries]
        moment_bytes = [0] * len(self._network.entries)
        errors: list[dict[str, float]] = [{} for _ in self._network.entries]
        total = turns * sum(len(entry.calibrated) for entry in self._network.entries)
        with self._progress.task(f"{self._network.subject.name}: solving layers", total) as advance:
            for _ in range(turns):
                for i, entry in enumerate(self._network.entries):
                    source = Source(self._network, self._progress.say)
                    self._network.reset_peak()
                    start = self._network.clock()
                    for result in entry.pruner.prune(entry.component, cast(Calibration, source)):
                        if not isinstance(result, Removed):
                            of_layers[i].setdefault(result.name, []).append(result.seconds)
                            if result.error is not None:
                                errors[i][result.name] = result.error
                            advance(1)
                    seconds[i].append(self._network.clock() - start - source.seconds)
                    moment_bytes[i] = source.bytes
                    peak = self._network.peak()
                    peaks[i] += [] if peak is None else [peak]
                    for target in entry.layers:
                        target.module.reset_parameters()
                    free_memory()
        return [
            Case(
                self._network.subject.cases[i],
                prune_table.describe(entry.pruner),
                tuple(self._rows(entry, of_layers[i])),
                tuple(seconds[i]),
                sum(errors[i].values()) / len(errors[i]) if errors[i] else None,
                max(peaks[i]) if peaks[i] else None,
                moment_bytes[i],
                plain,
            )
            for i, entry in enumerate(self._network.entries)
        ]

    def _rows(self, entry: Entry, of_layers: Mapping[str, list[float]]) -> Iterator[SolveRow]:
        alike: dict[tuple[int, int], list[str]] = {}
        for target in entry.calibrated:
            alike.setdefault((target.outputs, target.inputs), []).append(target.name)
        for (outputs, inputs), names in alike.items():
            yield SolveRow(outputs, inputs, tuple(tuple(of_layers[name]) for name in names))
