"""What torch traces for an ONNX file, once for all tests that write the same network in the same way."""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from filelock import FileLock
from torch.onnx._internal.exporter import _onnx_program
from torch.onnx._internal.exporter._registration import ONNXRegistry

from compressor.onnx_files import graph
from compressor.onnx_files.pieces import Piece, Shape

trace = graph.write
_THRESHOLD = _onnx_program._LARGE_MODEL_THRESHOLD


def once(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """From now on files are traced once, and torch looks once for what it translates operators by.

    Args:
        patch: undoes it.
        folder: as of `Once`.
    """
    patch.setattr(graph, "write", Once(folder))
    patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(functools.cache(ONNXRegistry.from_torchlib)))


class Once:
    """Takes the place of `graph.write`: the file of an equal network, shape, dtype and operator set is copied.

    If the weights are to lie beside it, torch writes it again.

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
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(_onnx_program, "_LARGE_MODEL_THRESHOLD", _THRESHOLD)
                    trace(piece, network, shape, dtype, opset, begun / file.name)
                begun.rename(made)
        if _onnx_program._LARGE_MODEL_THRESHOLD == _THRESHOLD:
            shutil.copytree(made, file.parent, dirs_exist_ok=True)
        else:
            _onnx_program.ONNXProgram(ir.load(made / file.name), None).save(file)


def key(piece: Piece, network: Any, shape: Shape, dtype: torch.dtype, opset: int | None, name: str) -> str:
    """A hash of all that the file depends on."""
    config = network.config if isinstance(network.config, Mapping) else network.config.to_dict()
    config = {word: value for word, value in config.items() if not word.startswith("_")}  # such as where it came from
    sizes, outputs = tuple(piece.sizes), tuple(piece.outputs.items())
    said = json.dumps(config, default=str, sort_keys=True)  # a tuple is as good as a list
    found = hashlib.sha256(repr((sizes, outputs, shape, dtype, opset, name, network, said)).encode())
    found.update(f"{type(network).__module__}.{type(network).__qualname__}".encode())
    for label, tensor in (*network.named_parameters(), *network.named_buffers()):
        found.update(f"{label} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:32]
