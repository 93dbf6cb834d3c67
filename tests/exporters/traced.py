"""What torch traces for an ONNX file, once for all tests that write the same network in the same way."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch.onnx._internal.exporter import _onnx_program

from compressor.onnx_files import graph
from compressor.onnx_files.pieces import Piece, Shape

trace = graph.write


class Once:
    """Takes the place of `graph.write`: the file of an equal network, shape, dtype and operator set is copied.

    Args:
        folder: of the files, which the workers of a test run may share.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(
        self, piece: Piece, network: Any, shape: Shape, dtype: torch.dtype, opset: int | None, file: Path
    ) -> None:
        """As `graph.write`."""
        made = self.folder / key(piece, network, shape, dtype, opset, file.name)
        with FileLock(f"{made}.lock"):
            if not made.exists():
                begun = made.with_suffix(".begun")
                shutil.rmtree(begun, ignore_errors=True)
                begun.mkdir(parents=True)
                trace(piece, network, shape, dtype, opset, begun / file.name)
                begun.rename(made)
        shutil.copytree(made, file.parent, dirs_exist_ok=True)


def key(piece: Piece, network: Any, shape: Shape, dtype: torch.dtype, opset: int | None, name: str) -> str:
    """A hash of all that the file depends on."""
    config = network.config if isinstance(network.config, Mapping) else network.config.to_dict()
    config = {word: value for word, value in config.items() if not word.startswith("_")}  # such as where it came from
    most = _onnx_program._LARGE_MODEL_THRESHOLD
    sizes, outputs = tuple(piece.sizes), tuple(piece.outputs.items())
    found = hashlib.sha256(repr((sizes, outputs, shape, dtype, opset, name, most, network, config)).encode())
    found.update(f"{type(network).__module__}.{type(network).__qualname__}".encode())
    for label, tensor in (*network.named_parameters(), *network.named_buffers()):
        found.update(f"{label} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:32]
