"""Tells the time that the moments take from that of the forwards in which they are gathered."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

EVERY = 8
"""Of the forwards on a GPU, one in so many is timed: two events an input take Python as long as half of the rest."""


class Meter:
    """Adds up the time of many short blocks of code.

    On the CPU by the clock. On a GPU between two events on the stream, so that nothing is waited for until `settle` is
    called, where the GPU has been waited for anyway; if it ran dry inside a block, that counts too. There the first
    forward is timed, in which kernels are compiled, and one in `EVERY` of the others, each of which stands for as many.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._forward = 0
        self._timed = 0
        self._first = self._others = 0.0
        self._running: list[tuple[bool, torch.cuda.Event, torch.cuda.Event]] = []
        self._spare: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @property
    def seconds(self) -> float:
        """Spent inside the blocks of all forwards, as far as they are settled."""
        return self._first + self._others * max(self._forward - 1, 1) / max(self._timed, 1)

    def next_forward(self) -> None:
        """Begins a forward."""
        self._forward += 1
        self._timed += self._forward > 1 and self._counts

    @property
    def _counts(self) -> bool:
        return self._device.type != "cuda" or self._forward <= 1 or self._forward % EVERY == 2 % EVERY

    def block(self) -> AbstractContextManager[None]:
        """Counts the block, in a forward that is timed."""
        return self._block() if self._counts else _NOTHING

    @contextmanager
    def _block(self) -> Iterator[None]:
        first = self._forward <= 1
        if self._device.type != "cuda":
            start = time.perf_counter()
            yield
            self._add(first, time.perf_counter() - start)
            return
        begin, end = self._spare.pop() if self._spare else (_event(), _event())
        stream = torch.cuda.current_stream(self._device)  # events without a stream are those of the current GPU
        begin.record(stream)
        yield
        end.record(stream)
        self._running.append((first, begin, end))

    def _add(self, first: bool, seconds: float) -> None:
        if first:
            self._first += seconds
        else:
            self._others += seconds

    def settle(self) -> None:
        """Waits for the GPU to have done all blocks, and counts them."""
        for first, begin, end in self._running:
            end.synchronize()
            self._add(first, begin.elapsed_time(end) / 1000)
            self._spare.append((begin, end))
        self._running.clear()


_NOTHING = nullcontext()


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)
