"""Shrinks blocks and proves it: what was removed must come to the same as what was zeroed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compressor.errors import CompressorError
from compressor.structure.groups import Group
from compressor.structure.removal import check, remove, zero

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""How far outputs may lie apart by dtype, norm of the difference over norm: sums of other lengths round differently."""


@dataclass(frozen=True)
class Proof:
    """How far the shrunk network's outputs lie from those of the zeroed one: norm of the difference over norm.

    Attributes:
        errors: of every consumer and of every block, by name, computed in float32 or better.
        tolerance: what none of them exceeds.
        network_error: of the network's output, computed in its own dtype.
        network_tolerance: what it does not exceed.
    """

    errors: dict[str, float]
    tolerance: float
    network_error: float
    network_tolerance: float


@torch.no_grad()
def shrink(network: nn.Module, removals: Mapping[Group, Tensor | Iterable[int]], inputs: Mapping[str, Any]) -> Proof:
    """Removes units from a network, in place, and proves that nothing else changed.

    First the consumers' columns are zeroed and the network runs once, which gives every block's inputs. Then block by
    block: the zeroed block runs, the units are removed, the shrunk block runs on the same inputs, and the outputs of
    consumers and block are compared. At last the whole network is. No second copy of any weight is needed, but a block
    of half precision is widened to float32 while its turn lasts, which changes no weight: rounding would hide too
    much. The inputs of all blocks are held, which a small picture keeps small.

    Args:
        network: in evaluation mode, on a device that computes.
        removals: indices of heads or neurons by group; none is as good as an absent group.
        inputs: of the network's forward, such as `Family.inputs` makes.

    Raises:
        CompressorError: if the outputs differ by more than `TOLERANCE`, naming the layer or block; if an index is
            wrong, before any change.
    """
    units = {group: check(group, chosen) for group, chosen in removals.items()}
    units = {group: chosen for group, chosen in units.items() if len(chosen)}
    for group, chosen in units.items():
        zero(group, chosen)
    blocks = {group.block: group.root for group in units}
    expected, calls = _record(network, blocks, inputs)
    errors: dict[str, float] = {}
    tolerance = 0.0
    for name, block in blocks.items():
        of_block = {group: chosen for group, chosen in units.items() if group.block == name}
        args, kwargs = calls.pop(name)
        own = {key: tensor.dtype for key, tensor in _floats(block)}
        wide = _widest({torch.float32, *own.values()})
        block.to(wide)
        try:
            found = _removed_and_compared(name, block, of_block, _cast(args, wide), _cast(kwargs, wide))
        finally:
            for key, tensor in _floats(block):
                tensor.data = tensor.data.to(own[key])
        errors |= found
        tolerance = max(tolerance, TOLERANCE[wide])
    after = _tensors(network(**inputs, return_dict=False))
    allowed = max(TOLERANCE[tensor.dtype] for tensor in after)
    return Proof(errors, tolerance, _compare("the network", expected, after, allowed), allowed)


def _removed_and_compared(
    name: str, block: nn.Module, units: Mapping[Group, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, float]:
    before = _outputs(block, units, args, kwargs)
    for group, chosen in units.items():
        remove(group, chosen)
    try:
        after = _outputs(block, units, args, kwargs)
    except (RuntimeError, ValueError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        first = str(error).partition("\n")[0]
        raise CompressorError(f"{name}: should still run after removing, found {first}") from error
    return {
        layer: _compare(layer, tensors, after[layer], max(TOLERANCE[tensor.dtype] for tensor in tensors))
        for layer, tensors in before.items()
    }


def _floats(block: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and buffers that `Module.to` converts."""
    return [(key, t) for key, t in (*block.named_parameters(), *block.named_buffers()) if t.is_floating_point()]


def _widest(dtypes: set[torch.dtype]) -> torch.dtype:
    return torch.float64 if torch.float64 in dtypes else torch.float32


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Tensors of floating point in a block's arguments, in another dtype."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, tuple | list):
        return type(value)(_cast(part, dtype) for part in value)
    if isinstance(value, dict):
        return {key: _cast(part, dtype) for key, part in value.items()}
    return value


def _record(
    network: nn.Module, blocks: Mapping[str, nn.Module], inputs: Mapping[str, Any]
) -> tuple[list[Tensor], dict[str, tuple[tuple[Any, ...], dict[str, Any]]]]:
    """The network's outputs, and what every block is called with."""
    calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def remember(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.setdefault(name, (args, dict(kwargs)))

        return hook

    handles = [block.register_forward_pre_hook(remember(name), with_kwargs=True) for name, block in blocks.items()]
    try:
        expected = _tensors(network(**inputs, return_dict=False))
    finally:
        for handle in handles:
            handle.remove()
    return expected, calls


def _outputs(
    block: nn.Module, groups: Iterable[Group], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, list[Tensor]]:
    """Outputs of the consumers and of the block. The consumers are telling: the block adds its input to theirs."""
    found: dict[str, list[Tensor]] = {}

    def remember(layer: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(_module: nn.Module, _args: Any, output: Tensor) -> None:
            found[layer] = [output]

        return hook

    consumers = {consumer.name: consumer.module for group in groups for consumer in group.consumers}
    handles = [module.register_forward_hook(remember(layer)) for layer, module in consumers.items()]
    try:
        output = block(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    found[next(iter(groups)).block] = _tensors(output)
    return found


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    return [tensor for tensor in output if isinstance(tensor, Tensor)]


def _compare(layer: str, expected: list[Tensor], found: list[Tensor], tolerance: float) -> float:
    worst = 0.0
    for zeroed, removed in zip(expected, found, strict=True):
        wide = torch.promote_types(zeroed.dtype, torch.float32)
        difference = float(torch.linalg.vector_norm((zeroed - removed).to(wide)))
        norm = float(torch.linalg.vector_norm(zeroed.to(wide)))
        error = difference / norm if norm else difference
        if not error <= tolerance:  # NaN is no proof
            raise CompressorError(
                f"{layer}: after removing, the output should be as with the columns zeroed, to "
                f"{tolerance:.0e} of its norm, found it {error:.1e} off"
            )
        worst = max(worst, error)
    return worst
