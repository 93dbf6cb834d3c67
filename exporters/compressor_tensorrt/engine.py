"""A built engine on a GPU: what the inspector says of it, and whether it computes what torch computes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from compressor.errors import CompressorError
from compressor.onnx_files import graph
from compressor.onnx_files.pieces import Piece, Shape
from compressor.onnx_files.writing import TOLERANCES
from compressor.structure.family import like
from compressor_tensorrt.builder import Log, listener, version
from compressor_tensorrt.evidence import EngineLayer, read_engine

DTYPES = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "BOOL": torch.bool,
}
"""torch's types by TensorRT's names."""


class CannotLoad(CompressorError):
    """This GPU cannot run the engine; another may."""


def prove(
    trt: Any, data: Any, piece: Piece, shape: Shape, dtype: str, log: Log
) -> tuple[tuple[EngineLayer, ...], dict[str, Any]]:
    """Loads an engine onto the GPU, lets the inspector describe it, and holds it against torch.

    Args:
        trt: the module `tensorrt` or `tensorrt_rtx`.
        data: the serialized engine.
        piece: what it was built from.
        shape: of the inputs to compare at, within the first optimization profile.
        dtype: of the engine.
        log: gets everything that the runtime says.

    Returns:
        The engine's layers, and the checks: the relative L2 at that shape, and the tolerance.

    Raises:
        CannotLoad: if this GPU cannot run it.
        CompressorError: if it differs from torch.
    """
    engine, runtime = load(trt, data, log, piece.name)
    layers = read_engine(inspect(trt, engine))
    inputs = graph.example(piece, piece.module, shape, getattr(torch, dtype), seed=1)
    device, wide = like(piece.module)
    arguments = [x.to(device, wide if x.dtype is getattr(torch, dtype) else x.dtype) for x in inputs.values()]
    with torch.no_grad():
        expected = graph.Positional(piece, piece.module, tuple(inputs))(*arguments)
    found = run(trt, engine, {path[-1]: tensor for path, tensor in inputs.items()}, torch.device("cuda"))
    error = compare(found, dict(zip(piece.outputs, expected, strict=True)), TOLERANCES[dtype], piece.name)
    del engine, runtime  # in this order
    numeric = [{"shape": {name: getattr(shape, name) for name in piece.sizes}, "relative_l2": error}]
    return layers, {"numeric": numeric, "tolerance": TOLERANCES[dtype]}


def load(trt: Any, data: Any, log: Log, label: str) -> tuple[Any, Any]:
    """Loads a serialized engine onto the GPU.

    Returns:
        The engine, and the runtime, which must live as long.

    Raises:
        CannotLoad: in the runtime's own words.
    """
    ears = listener(trt)
    ears.log_to = log
    try:
        runtime = trt.Runtime(ears)
        engine = runtime.deserialize_cuda_engine(data)
    finally:
        ears.log_to = None
    if engine is None:
        raise CannotLoad(f"{label}: {version(trt)} cannot load the engine here: {'; '.join(log.errors)}")
    return engine, runtime


def inspect(trt: Any, engine: Any) -> dict[str, Any]:
    """What the engine inspector says, as read from its JSON."""
    inspector = engine.create_engine_inspector()
    return json.loads(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


def run(trt: Any, engine: Any, inputs: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Runs an engine once, with its first optimization profile.

    Args:
        trt: the module.
        engine: loaded.
        inputs: by name, of the types that the engine takes.
        device: the GPU.

    Returns:
        The outputs by name, on the device.
    """
    context = engine.create_execution_context()
    stream = torch.cuda.Stream(device)
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    fed = {name: inputs[name] for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT}
    kept = {}
    for name, tensor in fed.items():
        kept[name] = tensor.to(device, DTYPES[engine.get_tensor_dtype(name).name]).contiguous()
        context.set_input_shape(name, tuple(tensor.shape))
    outputs = {
        name: torch.empty(
            tuple(context.get_tensor_shape(name)), dtype=DTYPES[engine.get_tensor_dtype(name).name], device=device
        )
        for name in names
        if name not in fed
    }
    for name, tensor in {**kept, **outputs}.items():
        context.set_tensor_address(name, tensor.data_ptr())
    stream.wait_stream(torch.cuda.current_stream(device))
    context.execute_async_v3(stream.cuda_stream)
    stream.synchronize()
    return outputs


def compare(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float, label: str) -> float:
    """Holds an engine's outputs against torch's.

    Returns:
        The largest relative L2, ||engine - torch|| / ||torch||.

    Raises:
        CompressorError: if an output is not finite, of another shape, or differs by more than the tolerance.
    """
    worst = 0.0
    for name, right in expected.items():
        one, other = found[name].double().cpu(), right.double().cpu()
        if one.shape != other.shape:
            raise CompressorError(
                f"{label}: {name} has the shape {tuple(one.shape)}, should have {tuple(other.shape)} as in torch"
            )
        if not one.isfinite().all() and other.isfinite().all():
            raise CompressorError(
                f"{label}: {name} is not finite, in torch it is; export with dtype bfloat16 or float32"
            )
        distance, size = float((one - other).norm()), float(other.norm())
        relative = distance / size if size else distance
        if not relative <= tolerance:
            raise CompressorError(
                f"{label}: the engine differs from torch in {name} by a relative L2 of {relative:.2e}; "
                f"should be at most {tolerance:.0e}"
            )
        worst = max(worst, relative)
    return worst
