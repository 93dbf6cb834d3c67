"""Counts a network's parameters and operations, and what a run takes of time and memory."""

from __future__ import annotations

import platform
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch
from torch import nn

from compressor.report import Size
from compressor.structure import Family, Trace, find_targets

PACKAGES = (
    "diffusion-compressor",
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "safetensors",
    "torchmetrics",
    "numpy",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "tensorrt",
    "tensorrt-rtx",
    "torch-pruning",
)


class Stopwatch:
    """Seconds by phase, in the order in which the phases ran.

    Attributes:
        seconds: by phase.
        device: what is waited for at the end of a phase, if it is a GPU; None until it is known.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.device: torch.device | None = None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time that the block takes to a phase."""
        start = time.perf_counter()
        try:
            yield
        finally:
            if self.device is not None and self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def move(self, source: str, name: str, seconds: float) -> None:
        """Counts part of a phase as another, which comes before it."""
        moved = self.seconds.pop(name, 0.0) + seconds
        found = list(self.seconds.items())
        self.seconds.clear()
        for phase, total in found:
            if phase == source:
                self.seconds[name] = moved
            self.seconds[phase] = total - seconds if phase == source else total


@torch.no_grad()
def size(module: nn.Module, trace: Trace, folder: Path) -> Size:
    """Counts parameters, non-zeros, operations and bytes.

    Args:
        module: the network.
        trace: one forward of one sample.
        folder: of the network's weight files.
    """
    layers = dict(module.named_modules())
    parameters = list(module.parameters())
    saved = 0
    for name, macs in trace.macs_of.items():
        weight = layers[name].weight
        assert isinstance(weight, torch.Tensor)
        saved += round(macs * int((weight == 0).sum()) / weight.numel())
    return Size(
        parameters=sum(p.numel() for p in parameters),
        nonzero=sum(int(p.count_nonzero()) for p in parameters),
        operations=trace.macs,
        nonzero_operations=trace.macs - saved,
        bytes=sum(f.stat().st_size for f in folder.glob("*.safetensors")),
    )


@dataclass(frozen=True)
class Part:
    """How many linears and parameters there are of one part, and how many of these are not zero."""

    layers: int
    parameters: int
    nonzero: int


@torch.no_grad()
def parts(module: nn.Module, family: Family) -> dict[str, Part]:
    """Counts the weights of the family's linears by part, in order of execution, and at last all `other` parameters."""
    found: dict[str, Part] = {}
    for target in find_targets(module, family, adaln=True):
        weight, so_far = target.module.weight, found.get(target.layer.part, Part(0, 0, 0))
        found[target.layer.part] = Part(
            so_far.layers + 1, so_far.parameters + weight.numel(), so_far.nonzero + int(weight.count_nonzero())
        )
    every = list(module.parameters())
    parameters = sum(p.numel() for p in every) - sum(part.parameters for part in found.values())
    nonzero = sum(int(p.count_nonzero()) for p in every) - sum(part.nonzero for part in found.values())
    return found | {"other": Part(0, parameters, nonzero)}


def versions() -> dict[str, str]:
    """Versions of Python and of what the result depends on; packages that are not installed are left out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def device_name(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} ({device})"
    threads = torch.get_num_threads()
    return f"{platform.machine()} CPU, {threads} thread{'s' if threads > 1 else ''}"


def peak_memory(device: torch.device) -> dict[str, int]:
    """The most memory that this process has had, in bytes: resident, and allocated on the device if that is a GPU."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = {"cpu_resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if device.type == "cuda":
        peak["gpu_allocated"] = torch.cuda.max_memory_allocated(device)
    return peak
