"""One forward of the meta-device twin: which linears share an input, in what order they run, what they cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from compressor.errors import CompressorError
from compressor.structure.family import Family, Target, find_targets


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
        with FlopCounterMode(display=False) as counter:
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
        macs=counter.get_total_flops() // 2,
        macs_of={target.name: tokens[target.name] * target.inputs * target.outputs for target in targets},
    )
