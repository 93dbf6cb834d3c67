"""One piece of a pipeline as an ONNX file: written, then proven against torch."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from compressor.errors import CompressorError
from compressor.onnx_files import check, graph, sparse
from compressor.onnx_files.pieces import Piece
from compressor.structure.family import like
from compressor.units import size

TOLERANCES = {"float32": 2e-5, "float16": 1e-2, "bfloat16": 8e-2}
"""Relative L2 from the runtime to torch that is let pass, by dtype of the file: some eight times what was measured."""

_GRAPH = 2000
"""Bytes of nodes and names for each module. 780 to 1360 were measured in small pipelines of three families."""

_ENCODING, _DECODING = ("encoder.", "quant_conv."), ("decoder.", "post_quant_conv.")
"""Layers of the one and the other half of an autoencoder."""


@dataclass(frozen=True)
class Settings:
    """How every piece of an export is written.

    Attributes:
        dtype: `float32`, `float16` or `bfloat16`; a piece that must not compute in float16 is written in float32.
        opset: of ONNX, or None for torch's default.
        batch: samples of the traced shape.
        height: latent rows of the traced shape, or None for a small default.
        width: latent columns, likewise.
        sequence: text tokens of the traced shape.
        tolerance: largest relative L2 from the runtime to torch, or None for that of the dtype.
    """

    dtype: str = "float32"
    opset: int | None = None
    batch: int = 2
    height: int | None = None
    width: int | None = None
    sequence: int = 24
    tolerance: float | None = None

    def dtype_of(self, piece: Piece) -> str:
        """The dtype that a piece is written in."""
        return "float32" if self.dtype == "float16" and not piece.halves else self.dtype


def write(piece: Piece, settings: Settings, file: Path) -> dict[str, Any]:
    """Writes a piece; nothing is computed with the file, so that any dtype will do.

    Args:
        piece: its module is not changed; a copy on the CPU is traced, which shares what weights it can.
        settings: how.
        file: `<folder>/model.onnx`; the folder exists.

    Returns:
        What the file is: `dtype`, `opset`, and dtype and shape of its `inputs` and `outputs` by name.

    Raises:
        CompressorError: if the traced shape does not suit it, torch cannot export it, or the opset is another.
    """
    shape = _shape(piece, settings)
    dtype = getattr(torch, settings.dtype_of(piece))
    graph.write(piece, graph.copy_of(piece.module, dtype), shape, dtype, settings.opset, file)
    return describe(piece, settings, file)


def describe(piece: Piece, settings: Settings, file: Path) -> dict[str, Any]:
    """What a file is, as `write` says it.

    Args:
        piece: that it was written from.
        settings: as it was written with.
        file: as from `write`.

    Raises:
        CompressorError: if its operator set is not the one that the settings ask for.
    """
    opset = check.opset(file, settings.opset, _label(file))
    return {"dtype": settings.dtype_of(piece), "opset": opset, **_signature(file)}


def prove(piece: Piece, settings: Settings, file: Path) -> dict[str, Any]:
    """Holds a file against torch: at the traced shape and another, and N:M sparsity layer by layer.

    Args:
        piece: the module that it must agree with.
        settings: as it was written with.
        file: as from `write`.

    Returns:
        The checks: `reference`, `tolerance`, the relative L2 of each shape in `numeric`; for a network with layers
        that may be pruned also how many were found in the file, and for each sparse layer its pattern.

    Raises:
        CompressorError: if onnxruntime does not take the file, or it or a layer's sparsity differs from torch.
    """
    label = _label(file)
    name = settings.dtype_of(piece)
    dtype, tolerance = getattr(torch, name), settings.tolerance or TOLERANCES[name]
    reference = graph.copy_of(piece.module, torch.float32 if like(piece.module)[1] is torch.float32 else dtype)
    runtime = check.load(file, label)
    shape = _shape(piece, settings)
    numeric = [
        check.compare(runtime, reference, piece, s, dtype, tolerance, label)
        for s in (shape, graph.other_shape(piece, shape))
    ]
    checks = {"reference": f"{like(reference)[1]} on the CPU", "tolerance": tolerance, "numeric": numeric}
    return checks | (sparse.verify(file, piece.targets, label) if piece.targets else {})


def bytes_of(pieces: Sequence[Piece], settings: Settings) -> int:
    """About how many bytes the files of these pieces take: their weights, and the graph around them."""
    total = 0
    for piece in pieces:
        width = getattr(torch, settings.dtype_of(piece)).itemsize
        unused: tuple[str, ...] = ()
        if piece.component == "vae":
            unused = _ENCODING if piece.name == "vae_decoder" else _DECODING
        weights, modules = piece.module.named_parameters(), piece.module.named_modules()
        total += sum(width * tensor.numel() for name, tensor in weights if not name.startswith(unused))
        total += sum(_GRAPH for name, _ in modules if not name.startswith(unused))
    return total


def check_space(what: str, needed: int, folder: Path) -> None:
    """Makes sure, before anything is written, that the disk has room for the files.

    Args:
        what: will be written, in the plural.
        needed: bytes.
        folder: where to.

    Raises:
        CompressorError: with what is needed and what is free.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise CompressorError(
            f"{what} need {size(needed)} on the disk of {folder}, found {size(free)} free; nothing was written"
        )


def _label(file: Path) -> str:
    return f"{file.parent.name}/{file.name}"


def _shape(piece: Piece, settings: Settings) -> graph.Shape:
    return graph.traced_shape(piece, settings.batch, settings.height, settings.width, settings.sequence)


def _signature(file: Path) -> dict[str, Any]:
    """Inputs and outputs of a file."""
    model = ir.load(file)

    def describe(values: Sequence[ir.Value]) -> dict[str, Any]:
        return {
            str(value.name): {
                "dtype": "float32" if value.dtype is ir.DataType.FLOAT else str(value.dtype).lower(),
                "shape": [size if isinstance(size, int) else str(size) for size in value.shape or ()],
            }
            for value in values
        }

    return {"inputs": describe(model.graph.inputs), "outputs": describe(model.graph.outputs)}
