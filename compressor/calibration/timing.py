"""Tells the time that the moments take from that of the forwards in which they are gathered."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

EVERY = 8
"""Of the forwards on a GPU that are not replayed, one in so many is timed: two events an input take Python as long as
half of the rest."""

Events = list[tuple[torch.cuda.Event, torch.cuda.Event]]


class Meter:
    """Adds up the time of many short blocks of code.

    On the CPU by the clock. On a GPU between two events on the stream, so that nothing is waited for until `settle` is
    called, where the GPU has been waited for anyway; if it ran dry inside a block, that counts too. There the first
    forward is timed, in which kernels are compiled, and one in `EVERY` of the others, each of which stands for as many.
    Of forwards that are replayed by one graph, the last before `settle` stands for all since the one before. Blocks
    that are rare are timed each where they are not replayed.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._forward = self._replays = 0
        self._timed: set[int] = set()  # of the forwards but the first
        self._first = self._others = self._replayed = 0.0
        self._running: list[tuple[int, torch.cuda.Event, torch.cuda.Event]] = []
        self._spare: Events = []
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

    def block(self, rare: bool = False) -> AbstractContextManager[None]:
        """Counts the block, in a forward that is timed.

        Args:
            rare: it is one of few, which are all timed, and stands for no other.
        """
        forward = 1 if rare else self._forward  # the first stands for itself
        if self._device.type != "cuda":
            return self._clocked(forward)
        if self._recording is not None or forward <= 1 or forward % EVERY == 2:
            return self._between_events(forward)
        return _NOTHING

    @contextmanager
    def recording(self) -> Iterator[Events]:
        """While it lasts, a CUDA graph is recorded: blocks are timed whenever it is replayed, by the events given."""
        self._recording = events = []
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
                self._replayed += times * sum(begin.elapsed_time(end) for begin, end in events) / 1000
            self._repeated.clear()

    @contextmanager
    def _clocked(self, forward: int) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._add(forward, time.perf_counter() - start)

    @contextmanager
    def _between_events(self, forward: int) -> Iterator[None]:
        stream = torch.cuda.current_stream(self._device)  # events without a stream are those of the current GPU
        recording = self._recording
        if recording is not None:
            begin, end = (torch.cuda.Event(enable_timing=True, external=True) for _ in range(2))
        else:
            begin, end = self._spare.pop() if self._spare else (_event(), _event())
        begin.record(stream)
        yield
        end.record(stream)  # not if memory has run out inside: then it does not count
        if recording is not None:
            recording.append((begin, end))
        else:
            self._running.append((forward, begin, end))

    def _add(self, forward: int, seconds: float) -> None:
        if forward <= 1:
            self._first += seconds
        else:
            self._others += seconds
            self._timed.add(forward)


_NOTHING = nullcontext()


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)
