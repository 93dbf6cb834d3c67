"""Gathers the inputs of layers from inside of compiled blocks (`calibration.compile`).

A hook would break a block's graph at every layer. Instead, an operator that torch.compile does not look into hands a
layer's input to Python. Every layer that may be asked for has one in the graph, in every pass; where nothing is
gathered it returns at once. So all packages run the same graphs, and alike blocks share one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from compressor.calibration.sampling import out_of_memory
from compressor.errors import CompressorError
from compressor.structure import Family, Target, Trace, compile_blocks, find_targets, many_shapes

BACKEND = "inductor"
"""Of torch.compile."""

Sink = Callable[[Tensor], None]

_sinks: dict[int, Sink] = {}
"""By place, while a network gathers: the operator is the process's, and is given nothing but tensors."""


@torch.library.custom_op("compressor::gather", mutates_args={"mark"}, tags=(torch.Tag.flexible_layout,))
def _gather(x: Tensor, mark: Tensor, place: Tensor) -> None:
    """Hands an input to whoever asked for it.

    Args:
        x: the input.
        mark: said to be changed, so that no call is dropped.
        place: the layer's number, on the CPU, where reading it waits for nothing. A tensor, so that it is an input of
            the graph and alike blocks share one.

    The tag lets inductor hand on what it has in memory; else it would keep an input twice, for its strides' sake.
    """
    sink = _sinks.get(int(place))
    if sink is not None:
        sink(x)


@_gather.register_fake
def _(x: Tensor, mark: Tensor, place: Tensor) -> None:
    return None


class GatheringLinear(nn.Linear):
    """What a linear is while its network gathers; it differs from a plain one in its class and two buffers."""

    mark: Tensor
    place: Tensor

    def forward(self, input: Tensor) -> Tensor:
        """Hands the input on before it is used."""
        _gather(input, self.mark, self.place)
        return super().forward(input)


class Blocks:
    """A network's blocks, which gather while compiled.

    Args:
        network: as it is, nothing of it changes before `gathering`.
        family: its table.
        trace: tells which layers of a block share an input; one for each input gathers.
    """

    def __init__(self, network: nn.Module, family: Family, trace: Trace) -> None:
        self._network, self._family, self._trace = network, family, trace
        self._first: dict[tuple[str, str], Target] = {}
        for target in find_targets(network, family, adaln=True):
            if any(re.fullmatch(table.pattern, target.block) for table in family.blocks):
                self._first.setdefault(self._input(target), target)
        self._places = {key: place for place, key in enumerate(self._first)}

    def covers(self, target: Target) -> bool:
        """Whether the layer is in a block; others keep their hooks."""
        return self._input(target) in self._first

    @contextmanager
    def gathering(self, sinks: Iterable[tuple[Target, Sink]]) -> Iterator[None]:
        """While it lasts, blocks run compiled, and some layers' inputs are handed on. Then the network is as it was.

        What was compiled stays in torch's own cache: the next time compiles nothing for the same shapes.

        Args:
            sinks: layers that the network's blocks have, and what is called with the input of each.

        Raises:
            CompressorError: if torch cannot compile a block, with its own words.
        """
        assert not _sinks, "another network gathers"
        device = next(self._network.parameters()).device
        mark = torch.zeros(1, device=device)
        blocks: tuple[nn.Module, ...] = ()
        changed: list[nn.Linear] = []
        try:
            for target, sink in sinks:
                _sinks[self._places[self._input(target)]] = sink
            for key, target in self._first.items():
                changed.append(target.module)
                target.module.register_buffer("mark", mark, persistent=False)
                target.module.register_buffer("place", torch.tensor(self._places[key]), persistent=False)
                target.module.__class__ = GatheringLinear
            blocks = compile_blocks(self._network, self._family, fullgraph=True, backend=BACKEND)
            with many_shapes(), _explained():
                yield
        finally:
            for block in blocks:
                block._compiled_call_impl = None
            for linear in changed:
                linear.__class__ = nn.Linear
                for name in ("mark", "place"):
                    linear._buffers.pop(name, None)
                    linear._non_persistent_buffers_set.discard(name)
            _sinks.clear()

    def _input(self, target: Target) -> tuple[str, str]:
        """Of which input a layer is: one that several blocks are given is handed on in each."""
        return target.block, self._trace.shared[target.name]


def check(device: torch.device) -> None:
    """Makes sure that something here compiles for a device.

    Raises:
        CompressorError: if nothing does, and what to do.
    """
    advice = "leave calibration.compile out, or"
    if device.type == "cuda":
        if find_spec("triton") is None:
            raise CompressorError(f"calibration.compile: needs triton on a GPU, found none; {advice} install it")
        capability = torch.cuda.get_device_capability(device)
        if torch.version.hip is None and capability < (7, 0):
            raise CompressorError(
                "calibration.compile: needs a GPU of compute capability 7.0, found "
                f"{capability[0]}.{capability[1]}; leave it out"
            )
    elif device.type == "cpu":
        inductor: Any = import_module("torch._inductor.cpp_builder")
        try:
            inductor.get_cpp_compiler()
        except RuntimeError:  # torch's words tell how to look at its own options
            raise CompressorError(
                f"calibration.compile: needs a C++ compiler on a CPU, found none; {advice} install g++"
            ) from None
    else:
        raise CompressorError(f"calibration.compile: has been tried on cpu and cuda alone, found '{device.type}'")


@contextmanager
def _explained() -> Iterator[None]:
    """Tells a failure to compile from all others, among them memory that ran out."""
    exceptions: Any = import_module("torch._dynamo.exc")
    try:
        yield
    except (exceptions.TorchDynamoException, exceptions.FailOnRecompileLimitHit) as error:
        inner = getattr(error, "inner_exception", None)
        if isinstance(inner, RuntimeError) and out_of_memory(inner):
            raise inner from None
        words = str(error).split("\nSet TORCH")[0].strip()
        raise CompressorError(
            "calibration.compile: torch could not compile the network's blocks; calibration.compile: false would do "
            f"without. Its words: {words}"
        ) from error
