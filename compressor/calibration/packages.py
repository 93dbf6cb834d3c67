"""Cuts the layers into packages that are calibrated together (OBS-Diff's Module Packages, arXiv 2510.06751)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from typing import TYPE_CHECKING

from compressor.calibration.curvature import blocks_of
from compressor.errors import CompressorError
from compressor.plugin import MomentKind
from compressor.structure import Target, Trace

if TYPE_CHECKING:
    from compressor.calibration.moments import Moments

PACKAGES = 4
"""Into how many packages the layers are cut where the recipe says nothing, as in the paper."""


@dataclass(frozen=True)
class Group:
    """Layers of a package that read the same input, and so share one set of moments.

    Attributes:
        name: the first of them.
        targets: in order of execution.
    """

    name: str
    targets: tuple[Target, ...]

    @property
    def inputs(self) -> int:
        """The width of the shared input."""
        return self.targets[0].inputs


@dataclass(frozen=True)
class Package:
    """Layers that are calibrated in one pass and then pruned.

    Attributes:
        number: from 1.
        count: of how many packages.
        groups: in order of execution.
        moment_bytes: what the moments of all groups take together.
        memory: the most bytes that these and what prunes the layers may take together; None if the recipe does not say.
        workspace: what pruning takes beside them, at the least.
        every: where several processes share the layers, the groups of all of them; `groups` are this one's.
        owners: the rank that prunes each of these.
    """

    number: int
    count: int
    groups: tuple[Group, ...]
    moment_bytes: int
    memory: int | None = None
    workspace: int = 0
    every: tuple[Group, ...] = ()
    owners: tuple[int, ...] = ()

    def room(self, moments: Mapping[str, Moments]) -> int | None:
        """The bytes that are left for pruning layers beside the moments that are still held; None for no bound."""
        return None if self.memory is None else self.memory - sum(found.bytes for found in moments.values())


Workspace = Callable[[Sequence[Group]], int]
"""`Pruner.workspace`."""


def cut(
    targets: Iterable[Target],
    trace: Trace,
    kind: MomentKind,
    packages: int | None,
    memory: int | None,
    workspace: Workspace,
) -> tuple[Package, ...]:
    """Cuts the layers, in units that run side by side, into contiguous packages.

    Args:
        targets: in order of execution.
        trace: tells which targets share an input.
        kind: which moments are to be gathered.
        packages: how many packages of as equal a number of units as can be; if this and memory are None, 4, or one a
            unit where there are fewer.
        memory: instead: the most bytes that a package's moments may take, together with what prunes its layers.
        workspace: what that is, of the pruner.

    Raises:
        CompressorError: if there are fewer units than packages, or one unit alone exceeds the memory.
    """
    found: dict[tuple[str, int], list[Target]] = {}
    for target in targets:
        found.setdefault(target.unit, []).append(target)
    units = list(found.values())
    if not units:
        return ()
    if memory is None:
        packages = min(PACKAGES, len(units)) if packages is None else packages
        if packages > len(units):
            raise CompressorError(
                f"calibration.packages: should be at most {len(units)}, the number of units of layers that run side "
                f"by side, found {packages}"
            )
        bounds = [round(i * len(units) / packages) for i in range(packages + 1)]
        runs = [_package(units[start:stop], trace, kind, memory, workspace) for start, stop in pairwise(bounds)]
    else:
        runs = _fill(units, trace, kind, memory, workspace)
    return tuple(replace(run, number=i, count=len(runs)) for i, run in enumerate(runs, start=1))


def _fill(
    units: list[list[Target]], trace: Trace, kind: MomentKind, memory: int, workspace: Workspace
) -> list[Package]:
    """Packages that hold as many units as fit, not numbered yet."""
    alone = [_package([unit], trace, kind, memory, workspace) for unit in units]
    largest = max(alone, key=_needs)
    if _needs(largest) > memory:
        pruning = f" and {largest.workspace:,} to be pruned" if largest.workspace else ""
        raise CompressorError(
            f"calibration.memory: should be at least {_needs(largest):,} bytes: {largest.groups[0].name} and the "
            f"layers beside it need {largest.moment_bytes:,} for their moments{pruning}; found {memory:,}"
        )
    runs: list[Package] = []
    start = 0
    for stop, unit in enumerate(alone, start=1):
        longer = _package(units[start:stop], trace, kind, memory, workspace)
        if runs and _needs(longer) <= memory:
            runs[-1] = longer
        else:
            runs.append(unit)
            start = stop - 1
    return runs


def _package(
    units: list[list[Target]], trace: Trace, kind: MomentKind, memory: int | None, workspace: Workspace
) -> Package:
    targets = list(chain(*units))
    groups = _group(targets, trace)
    return Package(1, 1, groups, _bytes(targets, trace, kind), memory, workspace(groups))


def _needs(package: Package) -> int:
    return package.moment_bytes + package.workspace


def _group(targets: list[Target], trace: Trace) -> tuple[Group, ...]:
    found: dict[str, list[Target]] = {}
    for target in targets:
        found.setdefault(trace.shared[target.name], []).append(target)
    return tuple(Group(members[0].name, tuple(members)) for members in found.values())


def _bytes(targets: list[Target], trace: Trace, kind: MomentKind) -> int:
    widths = [*{trace.shared[target.name]: target.inputs for target in targets}.values()]
    found = sum(4 * width * (2 if kind == "norms" else width + 2) for width in widths)
    if kind == "gradients":
        found += sum(4 * target.outputs * blocks_of(target.outputs)[1] for target in targets)
    return found


def deal(package: Package, rank: int, count: int) -> Package:
    """Shares a package's layers out among processes: the costliest first, each to whoever has least to do so far.

    Layers that run side by side (a unit) stay together, and so do layers that read the same input.

    Args:
        package: whole.
        rank: of this process.
        count: of processes.
    """
    sets: list[tuple[set[tuple[str, int]], list[int]]] = []
    for i, group in enumerate(package.groups):
        units = {target.unit for target in group.targets}
        members = [i]
        for found in [found for found in sets if found[0] & units]:
            units, members = units | found[0], found[1] + members
            sets.remove(found)
        sets.append((units, members))
    loads, owners = [0] * count, [0] * len(package.groups)
    costs = {tuple(members): sum(_cost(package.groups[i]) for i in members) for _, members in sets}
    for members, cost in sorted(costs.items(), key=lambda item: (-item[1], item[0])):
        owner = loads.index(min(loads))
        loads[owner] += cost
        for i in members:
            owners[i] = owner
    mine = tuple(group for group, owner in zip(package.groups, owners, strict=True) if owner == rank)
    return replace(package, groups=mine, every=package.groups, owners=tuple(owners))


def _cost(group: Group) -> int:
    """Of solving a group, in multiply-adds as they grow: one factorisation, and a sweep for each layer."""
    return group.inputs**3 + sum(target.outputs * target.inputs**2 for target in group.targets)
