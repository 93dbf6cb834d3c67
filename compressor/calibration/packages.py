"""Cuts the layers into packages that are calibrated together (OBS-Diff's Module Packages, arXiv 2510.06751)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

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
    """

    number: int
    count: int
    groups: tuple[Group, ...]
    moment_bytes: int


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
    if kind == "gradients":
        widths += [target.outputs for target in targets]
    return sum(4 * width * (2 if kind == "norms" else width + 2) for width in widths)
