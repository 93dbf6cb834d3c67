"""The kernels where there is no GPU: compiled all the same, and what is said where they cannot be used."""

from __future__ import annotations

from importlib import util
from typing import Any

import pytest
import torch

from compressor.calibration import kernels, product_kernel
from compressor.calibration.product_kernel import LARGE, SMALL
from tests import assembled, tiny

GPU = torch.device("cuda")


@pytest.fixture
def _no_answer_is_kept():
    kernels.problem.cache_clear()
    yield
    kernels.problem.cache_clear()


@pytest.mark.usefixtures("_no_answer_is_kept")
@pytest.mark.parametrize(
    ("installed", "capability", "error", "reason"),
    [
        (False, (9, 0), None, "triton is not installed"),
        (True, (7, 5), None, "they need compute capability 8.0, found 7.5"),
        (True, (9, 0), RuntimeError("Failed to find C compiler.\nMore."), "triton failed: Failed to find C compiler."),
    ],
)
def test_a_gpu_without_the_kernels_is_told_why(installed, capability, error, reason, monkeypatch):
    def fail():
        raise error

    monkeypatch.setattr(kernels, "find_spec", lambda name: util.find_spec(name) if installed else None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(kernels, "_module", fail)
    assert kernels.note(GPU, torch.float16) == (
        f"moments are summed by PyTorch, which costs a GPU several times as much as by kernels: {reason}"
    )
    assert kernels.note(GPU, torch.float32) is None
    assert kernels.note(torch.device("cpu"), torch.float16) is None


def test_a_calibration_passes_the_warning_on(monkeypatch):
    monkeypatch.setattr(kernels, "note", lambda device, dtype: f"slow on {device} in {dtype}")
    calibration = tiny.calibrate(tiny.load("sd3"))
    assert "slow on cpu in torch.float32" in calibration.facts.warnings


TYPES = {
    "x": "*fp16",
    "roots": "*fp32",
    "counted": "*fp32",
    "second": "*fp32",
    "parts": "*fp32",
    "total": "*fp32",
    "totals": "*fp32",
    "squares": "*fp32",
    "square_sum": "*fp32",
    "tokens": "*i64",
    "skipped": "*i64",
    "weight_sum": "*fp64",
    "live": "*fp64",
    "copy": "*fp16",
    "weight": "fp64",
    "rows": "*i32",
    "bads": "*i32",
}
SUMS = ("counted", "totals", "squares", "tokens", "skipped", "weight_sum", "total", "square_sum")
TILE = {"UNIT": 8, "M": 128, "N": 128, "D": 64, "GROUP": 8, "C": 64, "COPIED": False}
ENGINE = (("left", "M"), ("right", "N"))
LOADS = {"left": None, "right": None}


def compiled(kernel: str, constants: dict[str, Any], capability: int, warps: int, stages: int) -> Any:
    engine = {
        name: f"tensordesc<fp16[{constants['D']}, {constants[side]}]>" for name, side in ENGINE if "D" in constants
    }
    function = getattr(product_kernel, kernel)
    return assembled.compiled(function, TYPES | engine, constants, capability, warps, stages)


@pytest.mark.parametrize(
    ("kernel", "constants", "absent", "stages"),
    [
        ("_read", {"UNIT": 8, "R": 8, "C": 1024}, ("roots", "copy", "totals", "squares", "counted"), 3),
        ("_read", {"UNIT": 1, "R": 16, "C": 1024}, (), 3),
        ("_settle_alone", {"C": 64}, ("counted", "totals", "squares", "weight_sum", "total", "square_sum"), 3),
        ("_settle_alone", {"C": 64}, (), 3),
        ("_multiply", {**TILE, **LOADS, "ADD": True}, ("counted", "squares", "square_sum"), 5),
        ("_multiply", {**TILE, **LOADS, "ADD": False}, SUMS, 5),
        ("_multiply", {**TILE, "ADD": True}, ("squares", "square_sum"), 4),
        ("_multiply", {**TILE, "COPIED": True, "ADD": False}, SUMS, 4),
        ("_add", {"M": 64}, (), 3),
    ],
)
def test_every_kernel_is_compiled_for_hopper_and_the_product_for_its_tensor_cores(kernel, constants, absent, stages):
    """Without a GPU, by the assembler that comes with triton; the interpreter lets pass what the compiler refuses."""
    assembly = compiled(kernel, constants | dict.fromkeys(absent), 90, 4, stages).asm["ptx"]
    if kernel == "_multiply":
        assert assembly.count("wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16") >= 2 * 64 // 16
        # loaded ahead, by the engine or 16 bytes at once
        assert ("cp.async.cg.shared.global" if "left" in constants else "cp.async.bulk.tensor.2d") in assembly
        assert ("atom.global" in assembly) == constants["ADD"]  # stretches are added in order, by `_add`
    elif kernel == "_read" and constants["UNIT"] == 8:
        assert "ld.global.v4.b32" in assembly


@pytest.mark.parametrize(
    ("capability", "memory", "tiling"),
    [(90, 227, LARGE), (80, 163, SMALL), (86, 99, SMALL), (120, 99, SMALL)],
)
@pytest.mark.parametrize("unit", [8, 1])
def test_a_tile_fits_into_the_shared_memory_of_a_gpu_and_its_steps_are_whole(capability, memory, tiling, unit):
    sizes = {"M": tiling.tall, "N": tiling.wide, "D": tiling.depth, "GROUP": tiling.group, "UNIT": unit}
    constants = {**TILE, **sizes, "ADD": True, "squares": None, "square_sum": None}
    for further in [{}, LOADS] if capability == 90 and unit == 8 else [LOADS]:
        found = compiled("_multiply", constants | further, capability, tiling.warps, tiling.stages)
        assert 0 < found.metadata.shared <= 1024 * memory
    assert product_kernel.PADDING % tiling.depth == 0
