"""A network of random weights whose forwards gather moments, by the hooks that a calibration uses."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from compressor.bench import forwards, networks
from compressor.bench.subjects import Subject
from compressor.calibration import Moments, Package, StepCounter, gathering, replay
from compressor.calibration.calls import Calls
from compressor.calibration.compiled import Blocks
from compressor.calibration.gradients import Differentiated
from compressor.calibration.packages import Workspace, cut
from compressor.calibration.replay import Replay
from compressor.calibration.strides import Strides
from compressor.calibration.timing import Meter
from compressor.entries import enter
from compressor.plugin import MomentKind
from compressor.structure import Target, Trace


@dataclass(frozen=True)
class Load:
    """What one kind of forward gathers, of how many forwards in a row one is summed, and whether it runs compiled."""

    name: str
    package: Package
    kind: MomentKind
    stretch: int = 1
    compiled: bool = False


class Network:
    """One network on its device.

    Args:
        subject: which, and the recipe that is timed on it.
        seen: one forward of it, traced.
        device: the CPU or a GPU.
        dtype: name of the type of all parameters.

    Attributes:
        module: the network.
        given: the arguments of its forward.
        forward: one eager forward.
        entries: what the recipe prunes of it.
        blocks: those that run compiled, if the recipe asks for it.
        replays: whether forwards are replayed where they can be.
        replay: what replays those that now gather moments, if any does.
    """

    def __init__(self, subject: Subject, seen: Trace, device: torch.device, dtype: str) -> None:
        self.subject, self.seen, self.device = subject, seen, device
        self.module = networks.build(subject.model, subject.family, subject.layers, device, getattr(torch, dtype))
        self.given = dict(
            subject.family.inputs(
                self.module,
                batch=subject.samples,
                height=subject.height,
                width=subject.width,
                sequence=subject.model.tokens,
            )
        )
        self.forward = forwards.eager(self.module, self.given)
        self.entries = enter(subject.recipe, "network", self.module, subject.family, seen)
        self.blocks = Blocks(self.module, subject.family, seen) if subject.calibration.compile else None
        obstacle = replay.obstacle(self.module, device, getattr(torch, dtype))
        self.replays = subject.calibration.cuda_graphs and obstacle is None
        self.replay: Replay | None = None

    @contextmanager
    def gathering(self, load: Load) -> Iterator[tuple[dict[str, Moments], Callable[[], object]]]:
        """While it lasts, forwards add to moments.

        It gives these, and a forward, or a stretch of forwards; where gradients are gathered, one that is
        differentiated, as the first one of a calibration is and as some of the others are, which alone are summed.
        """
        timestep = float(cast(Tensor, self.given["timestep"]).reshape(-1)[0])
        counter = StepCounter(torch.tensor([timestep]))
        self.replay = Replay(self.module) if self.replays else None
        with gathering.watch(
            self.module,
            load.package,
            load.kind,
            lambda timestep: (counter.step(timestep), 1.0),
            Strides(1, 1),
            Differentiated(1.0) if load.kind == "gradients" else Calls(1 / load.stretch, 0, load.stretch, 1),
            Meter(self.device),
            self.blocks if load.compiled else None,
            replay=self.replay,
        ) as (moments, next_batch):

            def forward() -> object:
                next_batch(0)
                return [self.forward() for _ in range(load.stretch)]

            yield moments, forward

    def clock(self) -> float:
        """Seconds, when the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def reset_peak(self) -> None:
        """From now on `peak` counts."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> int | None:
        """The most bytes that were allocated on the GPU since; None on the CPU."""
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None


def packages(
    subject: Subject, seen: Trace, targets: Sequence[Target], kind: MomentKind, workspace: Workspace
) -> tuple[Package, ...]:
    """Those that a recipe cuts layers into, for moments of that kind and a pruner that takes so much beside them."""
    given = subject.calibration
    return cut(targets, seen, kind, given.packages, given.memory, workspace)
