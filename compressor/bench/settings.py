"""What a benchmark is asked to time, and what that comes to on this machine."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch

from compressor import measure, registry
from compressor.bench import forwards, models
from compressor.bench.forwards import Extent
from compressor.bench.models import KnownModel
from compressor.bench.networks import VAE_FACTOR
from compressor.errors import CompressorError
from compressor.pipeline import pick_device
from compressor.structure import Family

Runtime = Literal["torch", "onnxruntime"]


@dataclass(frozen=True)
class Settings:
    """What is to be timed.

    Attributes:
        models: names of known models.
        heads: share of heads to remove.
        neurons: share of neurons to remove.
        multiples: of widths; a network is shrunk and timed for each.
        keep_ends: leave the first and the last block whole.
        size: height and width of the pictures in pixels.
        batch: samples of one forward.
        layers: shorten each part of the network to so many; None for all.
        runtime: torch, or onnxruntime on the CPU.
        extent: what torch compiles in one piece, beside the eager forward, or `no`; None for blocks on a GPU.
        device: `auto`, `cpu`, `cuda`, ...
        dtype: `float32`, `float16`, `bfloat16`; None for float16 on a GPU and float32 on the CPU.
        repeats: turns in which each network is timed; None for 20 on a GPU and 5 on the CPU.
        in_a_row: forwards of a turn; None for 4 on a GPU and 1 on the CPU.
        threads: of the CPU; None for what torch or onnxruntime takes.
    """

    models: tuple[str, ...]
    heads: float = 0.3
    neurons: float = 0.3
    multiples: tuple[int, ...] = (64, 1)
    keep_ends: bool = True
    size: int = 1024
    batch: int = 2
    layers: int | None = None
    runtime: Runtime = "torch"
    extent: Extent | Literal["no"] | None = None
    device: str = "auto"
    dtype: str | None = None
    repeats: int | None = None
    in_a_row: int | None = None
    threads: int | None = None


@dataclass(frozen=True)
class Conditions:
    """What the settings come to here.

    Attributes:
        models: that were named.
        device: where the forwards run.
        device_name: in words.
        dtype: of the weights.
        extent: what torch compiles in one piece; None for eager only.
        repeats: turns in which each network is timed.
        in_a_row: forwards of a turn.
        versions: of Python and the packages.
    """

    models: tuple[KnownModel, ...]
    device: torch.device
    device_name: str
    dtype: str
    extent: Extent | None
    repeats: int
    in_a_row: int
    versions: dict[str, str]


def conditions(settings: Settings) -> Conditions:
    """Looks up models and device, and holds the settings against each other.

    Raises:
        CompressorError: saying what would be right.
    """
    if not settings.models:
        raise CompressorError(f"should name at least one model; known: {models.known()}")
    found = tuple(models.find(name) for name in dict.fromkeys(settings.models))
    for model in found:
        check_size(model, settings.size)
    on_onnxruntime = settings.runtime == "onnxruntime"
    device = pick_device("cpu" if on_onnxruntime and settings.device == "auto" else settings.device)
    if device.type not in ("cpu", "cuda"):
        raise CompressorError(f"device: should be cpu or cuda to be timed, found '{device}'")
    dtype = settings.dtype or ("float16" if device.type == "cuda" else "float32")
    if on_onnxruntime:
        _check_onnxruntime(settings, device, dtype)
    extent = settings.extent or ("blocks" if device.type == "cuda" else "no")
    return Conditions(
        found,
        device,
        measure.device_name(device),
        dtype,
        None if extent == "no" else extent,
        settings.repeats or (20 if device.type == "cuda" else 5),
        settings.in_a_row or (4 if device.type == "cuda" else 1),
        measure.versions(),
    )


@contextmanager
def threads(number: int | None) -> Iterator[None]:
    """While it lasts, torch computes with so many threads on the CPU; None leaves it as it is."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check_size(model: KnownModel, size: int) -> None:
    """Raises a CompressorError if the model cannot draw pictures of so many pixels, either way."""
    family: Family = registry.load("family", model.family)
    patch = family.patch * VAE_FACTOR
    step = math.lcm(patch, family.pixels)
    most = patch * model.config.get(family.most_patches or "", math.inf)
    if size % step or size > most:
        limit = f" and at most {most}" if size > most else ""
        raise CompressorError(f"size: should be a multiple of {step} pixels{limit} for {model.name}, found {size}")


def _check_onnxruntime(settings: Settings, device: torch.device, dtype: str) -> None:
    for name, found, right in (("device", device.type, "cpu"), ("dtype", dtype, "float32")):
        if found != right:
            raise CompressorError(f"{name}: should be {right} with onnxruntime, found {found}")
    if settings.extent not in (None, "no"):
        raise CompressorError(f"compile: has no effect with onnxruntime, found '{settings.extent}'; leave it out")
    forwards.check_onnx()
