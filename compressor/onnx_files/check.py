"""Whether the file computes what torch computes, and in the operator set that was asked for."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxruntime
import torch

from compressor.errors import CompressorError
from compressor.onnx_files.graph import Positional, Shape, example
from compressor.structure import Family
from compressor.structure.family import like


def load(file: Path, label: str) -> onnxruntime.InferenceSession:
    """The file, loaded by onnxruntime on the CPU.

    Raises:
        CompressorError: if onnxruntime does not take it.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # its errors are raised as well, and its warnings are about its own optimisations
    try:
        return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions have no base of their own
        raise CompressorError(f"{label}: onnxruntime cannot load it: {_first_line(error)}") from error


def compare(
    runtime: onnxruntime.InferenceSession,
    reference: Any,
    family: Family,
    shape: Shape,
    dtype: torch.dtype,
    tolerance: float,
    label: str,
) -> dict[str, Any]:
    """Runs the file and torch on the same random inputs.

    Args:
        runtime: the loaded file.
        reference: the network on the CPU, in the file's dtype or in float32.
        family: makes the inputs.
        shape: their sizes.
        dtype: of the file.
        tolerance: largest relative L2, ||file - torch|| / ||torch||.
        label: what messages call the file.

    Returns:
        The shape and the relative L2.

    Raises:
        CompressorError: if the file does not run, its output is not finite or of another shape, or it differs by more.
    """
    inputs = example(family, reference, shape, dtype, seed=1)
    _, wide = like(reference)
    arguments = [tensor.to(wide) if tensor.dtype is dtype else tensor for tensor in inputs.values()]
    with torch.no_grad():
        expected = Positional(reference, tuple(inputs))(*arguments).double()
    try:
        outputs = runtime.run(None, {path[-1]: tensor.numpy() for path, tensor in inputs.items()})
    except Exception as error:  # as above
        raise CompressorError(f"{label}: onnxruntime cannot run it at {shape}: {_first_line(error)}") from error
    found = torch.from_numpy(outputs[0]).double()
    if found.shape != expected.shape:
        raise CompressorError(
            f"{label}: output at {shape} has the shape {tuple(found.shape)}, "
            f"should have {tuple(expected.shape)} as in torch"
        )
    if not found.isfinite().all() and expected.isfinite().all():
        hint = "; float16 overflows in this network, export it as float32" if dtype is torch.float16 else ""
        raise CompressorError(f"{label}: output at {shape} is not finite, in torch it is{hint}")
    difference, scale = float((found - expected).norm()), float(expected.norm())
    relative = difference / scale if scale else difference
    if not relative <= tolerance:
        raise CompressorError(
            f"{label}: onnxruntime differs from torch by a relative L2 of {relative:.2e} at {shape}; "
            f"should be at most {tolerance:.0e}"
        )
    return {"shape": asdict(shape), "relative_l2": relative}


def opset(file: Path, asked: int | None, label: str) -> int:
    """The operator set of the file.

    Raises:
        CompressorError: if another was asked for.
    """
    written = ir.load(file).opset_imports[""]
    if asked not in (None, written):
        raise CompressorError(
            f"{label}: opset should be {asked} as asked, torch {torch.__version__} wrote {written}; "
            f"ask for {written} or leave opset out"
        )
    return written


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
