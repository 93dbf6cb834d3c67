"""Builds a network of a known size with random weights, and makes smaller ones of it by removing heads and neurons."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterable, Mapping
from importlib import import_module
from math import gcd
from typing import Any

import torch
from torch import Tensor, nn

from compressor.bench.models import KnownModel
from compressor.errors import CompressorError
from compressor.meta import on_meta
from compressor.structure import Family, Group, Trace, find_groups, keep, trace
from compressor.structure.alignment import kept_count, spread

VAE_FACTOR = 8
"""Image pixels a latent pixel, either way, in every known model."""


def build(model: KnownModel, family: Family, layers: int | None, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A network with the random weights that diffusers begins training with.

    Args:
        model: its size.
        family: names its class.
        layers: at most so many in each part; None for all.
        device: may be `meta`.
        dtype: of all parameters.
    """
    diffusers: Any = import_module("diffusers")
    with on_meta() if device.type == "meta" else device:
        network = getattr(diffusers, family.component_class)(**model.shortened(layers))
    return network.to(device, dtype).eval().requires_grad_(False)


def inputs(
    model: KnownModel, family: Family, network: nn.Module, batch: int, size: int
) -> dict[str, Tensor | Mapping[str, Tensor]]:
    """Random arguments of the network's forward for pictures of `size` x `size` pixels."""
    side = size // VAE_FACTOR
    return dict(family.inputs(network, batch=batch, height=side, width=side, sequence=model.tokens))


def trace_of(model: KnownModel, family: Family, twin: nn.Module, size: int) -> Trace:
    """One forward of one sample of a network on the meta device: its operations."""
    side = size // VAE_FACTOR
    return trace(twin, family, height=side, width=side, sequence=model.tokens)


def kept_counts(
    groups: Iterable[Group], heads: float, neurons: float, multiple: int, keep_ends: bool
) -> dict[str, int]:
    """How many heads or neurons each group keeps.

    With a multiple of 1 every group by itself keeps what is nearest to the ratio, as the code published with OBS-Diff
    does. With any other, widths (of an attention: heads times head dimension) are multiples of it, and all groups of a
    kind share out what that rounds off.

    Args:
        groups: of a whole network, in order of execution.
        heads: share of heads to remove.
        neurons: share of neurons to remove.
        multiple: of widths.
        keep_ends: leave the first and the last block whole.

    Returns:
        Counts by the group's name, those included that keep all.

    Raises:
        CompressorError: if a ratio would leave none, or nothing is to be removed.
    """
    every = tuple(groups)
    ends = {every[0].block, every[-1].block} if keep_ends else set()
    inner = [group for group in every if group.block not in ends]
    if not inner:
        raise CompressorError(
            f"the first and the last block are kept, which are all of {len({group.block for group in every})}; "
            "should be more layers, or --no-keep-ends"
        )
    kept = {group.name: group.count for group in every}
    for alike in _alike(inner):
        ratio = heads if alike[0].kind == "heads" else neurons
        names = [group.name for group in alike]
        totals = [group.count for group in alike]
        if multiple == 1:
            counts = [kept_count(total, ratio, 1, name) for total, name in zip(totals, names, strict=True)]
        else:
            counts = spread(totals, ratio, multiple // gcd(multiple, alike[0].width), names)
        kept.update(zip(names, counts, strict=True))
    if all(kept[group.name] == group.count for group in every):
        raise CompressorError(
            f"heads {heads} and neurons {neurons} in multiples of {multiple} leave everything as it is; "
            "should remove something"
        )
    return kept


def shrink(network: nn.Module, family: Family, kept: Mapping[str, int]) -> nn.Module:
    """A copy of the network without the last heads and neurons of each group; which ones does not matter for speed.

    Args:
        network: is not changed.
        family: its table.
        kept: counts by the group's name.
    """
    smaller = copy.deepcopy(network)
    for group in find_groups(smaller, family):
        if kept[group.name] < group.count:
            keep(group, range(kept[group.name]))
    return smaller


def parameters(network: nn.Module) -> int:
    """How many parameters a network has."""
    return sum(parameter.numel() for parameter in network.parameters())


def _alike(groups: Iterable[Group]) -> list[list[Group]]:
    """Groups of one kind, with heads of one width: those that share out what rounding leaves over."""
    found: dict[tuple[str, int], list[Group]] = {}
    for group in groups:
        found.setdefault((group.kind, group.width), []).append(group)
    return list(found.values())


def free_memory() -> None:
    """Gives back what networks that are gone took."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
