"""Tells the time that the moments take from that of the forwards in which they are gathered."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Meter:
    """Adds up the time of many short blocks of code.

    On the CPU by the clock. On a GPU between two events on the stream, so that nothing is waited for until `settle` is
    called, where the GPU has been waited for anyway; if it ran dry inside a block, that counts too.

    Attributes:
        seconds: spent inside the blocks that are settled.
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds = 0.0
        self._device = device
        self._running: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._spare: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def block(self) -> Iterator[None]:
        """Counts the block."""
        if self._device.type != "cuda":
            start = time.perf_counter()
            yield
            self.seconds += time.perf_counter() - start
            return
        begin, end = self._spare.pop() if self._spare else (_event(), _event())
        stream = torch.cuda.current_stream(self._device)  # events without a stream are those of the current GPU
        begin.record(stream)
        yield
        end.record(stream)
        self._running.append((begin, end))

    def settle(self) -> None:
        """Waits for the GPU to have done all blocks, and counts them."""
        for begin, end in self._running:
            end.synchronize()
            self.seconds += begin.elapsed_time(end) / 1000
        self._spare += self._running
        self._running.clear()


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)
