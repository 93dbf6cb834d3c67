"""One forward of the meta-device twin: which linears share an input, in what order they run, what they cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from compressor.errors import CompressorError
from compressor.structure.family import Family, Target, find_targets

_ALIKE = frozenset({F.silu, F.gelu})
"""Functions whose output has the shape, strides and dtype of their first argument."""

_OF_TWO = frozenset(getattr(owner, name) for owner in (torch, Tensor) for name in ("add", "sub", "mul", "div"))
"""Functions of every element and its counterpart."""


@dataclass(frozen=True)
class Trace:
    """What one forward of one sample shows.

    Attributes:
        shared: for every target, the name of the first target that reads the very same input tensor, or equal values:
            every norm applies SiLU to the embedding anew, so that all adaLN linears share one input.
        tokens: rows of every target's input.
        constant: targets whose input is an argument of the forward itself, and so is the same at every timestep.
        macs: multiply-adds of the whole forward.
        macs_of: multiply-adds of every target.
    """

    shared: dict[str, str]
    tokens: dict[str, int]
    constant: frozenset[str]
    macs: int
    macs_of: dict[str, int]


@torch.no_grad()
def trace(twin: nn.Module, family: Family, *, height: int, width: int, sequence: int) -> Trace:
    """Runs the twin once on one sample.

    Args:
        twin: the network on the meta device.
        family: its table.
        height: latent rows.
        width: latent columns.
        sequence: text tokens.

    Raises:
        CompressorError: if the forward does not run one of the table's layers.
    """
    targets = find_targets(twin, family, adaln=True)
    arguments = family.inputs(twin, batch=1, height=height, width=width, sequence=sequence)
    given = {id(value) for value in arguments.values()}
    seen: dict[str, Tensor] = {}  # holding the tensors keeps their ids apart

    def remember(target: Target) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[target.name] = args[0]

        return hook

    handles = [target.module.register_forward_pre_hook(remember(target)) for target in targets]
    try:
        with FlopCounterMode(display=False) as counter, _ByShapes() as others:
            twin(**arguments, return_dict=False)
    finally:
        for handle in handles:
            handle.remove()
    if idle := [target.name for target in targets if target.name not in seen]:
        raise CompressorError(
            f"{idle[0]}: should run in every forward, found {len(idle)} layers that do not; leave them out of the "
            f"table of family '{family.name}'"
        )
    first: dict[int | str, str] = {}
    keys = {t.name: t.layer.part if t.layer.part == "adaln" else id(seen[t.name]) for t in targets}
    shared = {name: first.setdefault(key, name) for name, key in keys.items()}
    tokens = {target.name: seen[target.name].numel() // target.inputs for target in targets}
    return Trace(
        shared=shared,
        tokens=tokens,
        constant=frozenset(name for name, tensor in seen.items() if id(tensor) in given),
        macs=counter.get_total_flops() // 2 + others.macs,
        macs_of={target.name: tokens[target.name] * target.inputs * target.outputs for target in targets},
    )


class _ByShapes(TorchFunctionMode):
    """Answers what most of a forward consists of by its shapes alone: PyTorch on the meta device takes twice as long.

    Attributes:
        macs: multiply-adds of what was answered.
    """

    def __init__(self) -> None:
        super().__init__()
        self.macs = 0

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Called in place of every function of PyTorch."""
        given = kwargs or {}
        if func in _ALIKE and args and not given.get("inplace"):
            return torch.empty_like(args[0])
        if func in _OF_TWO and len(args) == 2 and not given and _fits_into(args[1], args[0]):
            return args[0].new_empty(args[0].shape)
        if func in (F.layer_norm, F.rms_norm) and len(args) > 1 and tuple(args[1]) == args[0].shape[-len(args[1]) :]:
            return args[0].new_empty(args[0].shape)
        if func is F.group_norm and len(args) > 1 and args[0].dim() > 1 and args[0].shape[1] % args[1] == 0:
            return args[0].new_empty(args[0].shape)
        if func is F.linear and len(args) > 1 and args[0].shape[-1] == args[1].shape[1]:
            x, weight = args[:2]
            self.macs += x.numel() * len(weight)
            return x.new_empty((*x.shape[:-1], len(weight)))
        if func is F.scaled_dot_product_attention and len(args) > 2:
            query, key, value = args[:3]
            if query.shape[:-2] == key.shape[:-2] == value.shape[:-2]:
                self.macs += query[..., 0].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1])
                return query.new_empty((*query.shape[:-1], value.shape[-1]))
        return func(*args, **given)


def _fits_into(other: Any, x: Any) -> bool:
    """Whether a function of every element of both has the shape and dtype of `x`, and lies in memory in order."""
    if not (isinstance(x, Tensor) and x.is_floating_point() and x.is_contiguous()):
        return False
    if not isinstance(other, Tensor):
        return isinstance(other, int | float)
    pairs = zip(reversed(other.shape), reversed(x.shape), strict=False)
    return other.dtype == x.dtype and other.dim() <= x.dim() and all(own in (1, size) for own, size in pairs)
