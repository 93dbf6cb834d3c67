"""Cuts the layers into packages that are calibrated together (OBS-Diff's Module Packages, arXiv 2510.06751)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise

from compressor.calibration.curvature import blocks_of
from compressor.errors import CompressorError
from compressor.plugin import MomentKind
from compressor.structure import Target, Trace

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
        every: where several processes share the layers, the groups of all of them; `groups` are this one's.
        owners: the rank that prunes each of these.
    """

    number: int
    count: int
    groups: tuple[Group, ...]
    moment_bytes: int
    every: tuple[Group, ...] = ()
    owners: tuple[int, ...] = ()


def cut(
    targets: Iterable[Target], trace: Trace, kind: MomentKind, packages: int | None, memory: int | None
) -> tuple[Package, ...]:
    """Cuts the layers, in units that run side by side, into contiguous packages.

    Args:
        targets: in order of execution.
        trace: tells which targets share an input.
        kind: which moments are to be gathered.
        packages: how many packages of as equal a number of units as can be; if this and memory are None, 4, or one a
            unit where there are fewer.
        memory: instead: the most bytes that a package's moments may take.

    Raises:
        CompressorError: if there are fewer units than packages, or one unit alone exceeds the memory.
    """
    units: dict[tuple[str, int], list[Target]] = {}
    for target in targets:
        units.setdefault(target.unit, []).append(target)
    parts = list(units.values())
    if memory is None:
        packages = min(PACKAGES, len(parts)) if packages is None else packages
        if packages > len(parts):
            raise CompressorError(
                f"calibration.packages: should be at most {len(parts)}, the number of units of layers that run side "
                f"by side, found {packages}"
            )
        bounds = [round(i * len(parts) / packages) for i in range(packages + 1)]
        runs = [[target for part in parts[a:b] for target in part] for a, b in pairwise(bounds)]
    else:
        runs = _cut_by_memory(parts, trace, kind, memory)
    return tuple(
        Package(i, len(runs), _group(run, trace), _bytes(run, trace, kind)) for i, run in enumerate(runs, start=1)
    )


def _cut_by_memory(parts: list[list[Target]], trace: Trace, kind: MomentKind, memory: int) -> list[list[Target]]:
    runs: list[list[Target]] = [[]]
    for part in parts:
        alone = _bytes(part, trace, kind)
        if alone > memory:
            raise CompressorError(
                f"calibration.memory: should be at least {alone:,} bytes, which the moments of {part[0].name} and "
                f"the layers beside it need, found {memory:,}"
            )
        if runs[-1] and _bytes(runs[-1] + part, trace, kind) > memory:
            runs.append([])
        runs[-1] = runs[-1] + part
    return runs


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
