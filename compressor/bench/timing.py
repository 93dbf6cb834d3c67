"""Times calls against each other: in turns, so that whatever slows the machine down slows all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Times:
    """Of one call.

    Attributes:
        seconds: that a call took, the mean of those in a row, for every turn; on a GPU between events.
        host: seconds until it returned to Python; on a GPU the work goes on behind it. Where both are as long, the GPU
            may have waited for Python, or Python for the GPU's full queue.
    """

    seconds: tuple[float, ...]
    host: tuple[float, ...]

    @property
    def median(self) -> float:
        """Of the seconds."""
        return statistics.median(self.seconds)

    def each_of(self, calls: int) -> Times:
        """Of one call on average, where so many in a row were taken for one."""
        return Times(*(tuple(seconds / calls for seconds in found) for found in (self.seconds, self.host)))


def in_turns(
    calls: Mapping[str, Callable[[], object]],
    repeats: int,
    in_a_row: int,
    warmups: int,
    device: torch.device,
    around: Callable[[str], AbstractContextManager[object]] = nullcontext,
    advance: Callable[[int], None] | None = None,
) -> dict[str, Times]:
    """Times every call `repeats` times, one after the other, in reversed order every other time.

    Args:
        calls: by name.
        repeats: turns of each call.
        in_a_row: calls that are timed as one. On a GPU, several begin behind a call that is not timed, so that the GPU
            is busy while Python prepares them, as in sampling; a single one begins on an idle GPU.
        warmups: calls of each before, which are not timed.
        device: that they run on.
        around: given a name, what lasts while its call is timed; entering and leaving it is not timed.
        advance: told of every turn of a call.
    """
    clock = _on_gpu if device.type == "cuda" else _on_cpu
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    names = tuple(calls)
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        for name, call in calls.items():
            with around(name):
                for _ in range(warmups):
                    call()
        for turn in range(repeats):
            for name in names if turn % 2 == 0 else reversed(names):
                with around(name):
                    found[name].append(clock(calls[name], in_a_row))
                if advance is not None:
                    advance(1)
    return {
        name: Times(tuple(seconds for seconds, _ in pairs), tuple(host for _, host in pairs))
        for name, pairs in found.items()
    }


def _on_gpu(call: Callable[[], object], in_a_row: int) -> tuple[float, float]:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    if in_a_row > 1:
        call()
    start = time.perf_counter()
    begin.record()
    for _ in range(in_a_row):
        call()
    end.record()
    host = time.perf_counter() - start
    end.synchronize()
    return begin.elapsed_time(end) / 1000 / in_a_row, host / in_a_row


def _on_cpu(call: Callable[[], object], in_a_row: int) -> tuple[float, float]:
    start = time.perf_counter()
    for _ in range(in_a_row):
        call()
    seconds = (time.perf_counter() - start) / in_a_row
    return seconds, seconds
