"""Tells the time that the moments take from that of the forwards in which they are gathered."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch

EVERY = 8
"""Of the forwards on a GPU that are not replayed, one in so many is timed: two events an input take Python as long as
half of the rest."""

SAMPLED = 5
"""Of the blocks of a kind in a CUDA graph, one in so many is timed: events keep its kernels from following closely."""

Pair = tuple[torch.cuda.Event, torch.cuda.Event]


@dataclass
class Events:
    """Around the blocks of a CUDA graph that are timed whenever it is replayed.

    Attributes:
        timed: around some blocks, by their kind.
        blocks: how many there are, likewise.
    """

    timed: dict[Hashable, list[Pair]] = field(default_factory=dict)
    blocks: Counter[Hashable] = field(default_factory=Counter)

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self.timed)

    def seconds(self) -> float:
        """In all blocks of the last replay."""
        return sum(
            sum(begin.elapsed_time(end) for begin, end in pairs) / 1000 * self.blocks[kind] / len(pairs)
            for kind, pairs in self.timed.items()
        )


class Meter:
    """Adds up the time of many short blocks of code.

    On the CPU by the clock. On a GPU between two events on the stream, so that nothing is waited for until `settle` is
    called, where the GPU has been waited for anyway; if it ran dry inside a block, that counts too. There the first
    forward is timed, in which kernels are compiled, and one in `EVERY` of the others, each of which stands for as many.
    Of forwards that are replayed by one graph, the last before `settle` stands for all since the one before, and of its
    blocks one in `SAMPLED` of a kind for all of it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._forward = self._replays = 0
        self._timed: set[int] = set()  # of the forwards but the first
        self._first = self._others = self._replayed = 0.0
        self._running: list[tuple[int, torch.cuda.Event, torch.cuda.Event]] = []
        self._spare: list[Pair] = []
        self._recording: Events | None = None
        self._repeated: dict[int, tuple[Events, int]] = {}

    @property
    def seconds(self) -> float:
        """Spent inside the blocks of all forwards, as far as they are settled."""
        others = max(self._forward - 1 - self._replays, 1)
        return self._first + self._others * others / max(len(self._timed), 1) + self._replayed

    def next_forward(self) -> None:
        """Begins a forward that has blocks."""
        self._forward += 1

    def block(self, kind: Hashable = None, rare: bool = False) -> AbstractContextManager[None]:
        """Counts the block, in a forward that is timed.

        Args:
            kind: blocks of one kind take as long, such as those on inputs of one shape.
            rare: it is one of few, which are all timed where they are not replayed, and stands for no other.
        """
        forward = 1 if rare else self._forward  # the first stands for itself
        if self._device.type != "cuda":
            return self._clocked(forward)
        if self._recording is not None:
            return self._recorded(self._recording, kind)
        if forward <= 1 or forward % EVERY == 2:
            return self._between_events(forward)
        return _NOTHING

    @contextmanager
    def recording(self) -> Iterator[Events]:
        """While it lasts, a CUDA graph is recorded: blocks are timed whenever it is replayed, by the events given."""
        self._recording = events = Events()
        try:
            yield events
        finally:
            self._recording = None

    def replay(self, events: Events) -> None:
        """Counts a forward as one that was replayed, with the blocks between these events, if there are any."""
        if not events:
            return
        self._replays += 1
        _, before = self._repeated.get(id(events), (events, 0))
        self._repeated[id(events)] = events, before + 1

    def settle(self) -> None:
        """Waits for the GPU to have done all blocks, and counts them."""
        for forward, begin, end in self._running:
            end.synchronize()
            self._add(forward, begin.elapsed_time(end) / 1000)
            self._spare.append((begin, end))
        self._running.clear()
        if self._repeated:
            torch.cuda.synchronize(self._device)
            for events, times in self._repeated.values():
                self._replayed += times * events.seconds()
            self._repeated.clear()

    @contextmanager
    def _clocked(self, forward: int) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._add(forward, time.perf_counter() - start)

    @contextmanager
    def _between_events(self, forward: int) -> Iterator[None]:
        pair = self._spare.pop() if self._spare else (_event(), _event())
        with self._around(pair):
            yield
        self._running.append((forward, *pair))

    def _recorded(self, events: Events, kind: Hashable) -> AbstractContextManager[None]:
        events.blocks[kind] += 1
        if events.blocks[kind] % SAMPLED != 1:
            return _NOTHING
        pair = _event(external=True), _event(external=True)
        events.timed.setdefault(kind, []).append(pair)
        return self._around(pair)

    @contextmanager
    def _around(self, pair: Pair) -> Iterator[None]:
        stream = torch.cuda.current_stream(self._device)  # events without a stream are those of the current GPU
        begin, end = pair
        begin.record(stream)
        yield
        end.record(stream)  # not if memory has run out inside: then it does not count

    def _add(self, forward: int, seconds: float) -> None:
        if forward <= 1:
            self._first += seconds
        else:
            self._others += seconds
            self._timed.add(forward)


_NOTHING = nullcontext()


def _event(**kind: bool) -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True, **kind)
