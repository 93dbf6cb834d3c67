"""Whether the file computes what torch computes, and in the operator set that was asked for."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxruntime
import torch
from torch import Tensor

from compressor.errors import CompressorError
from compressor.onnx_files.graph import Positional, example
from compressor.onnx_files.pieces import Piece, Shape
from compressor.structure.family import like

CUDA = "CUDAExecutionProvider"


def providers(device: str) -> list[Any]:
    """What onnxruntime is to compute with, the first choice first; what CUDA lacks is left to the CPU.

    Args:
        device: `cpu`, `cuda` or `cuda:N`.

    Raises:
        CompressorError: if it is another, or the onnxruntime that is installed was built without CUDA.
    """
    if device == "cpu":
        return ["CPUExecutionProvider"]
    if not (match := re.fullmatch(r"cuda(?::(\d+))?", device)):
        raise CompressorError(f"--device: should be cpu or cuda with --runtime onnxruntime, found {device}")
    if CUDA not in onnxruntime.get_available_providers():
        raise CompressorError(
            f"--device: {device} needs an onnxruntime with {CUDA}, which {onnxruntime.__version__} as installed lacks; "
            "pip uninstall onnxruntime, then pip install onnxruntime-gpu"
        )
    return [(CUDA, {"device_id": int(match[1] or 0)}), "CPUExecutionProvider"]


def load(file: Path, label: str, device: str = "cpu") -> onnxruntime.InferenceSession:
    """The file, loaded by onnxruntime.

    Args:
        file: with its weights inside or beside it.
        label: what messages call it.
        device: as for `providers`.

    Raises:
        CompressorError: if onnxruntime does not take it, or not on that device.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # its errors are raised as well, and its warnings are about its own optimisations
    wanted = providers(device)
    try:
        session = onnxruntime.InferenceSession(file, options, providers=wanted)
    except Exception as error:  # onnxruntime's exceptions have no base of their own
        if device == "cpu" and _computes_in_bfloat16(file):
            raise CompressorError(
                f"{label}: computes in bfloat16, which onnxruntime's CPU provider does not take; "
                "export it as float16 or float32"
            ) from error
        raise CompressorError(f"{label}: onnxruntime cannot load it: {_first_line(error)}") from error
    if len(wanted) > 1 and CUDA not in session.get_providers():  # it goes on with the CPU and says so in its log alone
        raise CompressorError(
            f"{label}: onnxruntime {onnxruntime.__version__} could not start {CUDA} on {device}; "
            "it needs the CUDA and cuDNN that it was built for, and a driver for them"
        )
    return session


def compare(
    runtime: onnxruntime.InferenceSession,
    reference: Any,
    piece: Piece,
    shape: Shape,
    dtype: torch.dtype,
    tolerance: float,
    label: str,
) -> dict[str, Any]:
    """Runs the file and torch on the same random inputs.

    Args:
        runtime: the loaded file.
        reference: the network on the CPU, in the file's dtype or in float32.
        piece: makes the inputs and names the outputs.
        shape: their sizes.
        dtype: of the file.
        tolerance: largest relative L2, ||file - torch|| / ||torch||.
        label: what messages call the file.

    Returns:
        The sizes that matter to the piece, and the relative L2; of several outputs, the largest.

    Raises:
        CompressorError: if the file does not run, its output is not finite or of another shape, or it differs by more.
    """
    inputs = example(piece, reference, shape, dtype, seed=1)
    _, wide = like(reference)
    arguments = [tensor.to(wide) if tensor.dtype is dtype else tensor for tensor in inputs.values()]
    with torch.no_grad():
        expected = Positional(piece, reference, tuple(inputs))(*arguments)
    try:
        found = runtime.run(None, {path[-1]: tensor.numpy() for path, tensor in inputs.items()})
    except Exception as error:  # as above
        raise CompressorError(f"{label}: onnxruntime cannot run it at {shape}: {_first_line(error)}") from error
    worst = 0.0
    for name, right, array in zip(piece.outputs, expected, found, strict=True):
        where = "output" if len(expected) == 1 else f"output {name}"
        relative = _distance(torch.from_numpy(array).double(), right.double(), f"{label}: {where} at {shape}", dtype)
        if not relative <= tolerance:
            several = "" if len(expected) == 1 else f"in {name} "
            raise CompressorError(
                f"{label}: onnxruntime differs from torch {several}by a relative L2 of {relative:.2e} at {shape}; "
                f"should be at most {tolerance:.0e}"
            )
        worst = max(worst, relative)
    return {"shape": {name: getattr(shape, name) for name in piece.sizes}, "relative_l2": worst}


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


def _distance(found: Tensor, expected: Tensor, where: str, dtype: torch.dtype) -> float:
    if found.shape != expected.shape:
        raise CompressorError(
            f"{where} has the shape {tuple(found.shape)}, should have {tuple(expected.shape)} as in torch"
        )
    if not found.isfinite().all() and expected.isfinite().all():
        hint = "; float16 overflows in this network, export it as float32" if dtype is torch.float16 else ""
        raise CompressorError(f"{where} is not finite, in torch it is{hint}")
    difference, scale = float((found - expected).norm()), float(expected.norm())
    return difference / scale if scale else difference


def _computes_in_bfloat16(file: Path) -> bool:
    try:
        model = ir.load(file)
    except Exception:  # no ONNX file at all, which onnxruntime has said
        return False
    return any(value.dtype == ir.DataType.BFLOAT16 for value in (*model.graph.inputs, *model.graph.outputs))


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
