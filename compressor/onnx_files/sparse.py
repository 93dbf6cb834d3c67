"""Whether N:M sparsity came through: finds each pruned linear in the file and counts along its reduction axis."""

# Shapes: O outputs, I inputs (the reduction axis, K), G groups of M inputs in a row.

from __future__ import annotations

import ast
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.traversal import RecursiveGraphIterator
from torch import Tensor

from compressor.errors import CompressorError
from compressor.onnx_files.graph import ROOT
from compressor.onnx_files.mend import SCOPES
from compressor.sparsity import holds
from compressor.structure import Target

_MOST = 32
_FULL = 0.9


def verify(file: Path, targets: Sequence[Target], label: str) -> dict[str, Any]:
    """Holds every N:M sparse layer against the file.

    Args:
        file: the ONNX file, with its weights.
        targets: the linears that may have been pruned; those whose weight is N:M sparse are verified.
        label: what messages call the file.

    Returns:
        `targets`, how many there are; `mapped`, how many have a node in the file; `sparse`, for each N:M sparse layer
        by name its `pattern` and that it `holds`.

    Raises:
        CompressorError: naming the first layer whose pattern is lost, or that the file has no weight for.
    """
    nodes = linears(ir.load(file))
    found: dict[str, dict[str, Any]] = {}
    for target in targets:
        kept = pattern(target.module.weight.detach())
        if kept is None:
            continue
        keep, of = kept
        weights = [weight_OI(node) for node in nodes.get(target.name, [])]
        if not weights or any(weight is None for weight in weights):
            raise CompressorError(
                f"{label}: {target.name}: should be a MatMul or Gemm with a constant weight that keeps {keep} of {of}, "
                f"found {'no constant weight' if weights else 'no such node'}"
            )
        for weight in weights:
            assert weight is not None
            if weight.shape != tuple(target.module.weight.shape) or not holds(torch.from_numpy(weight != 0), keep, of):
                raise CompressorError(
                    f"{label}: {target.name}: keeps {keep} of {of} inputs in torch and not in the file along the "
                    "reduction axis; sparse kernels would not take it"
                )
        found[target.name] = {"pattern": f"{keep}:{of}", "holds": True}
    mapped = sum(target.name in nodes for target in targets)
    return {"targets": len(targets), "mapped": mapped, "sparse": found}


def pattern(weight_OI: Tensor) -> tuple[int, int] | None:
    """The N:M (keep, of) that a weight was pruned to, or None.

    At most N of every M consecutive inputs are non-zero. To tell it from zeros that fell so by chance, which they do
    for a large M, nine of ten such places must be taken; 1:4 and 2:4 count in any case, since hardware knows them. Of
    several patterns it is the one with the most places taken, then the shortest. M is looked for up to 32.
    """
    outputs, inputs = weight_OI.shape
    best: tuple[float, int, int] | None = None
    for of in (m for m in range(2, _MOST + 1) if inputs % m == 0):
        if _largest(weight_OI[:16], of) == of:
            continue  # dense: the first rows tell
        keep = _largest(weight_OI, of)
        if not 0 < keep < of:
            continue
        filled = int((weight_OI != 0).sum()) / (outputs * (inputs // of) * keep)
        if (filled >= _FULL or (of == 4 and keep <= 2)) and (best is None or filled > best[0]):
            best = filled, keep, of
    return best and best[1:]


def linears(model: ir.Model) -> dict[str, list[ir.Node]]:
    """The matrix products of the file by the name of the innermost module that they lie in."""
    nodes: dict[str, list[ir.Node]] = {}
    for node in RecursiveGraphIterator(model.graph):
        scopes = ast.literal_eval(node.metadata_props.get(SCOPES, "[]"))
        if node.op_type in ("MatMul", "Gemm") and len(scopes) >= 2:  # the last scope is the operation's own name
            nodes.setdefault(scopes[-2].removeprefix(f"{ROOT}."), []).append(node)
    return nodes


def weight_OI(node: ir.Node) -> np.ndarray | None:
    """The weight of a MatMul or Gemm as outputs x inputs, or None if it is not constant."""
    weight = _constant(node.inputs[1])
    if weight is None:
        return None
    transposed = node.op_type == "Gemm" and node.attributes.get_int("transB", 0) == 1
    return weight if transposed else np.ascontiguousarray(np.swapaxes(weight, -1, -2))


def _largest(weight_OI: Tensor, of: int) -> int:
    """The most non-zeros in any group."""
    return int((weight_OI.reshape(-1, of) != 0).sum(1).max())


def _constant(value: ir.Value | None) -> np.ndarray | None:
    """The constant behind a value, looking through Transpose, Cast and Identity."""
    if value is None:
        return None
    if value.const_value is not None:
        return value.const_value.numpy()
    node = value.producer()
    if node is None or node.op_type not in ("Transpose", "Cast", "Identity", "Constant"):
        return None
    if node.op_type == "Constant":
        return node.attributes["value"].as_tensor().numpy()
    inner = _constant(node.inputs[0])
    if inner is None or node.op_type != "Transpose":
        return inner
    return np.transpose(inner, node.attributes.get_ints("perm", None))
