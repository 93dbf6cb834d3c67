"""Ways to run a network's forward: eager, compiled, or as an ONNX file in onnxruntime."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from compressor import registry
from compressor.errors import CompressorError
from compressor.pipeline import Folder, Pipeline
from compressor.structure import Family, compile_blocks, find_targets

Extent = Literal["blocks", "network"]
"""What is compiled in one piece: every block by itself, alike ones once, or the whole network."""

Arguments = Mapping[str, Tensor | Mapping[str, Tensor]]


def eager(network: nn.Module, arguments: Arguments) -> Callable[[], tuple[Tensor, ...]]:
    """The forward as it is, without gradients."""

    def call() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return network(**arguments, return_dict=False)

    return call


def compiled(
    network: nn.Module, family: Family, extent: Extent, arguments: Arguments
) -> Callable[[], tuple[Tensor, ...]]:
    """The forward by `torch.compile` with its default mode and static shapes.

    Args:
        network: is not changed; what is compiled shares its weights.
        family: its table, which says what its blocks are.
        extent: of a piece. By blocks, what lies outside of them stays eager.
        arguments: of the forward.
    """
    return eager(compiled_network(network, family, extent), arguments)


def compiled_network(network: nn.Module, family: Family, extent: Extent) -> nn.Module:
    """A network that shares the weights of another, and whose forward is compiled as by `compiled`."""
    shared = copy.deepcopy(network, {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())})
    if extent == "network":
        shared.compile(dynamic=False)
    else:
        compile_blocks(shared, family, fullgraph=True)
    return shared


def onnx(
    network: nn.Module, family: Family, arguments: Arguments, folder: Path, threads: int | None
) -> Callable[[], object]:
    """The forward by onnxruntime on the CPU, of a file that our exporter wrote and proved.

    Args:
        network: on the CPU in float32.
        family: its table.
        arguments: of the forward.
        folder: empty; gets the file.
        threads: that one operator is spread over; None for onnxruntime's own choice.

    Raises:
        CompressorError: if a package is missing, or the export fails.
    """
    component = "unet" if family.name == "unet" else "transformer"
    source = Folder(folder, "random weights", "", (component,), (), component, family)
    pipeline = Pipeline(None, source, network, find_targets(network, family), {}, torch.float32)
    exported = registry.load("exporter", "onnx")().export(pipeline, folder)
    onnxruntime: Any = import_module("onnxruntime")
    options = onnxruntime.SessionOptions()
    if threads is not None:
        options.intra_op_num_threads = threads
    file = folder / next(file for file in exported.files if file.suffix == ".onnx")
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    feeds = {name: tensor.numpy() for name, tensor in _flat(arguments)}
    assert feeds.keys() == {given.name for given in session.get_inputs()}
    return lambda: session.run(None, feeds)


def check_onnx() -> None:
    """Raises a CompressorError that says how, if something is to be installed first."""
    problem = registry.load("exporter", "onnx")().available()
    if problem is not None:
        raise CompressorError(problem)


def _flat(arguments: Arguments) -> Iterator[tuple[str, Tensor]]:
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            yield name, value
        else:
            yield from value.items()
