"""Checks the tables of groups against torch-pruning's dependency graph, traced on the meta device.

Graph: Fang et al., "DepGraph: Towards Any Structural Pruning" (CVPR 2023). It finds what leaves together by following a
forward. Where it is known to read an architecture wrongly the table says so (`overrides`) and counts.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from compressor.errors import CompressorError
from compressor.structure.family import Family, Heads, Neurons
from compressor.structure.groups import Group, find_groups

Side = Literal["rows", "columns"]
Cut = dict[tuple[str, Side], tuple[int, ...]]


def cross_check(twin: nn.Module, family: Family, inputs: Mapping[str, Any]) -> tuple[str, ...]:
    """Compares the groups of the family's table with what the graph says leaves together.

    Of blocks in a row that have the same parts only the first is looked at: groups end within their block, and
    torch-pruning gives up on networks as deep as Flux.

    Args:
        twin: the network on the meta device; not changed.
        family: its table.
        inputs: of the twin's forward, such as `Family.inputs` makes.

    Returns:
        A line for each row of the table where the graph differs and the table is known to be right.

    Raises:
        CompressorError: for a group where they differ and nothing is known, showing both.
    """
    followed = follow(twin, family, inputs)
    overridden: dict[Heads | Neurons, list[str]] = {}
    for group in followed.groups:
        unit = group.count - 1
        table, found = by_table(group, unit), followed.by_graph(group, unit)
        if table == found:
            continue
        shown = f"{group.name}: with {group.kind[:-1]} {unit} the table takes {_show(table)}; the graph {_show(found)}"
        if not group.table.overrides:
            raise CompressorError(
                f"{shown}; should be the same, or the family's table should say why not (`overrides`)"
            )
        overridden.setdefault(group.table, []).append(shown)
    return tuple(
        f"{first}{f' (and {len(others)} more of its kind)' if others else ''}; the table counts: {row.overrides}"
        for row, (first, *others) in overridden.items()
    )


@dataclass(frozen=True)
class Followed:
    """A copy of a network with one block of each kind, and its dependency graph.

    Attributes:
        network: the copy.
        names: of its modules, as they were before it was shortened.
        groups: by the family's table, in the blocks that are left.
        graph: torch-pruning's.
    """

    network: nn.Module
    names: Mapping[nn.Module, str]
    groups: tuple[Group, ...]
    graph: Any

    def by_graph(self, group: Group, unit: int) -> Cut:
        """Rows and columns that leave with one unit, as the graph says."""
        root = group.consumers[0]
        return self.leaving(root.module, group.columns(root, (unit,)).tolist())

    def leaving(self, linear: nn.Linear, columns: list[int]) -> Cut:
        """What leaves together with some columns of a linear, as the graph says; nothing if it cannot.

        Nor does it say anything where so much would leave that it is no group of one block.
        """
        import torch_pruning

        found: dict[tuple[str, Side], set[int]] = {}
        cut = torch_pruning.prune_linear_in_channels
        try:
            with _bounded():
                leaving = list(self.graph.get_pruning_group(linear, cut, columns))
        except (IndexError, TypeError, _TooMuch):  # torch-pruning lost count of a split or a concatenation
            return {}
        for dependency, indices in leaving:
            module = dependency.target.module
            if isinstance(module, nn.Module) and not any(True for _ in module.parameters(recurse=False)):
                continue  # reshapes and activations have nothing to remove
            side: Side = "rows" if self.graph.is_out_channel_pruning_fn(dependency.handler) else "columns"
            name = self.names.get(module, dependency.target.name)
            found.setdefault((name, side), set()).update(int(i) for i in indices)
        return {key: tuple(sorted(indices)) for key, indices in found.items()}


_MOST = 1000
"""Steps from layer to layer at which torch-pruning is stopped: tens do for a block, and it may go on forever."""


class _TooMuch(Exception):
    """What leaves together has no end."""


@contextmanager
def _bounded() -> Iterator[None]:
    """While it lasts, torch-pruning makes no group of more than `_MOST` steps."""
    from torch_pruning.dependency import graph

    unbounded: Any = graph.Group

    class Bounded(unbounded):
        def add_dep(self, dep: Any, idxs: Any) -> None:
            if len(self) >= _MOST:
                raise _TooMuch
            super().add_dep(dep, idxs)

    graph.Group = Bounded
    try:
        yield
    finally:
        graph.Group = unbounded


def follow(twin: nn.Module, family: Family, inputs: Mapping[str, Any]) -> Followed:
    """Builds the dependency graph of a network's shortened copy."""
    copied = copy.deepcopy(twin)
    names = {module: name for name, module in copied.named_modules()}
    groups = find_groups(copied, family)
    _shorten(copied, family)
    present = set(copied.modules())
    return Followed(copied, names, tuple(group for group in groups if group.root in present), _build(copied, inputs))


def by_table(group: Group, unit: int) -> Cut:
    """Rows and columns that leave with one unit, as the family's table says."""
    cut: Cut = {}
    for producer in group.producers:
        cut[producer.name, "rows"] = tuple(sorted(group.rows(producer, (unit,)).tolist()))
    for consumer in group.consumers:
        cut[consumer.name, "columns"] = tuple(sorted(group.columns(consumer, (unit,)).tolist()))
    return cut


def _shorten(network: nn.Module, family: Family) -> None:
    """Leaves the first block of each kind in every list of blocks, in place."""
    blocks = {
        module
        for name, module in network.named_modules()
        if any(re.fullmatch(table.pattern, name) for table in family.blocks)
    }
    for owner in list(network.modules()):
        for name, row in list(owner.named_children()):
            if isinstance(row, nn.ModuleList) and len(row) and all(block in blocks for block in row):
                kinds: dict[tuple[str, ...], nn.Module] = {}
                for block in row:
                    kinds.setdefault(tuple(part for part, _ in block.named_modules()), block)
                setattr(owner, name, nn.ModuleList(kinds.values()))


def _build(twin: nn.Module, inputs: Mapping[str, Any]) -> Any:
    import torch_pruning

    # norms over one head's width are per head, and the graph would empty them
    norms = [
        parameter
        for name, parameter in twin.named_parameters()
        if name.rpartition(".")[0].rpartition(".")[2] in ("norm_q", "norm_k", "norm_added_q", "norm_added_k")
    ]
    next(twin.parameters()).requires_grad_()  # the graph is read from autograd's
    try:
        with torch.enable_grad():
            return torch_pruning.DependencyGraph().build_dependency(
                twin,
                example_inputs=dict(inputs),
                forward_fn=_forward,
                customized_pruners={},
                ignored_layers=[],
                ignored_params=norms,
                verbose=False,
            )
    except Exception as error:  # whatever it stumbles over in a network that it does not understand
        raise CompressorError(
            f"torch-pruning should find the dependencies of {type(twin).__name__}, found "
            f"{type(error).__name__}: {error}"
        ) from error


def _forward(network: nn.Module, arguments: Any) -> Any:
    return network(**arguments, return_dict=False)[0]


def _show(cut: Cut) -> str:
    return (
        ", ".join(f"{side} {_ranges(indices)} of {name}" for (name, side), indices in sorted(cut.items())) or "nothing"
    )


def _ranges(indices: tuple[int, ...]) -> str:
    """`0-3 8` for 0, 1, 2, 3, 8."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return " ".join(f"{first}-{last}" if last > first else str(first) for first, last in runs) or "none"
