"""Times calls against each other: in turns, so that whatever slows the machine down slows all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Times:
    """Of one call.

    Attributes:
        seconds: that each call took, on the GPU between events.
        host: seconds until each call returned; on a GPU the work goes on behind it. Where this comes near `seconds`,
            Python was measured and not the GPU.
    """

    seconds: tuple[float, ...]
    host: tuple[float, ...]

    @property
    def median(self) -> float:
        """Of the seconds."""
        return statistics.median(self.seconds)


def in_turns(
    calls: Mapping[str, Callable[[], object]], repeats: int, warmups: int, device: torch.device
) -> dict[str, Times]:
    """Times every call `repeats` times, one after the other, in reversed order every other time.

    Args:
        calls: by name.
        repeats: of each call.
        warmups: calls of each before, which are not timed.
        device: that they run on.
    """
    clock = _on_gpu if device.type == "cuda" else _on_cpu
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    names = tuple(calls)
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        for call in calls.values():
            for _ in range(warmups):
                call()
        for turn in range(repeats):
            for name in names if turn % 2 == 0 else reversed(names):
                found[name].append(clock(calls[name]))
    return {
        name: Times(tuple(seconds for seconds, _ in pairs), tuple(host for _, host in pairs))
        for name, pairs in found.items()
    }


def _on_gpu(call: Callable[[], object]) -> tuple[float, float]:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start = time.perf_counter()
    begin.record()
    call()
    end.record()
    host = time.perf_counter() - start
    end.synchronize()
    return begin.elapsed_time(end) / 1000, host


def _on_cpu(call: Callable[[], object]) -> tuple[float, float]:
    start = time.perf_counter()
    call()
    seconds = time.perf_counter() - start
    return seconds, seconds
