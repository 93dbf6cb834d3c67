"""Which ONNX operator sets the packages that are installed can write and read, found by trying them on one node."""

from __future__ import annotations

import logging
from importlib.metadata import version

LOWEST = 18
"""The set that torch's translations are written in; older ones it does not write."""


def explain(asked: int) -> str | None:
    """Why an operator set cannot be had, with those that can; None if it can. Imports no torch."""
    if _goes(asked):
        return None
    most = LOWEST
    while _goes(most + 1):
        most += 1
    found = " and ".join(f"{name} {version(name)}" for name in ("onnxscript", "onnxruntime"))
    return f"should be {LOWEST} to {most}, which {found} know, found {asked}; torch's own default if left out"


def _goes(opset: int) -> bool:
    """Whether a model of one node is converted to the set, as torch does at the end of an export, and then loaded."""
    import onnx_ir as ir
    import onnxruntime
    from onnxscript import version_converter

    values = [ir.Value(name=name, shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.FLOAT)) for name in "xy"]
    node = ir.Node("", "Identity", values[:1], outputs=values[1:])
    model = ir.Model(
        ir.Graph(values[:1], values[1:], nodes=[node], opset_imports={"": LOWEST}, name="one"), ir_version=10
    )
    logger = logging.getLogger("onnxscript.version_converter")
    before = logger.level
    logger.setLevel(logging.CRITICAL)  # what it says of a failure is told in our own words
    try:
        version_converter.convert_version(model, opset)
    except ValueError:
        return False
    finally:
        logger.setLevel(before)
    if model.opset_imports[""] != opset:
        return False
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    except Exception:  # onnxruntime's exceptions have no base of their own
        return False
    return True
