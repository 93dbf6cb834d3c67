"""Puts right what torch's exporter writes and runtimes refuse, and takes out what is of no use in the file."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.traversal import RecursiveGraphIterator
from onnxscript import opset18 as op

SCOPES = "pkg.torch.onnx.name_scopes"
"""The one entry of a node's metadata that is kept: the names of the modules that it lies in, outermost first."""


def floor_divide(dividend: Any, divisor: Any) -> Any:
    """Python's `//` of whole numbers, which torch writes as a Div, and ONNX's Div rounds towards zero.

    SD3 crops its positions from `(size - height) // 2`, part of which torch rewrites as `-height // 2`: at an odd
    number of patches the crop came out one too large.
    """
    remainder: Any = op.Mod(dividend, divisor)
    exact: Any = op.Sub(dividend, remainder)
    return op.Div(exact, divisor)


TRANSLATIONS = {operator.floordiv: floor_divide}
"""What torch's exporter is told to write in place of its own translation."""


def apply(model: ir.Model, axes: Sequence[Mapping[int, str]]) -> None:
    """Applies every mend to the model, in place; `axes` names those axes of each output that are dynamic."""
    narrow_doubles(model)
    unify_concats(model)
    name_outputs(model, axes)
    drop_traces(model)


def narrow_doubles(model: ir.Model) -> None:
    """Turns float64 into float32. Flux computes its rotary frequencies in float64, which TensorRT does not have.

    The frequencies themselves were folded in float64 and are rounded once; the angles are products in float32.
    """
    for node in RecursiveGraphIterator(model.graph):
        for name, attribute in list(node.attributes.items()):
            if name == "to" and attribute.value == ir.DataType.DOUBLE:
                node.attributes[name] = ir.AttrInt64(name, ir.DataType.FLOAT)
            elif attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype == ir.DataType.DOUBLE:
                node.attributes[name] = ir.AttrTensor(name, _narrow(attribute.as_tensor()))
        for value in node.outputs:
            if value.dtype == ir.DataType.DOUBLE:
                value.dtype = ir.DataType.FLOAT
    for value in model.graph.initializers.values():
        if value.const_value is not None and value.const_value.dtype == ir.DataType.DOUBLE:
            value.const_value = _narrow(value.const_value)
            value.dtype = ir.DataType.FLOAT


def unify_concats(model: ir.Model) -> None:
    """Casts the inputs of a Concat to its output's type. SDXL joins float32 times to float16 text; ONNX forbids it."""
    for node in RecursiveGraphIterator(model.graph):
        if node.op_type != "Concat":
            continue
        target = node.outputs[0].dtype
        for index, value in enumerate(node.inputs):
            if value is None or target is None or value.dtype in (None, target):
                continue
            cast = ir.node("Cast", [value], {"to": int(target)})
            cast.outputs[0].dtype, cast.outputs[0].shape = target, value.shape
            assert node.graph is not None
            node.graph.insert_before(node, cast)
            node.replace_input_with(index, cast.outputs[0])


def name_outputs(model: ir.Model, axes: Sequence[Mapping[int, str]]) -> None:
    """Gives the outputs' axes names that can be read: torch calls them `2*(((height - 1)//2)) + 2`.

    As in optimum-onnx's files, such a name is that of an input's axis, or computes from it: `height * 8`.
    """
    for output, names in zip(model.graph.outputs, axes, strict=True):
        if output.shape is not None:
            output.shape = ir.Shape(
                [
                    names.get(axis) if isinstance(size, ir.SymbolicDim) and axis in names else size
                    for axis, size in enumerate(output.shape)
                ]
            )


def drop_traces(model: ir.Model) -> None:
    """Drops stack traces, which hold this machine's paths, and everything else beside the names of the modules."""
    for node in RecursiveGraphIterator(model.graph):
        for key in set(node.metadata_props) - {SCOPES}:
            del node.metadata_props[key]
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.metadata_props.clear()
    model.graph.metadata_props.clear()


def _narrow(tensor: ir.TensorProtocol) -> ir.Tensor:
    return ir.Tensor(tensor.numpy().astype(np.float32), name=tensor.name)
