"""What leaves a block together, in a real network: the heads of an attention, the neurons of a feed-forward."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from compressor.errors import CompressorError
from compressor.structure.family import BlockTable, Family, Heads, Neurons, Target, find_targets

FUSED = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
}
"""diffusers' fused projections of an attention, and the separate ones that each stands for, in order of its rows."""


@dataclass(frozen=True, eq=False)
class Group:
    """The heads of one attention or the neurons of one feed-forward, which can be removed one by one.

    Counts and places are those of the network as it is now, after every removal so far.

    Attributes:
        name: such as `transformer_blocks.0.attn.heads`.
        block: dotted name of the block.
        kind: heads or neurons.
        width: rows of each producer that one unit has: the head dimension, or 1. A gated producer has them twice.
        producers: linears whose rows leave.
        consumers: linears whose columns leave.
        root: the block.
        table: the family's row.
    """

    name: str
    block: str
    kind: Literal["heads", "neurons"]
    width: int
    producers: tuple[Target, ...]
    consumers: tuple[Target, ...]
    root: nn.Module
    table: Heads | Neurons

    @property
    def gated(self) -> bool:
        """Whether the producer yields values and, behind them, as many gates."""
        return isinstance(self.table, Neurons) and self.table.gated

    @property
    def count(self) -> int:
        """How many heads or neurons there are."""
        return self.producers[0].outputs // (2 * self.width if self.gated else self.width)

    @property
    def unit_weights(self) -> int:
        """How many weights leave with one head or neuron, without biases."""
        rows = sum(len(self.rows(producer, [0])) * producer.inputs for producer in self.producers)
        return rows + sum(self.width * consumer.outputs for consumer in self.consumers)

    def rows(self, producer: Target, units: Tensor | Iterable[int]) -> Tensor:
        """Rows of a producer that belong to some units, `width` for each in the order given; behind them the gates'."""
        assert any(producer is known for known in self.producers), f"{producer.name} is no producer of {self.name}"
        rows = self._spread(units)
        return torch.cat([rows, rows + self.count * self.width]) if self.gated else rows

    def columns(self, consumer: Target, units: Tensor | Iterable[int]) -> Tensor:
        """Columns of a consumer that belong to some units, `width` for each in the order given."""
        assert any(consumer is known for known in self.consumers), f"{consumer.name} is no consumer of {self.name}"
        return self._spread(units) + self.start

    @property
    def start(self) -> int:
        """The consumers' first column that belongs to the group."""
        if isinstance(self.table, Heads) or self.table.behind is None:
            return 0
        before = self.root.get_submodule(self.table.behind)
        assert isinstance(before, nn.Linear)
        return before.out_features

    def _spread(self, units: Tensor | Iterable[int]) -> Tensor:
        chosen = units.cpu().long() if isinstance(units, Tensor) else torch.tensor(list(units), dtype=torch.long)
        return (chosen[:, None] * self.width + torch.arange(self.width)).flatten()


def find_groups(module: nn.Module, family: Family) -> tuple[Group, ...]:
    """Every group of the module that the family's table knows, in order of execution; possibly none.

    Raises:
        CompressorError: if a block's linears or attributes are not as the table says.
    """
    targets = {target.name: target for target in find_targets(module, family)}
    found: list[Group] = []
    for table in family.blocks:
        for block, root in module.named_modules():
            if re.fullmatch(table.pattern, block):
                found += _of_block(table, block, root, targets)
    return tuple(found)


def within(groups: Iterable[Group], targets: Iterable[Target]) -> tuple[Group, ...]:
    """Those groups that may be removed from when only some targets were chosen.

    All producers must be among the targets, and those consumers that are of the same part (`proj_out` of a Flux single
    block is feed-forward, and does not keep the heads from leaving).
    """
    chosen = {target.name for target in targets}
    return tuple(
        group
        for group in groups
        if all(
            target.name in chosen
            for target in (*group.producers, *group.consumers)
            if target.layer.part == group.producers[0].layer.part
        )
    )


def consumers(groups: Iterable[Group]) -> tuple[Target, ...]:
    """The linears that read some groups, each once, in the order of the groups."""
    found = {target.name: target for group in groups for target in group.consumers}
    return tuple(found.values())


@torch.no_grad()
def magnitudes(group: Group) -> Tensor:
    """The sum of |w| over all rows and columns that leave with each head or neuron; `count` numbers, float32."""
    sums = torch.zeros(group.count, device=group.producers[0].module.weight.device)
    for producer in group.producers:
        rows = producer.module.weight.detach().abs().sum(1, dtype=torch.float32)
        sums += rows.view(-1, group.count, group.width).sum((0, 2))  # values and gates, where there are both
    for consumer in group.consumers:
        columns = consumer.module.weight.detach().abs().sum(0, dtype=torch.float32)
        sums += columns[group.start : group.start + group.count * group.width].view(group.count, group.width).sum(1)
    return sums


@torch.no_grad()
def unfuse(module: nn.Module) -> tuple[str, ...]:
    """Undoes diffusers' `fuse_qkv_projections`, in place; the separate projections get the fused weights.

    Returns:
        Names of the attentions that were fused.
    """
    fused = [(name, part) for name, part in module.named_modules() if getattr(part, "fused_projections", False)]
    for _, attention in fused:
        for whole, parts in FUSED.items():
            if isinstance(linear := getattr(attention, whole, None), nn.Linear):
                _split(linear, [attention.get_submodule(part) for part in parts])
                delattr(attention, whole)
        setattr(attention, "fused_projections", False)  # noqa: B010 -- a module's own flag, unknown to type checkers
    if fused and hasattr(module, "unfuse_qkv_projections"):
        call: Any = module.unfuse_qkv_projections
        call()  # puts the processors back
    return tuple(name for name, _ in fused)


def _split(whole: nn.Linear, parts: list[nn.Module]) -> None:
    start = 0
    for part in parts:
        assert isinstance(part, nn.Linear)
        end = start + part.out_features
        part.weight.copy_(whole.weight[start:end])
        if part.bias is not None and whole.bias is not None:
            part.bias.copy_(whole.bias[start:end])
        start = end


def _of_block(table: BlockTable, block: str, root: nn.Module, targets: Mapping[str, Target]) -> list[Group]:
    groups: list[Group] = []
    for row in table.groups:
        if isinstance(row, Heads):
            if row.attention in dict(root.named_modules()):
                groups.append(_heads(row, block, root, targets))
        elif f"{block}.{row.up}" in targets or f"{block}.{row.down}" in targets:
            groups.append(_neurons(row, block, root, targets))
    columns: dict[str, int] = {}
    for group in groups:
        for consumer in group.consumers:
            columns[consumer.name] = columns.get(consumer.name, 0) + group.count * group.width
    for group in groups:
        for consumer in group.consumers:
            if consumer.inputs != columns[consumer.name]:
                raise CompressorError(
                    f"{consumer.name}: should have {columns[consumer.name]} inputs, as many as the heads and neurons "
                    f"that it reads are wide, found {consumer.inputs}"
                )
    return groups


def _heads(row: Heads, block: str, root: nn.Module, targets: Mapping[str, Target]) -> Group:
    attention = root.get_submodule(row.attention)
    name = f"{block}.{row.attention}"
    if getattr(attention, "fused_projections", False):
        raise CompressorError(
            f"{name}: should have its projections apart, found 'fused_projections' set; call unfuse_qkv_projections()"
        )
    known = {*row.rows, *row.columns}
    for suffix, part in attention.named_modules(prefix=row.attention):
        if isinstance(part, nn.Linear) and suffix not in known:
            raise CompressorError(
                f"{block}: heads of '{row.attention}' should be the linears {', '.join(sorted(known))}, found "
                f"'{suffix}' beside them"
            )
    producers = _linears(row.rows, row.optional, block, attention, row.attention, targets)
    consumers = _linears(row.columns, row.optional, block, attention, row.attention, targets)
    if len({consumer.layer.stage for consumer in consumers}) > 1:
        stages = ", ".join(f"{consumer.layer.stage} of {consumer.name}" for consumer in consumers)
        raise CompressorError(
            f"{block}: the linears that read the heads of '{row.attention}' should have one stage in the family's "
            f"table, so that they are calibrated together, found {stages}"
        )
    rows = producers[0].outputs
    for producer in producers:
        if producer.outputs != rows:
            raise CompressorError(
                f"{producer.name}: should have {rows} rows, as {row.rows[0]} has, found {producer.outputs}"
            )
    heads = _read(root, block, row.counts[0])
    if heads is None or heads < 1 or rows % heads:
        raise CompressorError(
            f"{block}: '{row.counts[0]}' should divide the {rows} rows of {row.rows[0]}, found {heads}"
        )
    group = Group(f"{name}.heads", block, "heads", rows // heads, producers, consumers, root, row)
    _check_attributes(group, row.counts, heads, f"the number of heads in {row.counts[0]}")
    _check_attributes(group, row.widths, rows, f"the rows of {row.rows[0]}")
    _check_attributes(group, row.each, group.width, f"the rows of {row.rows[0]} over {row.counts[0]}")
    return group


def _neurons(row: Neurons, block: str, root: nn.Module, targets: Mapping[str, Target]) -> Group:
    producers = _linears((row.up,), (), block, root, row.name, targets)
    consumers = _linears((row.down,), (), block, root, row.name, targets)
    if row.behind is not None:
        _linears((row.behind,), (), block, root, row.name, targets)
    if row.gated and producers[0].outputs % 2:
        raise CompressorError(
            f"{producers[0].name}: should have an even number of rows, values and gates, found {producers[0].outputs}"
        )
    group = Group(f"{block}.{row.name}.neurons", block, "neurons", 1, producers, consumers, root, row)
    _check_attributes(group, row.counts, group.count, f"the neurons of {row.up}")
    return group


def _linears(
    names: tuple[str, ...],
    optional: tuple[str, ...],
    block: str,
    owner: nn.Module,
    owner_name: str,
    targets: Mapping[str, Target],
) -> tuple[Target, ...]:
    for name in names:
        if f"{block}.{name}" not in targets and name not in optional:
            has = ", ".join(sorted(part for part, _ in owner.named_children())) or "nothing"
            raise CompressorError(f"{block}: '{owner_name}' should have the linear '{name}', found {has}")
    return tuple(targets[f"{block}.{name}"] for name in names if f"{block}.{name}" in targets)


def _check_attributes(group: Group, paths: tuple[str, ...], expected: int, meaning: str) -> None:
    for path in paths:
        found = _read(group.root, group.block, path)
        if found is not None and found != expected:
            raise CompressorError(f"{group.block}: '{path}' should be {expected}, {meaning}, found {found}")


def place_of(root: nn.Module, path: str) -> tuple[Any, str | int, bool]:
    """Where an attribute of a block is kept: its owner, its key there, and whether the owner is a list."""
    *owners, last = path.split(".")
    if last.isdigit():
        *owners, last, index = path.split(".")
        return getattr(root.get_submodule(".".join(owners)), last, None), int(index), True
    return root.get_submodule(".".join(owners)), last, False


def _read(root: nn.Module, block: str, path: str) -> int | None:
    """An integer attribute; none if it is absent and may be."""
    owner, key, listed = place_of(root, path)
    if listed:
        return None if owner is None else int(owner[key])
    value = getattr(owner, str(key), None)
    if isinstance(value, int):
        return value
    if str(key).startswith("_"):
        return None
    numbers = ", ".join(
        f"{name}={number}"
        for name, number in sorted(vars(owner).items())
        if type(number) is int and not name.startswith("_")
    )
    raise CompressorError(f"{block}: '{path}' should be a whole number, found {value!r} and the numbers {numbers}")
