"""A table for a network that no family describes: attentions by diffusers' names, feed-forwards by the graph."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from compressor.errors import CompressorError
from compressor.structure.family import BlockTable, ExampleInputs, Family, Heads, Layer, Neurons, Role
from compressor.structure.graph import Followed, by_table, follow
from compressor.structure.groups import find_groups

_ROWS: dict[str, Role] = {
    "to_q": "query",
    "to_k": "key",
    "to_v": "value",
    "add_q_proj": "query",
    "add_k_proj": "key",
    "add_v_proj": "value",
}
_COLUMNS = ("to_out.0", "to_add_out")


def discover(twin: nn.Module, inputs: ExampleInputs, *, height: int = 16, width: int = 16) -> tuple[Family, str]:
    """Finds the linears of a network's repeated blocks, and the groups in them that the dependency graph confirms.

    Streams are not told apart: every layer's is `joint`. Linears below a name that begins with `norm`, or that read one
    vector a sample, modulate, and are left out.

    Args:
        twin: the network on the meta device, dense and with its projections apart; not changed.
        inputs: makes inputs for its forward.
        height: latent rows to look at it with.
        width: latent columns.

    Returns:
        A family, and a warning that says what was found.

    Raises:
        CompressorError: if there are no repeated blocks with attentions, the network does not take a `timestep`, or
            does not run on the meta device.
    """
    kind = type(twin).__name__
    lists = {
        name: tuple(row.children())
        for name, row in twin.named_modules()
        if isinstance(row, nn.ModuleList) and any(_attentions(block) for block in row)
    }
    lists = {name: row for name, row in lists.items() if not any(other.startswith(f"{name}.") for other in lists)}
    if not lists:
        raise CompressorError(
            f"{kind}: should have lists of blocks with attentions (heads, to_q, to_k, to_v), found none"
        )
    if "timestep" not in inspect.signature(twin.forward).parameters:
        raise CompressorError(f"{kind}: its forward should have an argument 'timestep', found none")
    example = dict(inputs(twin, batch=1, height=height, width=width, sequence=16))
    try:
        stages = _stages(twin, example)
    except Exception as error:  # whatever it does with values that are not there
        raise CompressorError(
            f"{kind}: should run on the meta device, found {type(error).__name__}: {error}"
        ) from error
    tables = tuple(_table(name, blocks, stages) for name, blocks in lists.items())
    family = Family(kind, kind, tables, inputs)
    family, left_out = _with_groups(family, twin, example)
    groups = find_groups(twin, family)
    heads = sum(group.kind == "heads" for group in groups)
    linears = sum(len(table.layers) for table in tables)
    return family, (
        f"{kind}: no family describes it; found {linears} kinds of linears in {', '.join(lists)}, heads in {heads} "
        f"attentions and neurons in {len(groups) - heads} feed-forwards{left_out}"
    )


def _with_groups(family: Family, twin: nn.Module, example: dict[str, Any]) -> tuple[Family, str]:
    """The family with those groups that the graph confirms or finds, and what is to be told of the others."""
    try:
        followed = follow(twin, family, example)
    except CompressorError as error:
        bare = replace(family, blocks=tuple(replace(table, groups=()) for table in family.blocks))
        return bare, f"; without the graph no heads or neurons are known: {error}"
    doubted = {
        group.table
        for group in followed.groups
        if by_table(group, group.count - 1) != followed.by_graph(group, group.count - 1)
    }
    tables = (
        replace(table, groups=(*(row for row in table.groups if row not in doubted), *_feed_forwards(table, followed)))
        for table in family.blocks
    )
    names = ", ".join(sorted({row.attention for row in doubted if isinstance(row, Heads)}))
    left_out = f"; the graph contradicts the heads of {names}, which are left out" if doubted else ""
    return replace(family, blocks=tuple(tables)), left_out


def _attentions(block: nn.Module) -> dict[str, nn.Module]:
    return {
        name: part
        for name, part in block.named_modules()
        if isinstance(getattr(part, "heads", None), int)
        and all(isinstance(getattr(part, linear, None), nn.Linear) for linear in ("to_q", "to_k", "to_v"))
    }


def _linears(block: nn.Module) -> dict[str, nn.Linear]:
    return {
        name: part
        for name, part in block.named_modules()
        if type(part) is nn.Linear and not any(word.startswith("norm") for word in name.split("."))
    }


@torch.no_grad()
def _stages(twin: nn.Module, example: dict[str, Any]) -> dict[str, int]:
    """Places in the order of execution; linears that read the very same tensor have the first one's.

    Linears that do not run, or that read a single vector, have none.
    """
    order: dict[str, Tensor] = {}

    def remember(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            if args[0].numel() > args[0].shape[-1]:
                order.setdefault(name, args[0])

        return hook

    handles = [
        part.register_forward_pre_hook(remember(name)) for name, part in twin.named_modules() if type(part) is nn.Linear
    ]
    try:
        twin(**example, return_dict=False)
    finally:
        for handle in handles:
            handle.remove()
    first: dict[int, int] = {}
    return {name: first.setdefault(id(tensor), place) for place, (name, tensor) in enumerate(order.items())}


def _table(name: str, blocks: tuple[nn.Module, ...], stages: dict[str, int]) -> BlockTable:
    layers: dict[str, Layer] = {}
    heads: dict[str, list[nn.Module]] = {}
    outputs: dict[
        tuple[int, str], int
    ] = {}  # an attention's outputs are calibrated together, as they lose the same heads
    for place, block in enumerate(blocks):
        attentions = _attentions(block)
        for attention, module in attentions.items():
            heads.setdefault(attention, []).append(module)
        for suffix, linear in _linears(block).items():
            owner = next((a for a in attentions if suffix.startswith(f"{a}.")), None)
            last = suffix.removeprefix(f"{owner}.")
            role: Role = _ROWS.get(last, "output") if owner else "up" if _widens(linear) else "down"
            stage = stages.get(f"{name}.{place}.{suffix}")
            if stage is None:
                continue
            if owner and last in _COLUMNS:
                stage = outputs.setdefault((place, owner), stage)
            layers.setdefault(suffix, Layer(suffix, "attention" if owner else "feed_forward", role, "joint", stage))
    return BlockTable(
        rf"{re.escape(name)}\.\d+",
        tuple(layers.values()),
        tuple(row for attention, modules in heads.items() if (row := _heads(attention, modules))),
    )


def _widens(linear: nn.Linear) -> bool:
    return linear.out_features > linear.in_features


def _heads(attention: str, modules: list[nn.Module]) -> Heads | None:
    """The table's row of one attention; none where something else than the known linears is in it."""

    def has(module: nn.Module, name: str) -> bool:
        return any(name == part for part, _ in module.named_modules())

    known = (*_ROWS, *_COLUMNS)
    if any(name not in known for module in modules for name in _linears(module)):
        return None
    rows = [name for name in _ROWS if any(has(module, name) for module in modules)]
    columns = [name for name in _COLUMNS if any(has(module, name) for module in modules)]
    optional = [name for name in (*rows, *columns) if not all(has(module, name) for module in modules)]
    if not columns:
        return None
    module = modules[0]
    width = module.get_submodule("to_q").get_parameter("weight").shape[0]

    def named(names: list[str]) -> tuple[str, ...]:
        return tuple(f"{attention}.{name}" for name in names)

    return Heads(
        attention,
        rows=named(rows),
        columns=named(columns),
        optional=named(optional),
        counts=named(["heads", *(["sliceable_head_dim"] if hasattr(module, "sliceable_head_dim") else [])]),
        widths=named([n for n in ("inner_dim", "inner_kv_dim") if getattr(module, n, None) == width]),
        each=named(["head_dim"] if isinstance(getattr(module, "head_dim", None), int) else []),
    )


def _feed_forwards(table: BlockTable, followed: Followed) -> tuple[Neurons, ...]:
    """Pairs of linears of one block of which the graph says that rows of one leave with columns of the other alone."""
    found: dict[tuple[str, str], Neurons] = {}
    present = set(followed.network.modules())
    for module, block in followed.names.items():
        if module not in present or not re.fullmatch(table.pattern, block):
            continue
        linears = _linears(module)
        for suffix in (row.suffix for row in table.layers if row.part == "feed_forward" and row.suffix in linears):
            last = linears[suffix].in_features - 1
            cut = followed.leaving(linears[suffix], [last])
            others = [key for key in cut if key != (f"{block}.{suffix}", "columns")]
            if len(others) != 1 or cut.get((f"{block}.{suffix}", "columns")) != (last,):
                continue
            (name, side), up = others[0], others[0][0].removeprefix(f"{block}.")
            if side != "rows" or up not in linears or linears[up].out_features != len(cut[name, side]) * (last + 1):
                continue
            if cut[name, side] in ((last,), (last, 2 * last + 1)):
                found[up, suffix] = Neurons(_common(up, suffix), up, suffix, gated=len(cut[name, side]) == 2)
    return tuple(found.values())


def _common(up: str, down: str) -> str:
    """`ff.net` for `ff.net.0.proj` and `ff.net.2`; the up projection's name where they share none."""
    words: list[str] = []
    for left, right in zip(up.split("."), down.split("."), strict=False):
        if left != right:
            break
        words.append(left)
    return ".".join(words) or up
