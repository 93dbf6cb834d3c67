"""Removes heads and neurons from a network: rows, columns and the attributes that count them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from compressor.errors import CompressorError
from compressor.structure.family import Heads, Target
from compressor.structure.groups import Group, place_of


@torch.no_grad()
def remove(group: Group, units: Tensor | Iterable[int]) -> None:
    """Takes units out of the network for good, in place. Works on the meta device too.

    Parameters keep their dtype, device and `requires_grad`, but are new objects.

    Args:
        group: what the units belong to, in the network as it is now.
        units: indices of heads or neurons, in any order; one that is named twice counts once.

    Raises:
        CompressorError: if an index is out of bounds, or no unit would be left.
    """
    drop = check(group, units)
    if len(drop):
        left = torch.ones(group.count, dtype=torch.bool)
        left[drop] = False
        keep(group, left.nonzero().flatten())


@torch.no_grad()
def keep(group: Group, units: Tensor | Iterable[int]) -> None:
    """Takes all other units out of the network; as `remove`, which see.

    The units that stay keep their order, whatever the order of the indices.
    """
    chosen = _indices(group, units)
    if not len(chosen):
        raise CompressorError(_nothing_left(group))
    # every index first: they depend on the sizes as they are
    rows = [group.rows(producer, chosen) for producer in group.producers]
    columns = []
    for consumer in group.consumers:
        stays = torch.ones(consumer.inputs, dtype=torch.bool)
        stays[group.columns(consumer, range(group.count))] = False
        stays[group.columns(consumer, chosen)] = True
        columns.append(stays.nonzero().flatten())
    for producer, index in zip(group.producers, rows, strict=True):
        _take(producer.module, index, dim=0)
    for consumer, index in zip(group.consumers, columns, strict=True):
        _take(consumer.module, index, dim=1)
    set_attributes(group)


@torch.no_grad()
def zero(group: Group, units: Tensor | Iterable[int]) -> None:
    """Zeroes the consumers' columns of some units, in place: what removing them comes to, with the shapes kept.

    Raises:
        CompressorError: if an index is out of bounds.
    """
    chosen = _indices(group, units)
    for consumer in group.consumers:
        weight_OI = consumer.module.weight
        weight_OI.index_fill_(1, group.columns(consumer, chosen).to(weight_OI.device), 0)


class Snapshot:
    """Weights and biases of linears, to bring back after elements, heads or neurons were pruned.

    Args:
        targets: the linears; copied, on their device.
        groups: heads and neurons of which some may leave.
    """

    def __init__(self, targets: Iterable[Target], groups: Iterable[Group] = ()) -> None:
        self._groups = tuple(groups)
        self._saved = [
            (target.module, name, tensor.detach().clone())
            for target in targets
            for name, tensor in target.module.named_parameters()
        ]

    @torch.no_grad()
    def restore(self) -> None:
        """Brings everything back, attributes included; parameters whose shape has changed become new objects."""
        for linear, name, tensor in self._saved:
            now = getattr(linear, name)
            if now.shape == tensor.shape:
                now.copy_(tensor)
            else:
                setattr(linear, name, nn.Parameter(tensor.clone(), requires_grad=now.requires_grad))
            linear.out_features, linear.in_features = linear.weight.shape
        for group in self._groups:
            set_attributes(group)


def check(group: Group, units: Tensor | Iterable[int]) -> Tensor:
    """The units to remove, sorted, each once, on the CPU.

    Raises:
        CompressorError: as `remove`, and before anything is changed.
    """
    chosen = _indices(group, units)
    if len(chosen) == group.count:
        raise CompressorError(_nothing_left(group))
    return chosen


def set_attributes(group: Group) -> None:
    """Sets what the modules remember of their sizes to what the weights now are."""
    table = group.table
    width = group.count * group.width
    for path in table.counts:
        _set(group.root, path, group.count)
    for path in table.widths if isinstance(table, Heads) else ():
        _set(group.root, path, width)


def _nothing_left(group: Group) -> str:
    return f"{group.name}: should keep at least one of {group.count} {group.kind}, found that all would be removed"


def _indices(group: Group, units: Tensor | Iterable[int]) -> Tensor:
    if isinstance(units, Tensor):
        assert units.dtype in (torch.int64, torch.int32), f"units are indices, not a mask, found {units.dtype}"
        chosen = units.cpu().long().flatten()
    else:
        chosen = torch.tensor(list(units), dtype=torch.long)
    chosen = chosen.unique(sorted=True)
    wrong = chosen[(chosen < 0) | (chosen >= group.count)]
    if len(wrong):
        raise CompressorError(f"{group.name}: units should be from 0 to {group.count - 1}, found {int(wrong[0])}")
    return chosen


def _take(linear: nn.Linear, index: Tensor, dim: int) -> None:
    linear.weight = _cut(linear.weight, index, dim)
    if dim == 0 and linear.bias is not None:
        linear.bias = _cut(linear.bias, index, dim)
    linear.out_features, linear.in_features = linear.weight.shape


def _cut(old: Tensor, index: Tensor, dim: int) -> nn.Parameter:
    return nn.Parameter(old.detach().index_select(dim, index.to(old.device)), requires_grad=old.requires_grad)


def _set(root: nn.Module, path: str, value: int) -> None:
    owner, key, listed = place_of(root, path)
    if listed and owner is not None:
        owner[key] = value
    elif not listed and hasattr(owner, str(key)):
        setattr(owner, str(key), value)
