"""Prints a plan, as a table for people or as JSON for programs."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from dataclasses import asdict, fields

from compressor.plan import Plan, PlannedGroup, PlannedLayer, PlannedPruning
from compressor.units import count, percent, several, size


def as_json(plan: Plan) -> str:
    """Everything in the plan; a package is given by its layers and bytes."""
    data = {field.name: getattr(plan, field.name) for field in fields(plan)}
    data["parts"] = [asdict(part) for part in plan.parts]
    data["entries"] = [
        {
            "pruner": entry.pruner,
            "layers": [asdict(layer) for layer in entry.layers],
            "groups": [asdict(group) for group in entry.groups],
            "shares": entry.shares,
            "whole": entry.whole,
            "packages": [
                {
                    "layers": [t.name for g in package.groups for t in g.targets],
                    "moment_bytes": package.moment_bytes,
                    "workspace": package.workspace,
                }
                for package in entry.packages
            ],
            "forwards": entry.forwards,
            "left_out": entry.left_out,
        }
        for entry in plan.entries
    ]
    return json.dumps(data, indent=2) + "\n"


def as_text(plan: Plan, *, layers: bool) -> str:
    """The plan for people.

    Args:
        plan: what to print.
        layers: every layer, instead of a line for each role.
    """
    lines = [
        f"model         {plan.source}",
        f"network       {plan.network}, family {plan.family}, {plan.linears} linears that can be pruned",
        f"size          {plan.width} x {plan.height} pixels",
        f"parameters    {_after(plan.parameters, plan.parameters_after, plan.parameters_after - plan.zeros)}",
        *([_parts(plan)] if plan.entries else []),
        f"operations    {_after(plan.macs, plan.macs_after, plan.nonzero_macs)}; multiply-adds a forward",
    ]
    for entry in plan.entries:
        lines += ["", *_entry(entry, plan, layers)]
    lines += ["", *(f"dependency graph: {line}" for line in plan.overrides)] if plan.overrides else []
    lines += ["", *(f"warning: {warning}" for warning in plan.warnings)] if plan.warnings else []
    return "\n".join(lines) + "\n"


def _parts(plan: Plan) -> str:
    """Which share of the whole network leaves or becomes zero, and of which part of it."""
    removed = plan.parameters_after < plan.parameters
    word = "gone or zero" if removed and plan.zeros else "gone" if removed else "zero"
    gone = sum(part.gone for part in plan.parts) / plan.parameters
    each = (f"{part.name} {percent(part.gone / part.parameters)} of {count(part.parameters)}" for part in plan.parts)
    return f"{word:<13} {percent(gone)} of the network: {', '.join(each)}"


def _after(before: int, after: int, nonzero: int) -> str:
    parts = [count(before)]
    if after < before:
        parts.append(f"after: {count(after)} ({percent(after / before)})")
    if nonzero < after or after == before:
        parts.append(f"of which non-zero after: {count(nonzero)} ({percent(nonzero / before)})")
    return ", ".join(parts)


def _entry(entry: PlannedPruning, plan: Plan, layers: bool) -> list[str]:
    weights = sum(layer.weights for layer in entry.layers)
    gone = sum(layer.gone for layer in entry.layers)
    fate = "leave" if entry.groups else "become zero"
    lines = [
        f"{entry.pruner}: {several(len(entry.layers), 'layer')}, {count(weights)} weights, "
        f"{count(gone)} to {fate} ({percent(gone / weights)})",
        *(_share(kind, share, entry.groups) for kind, share in entry.shares.items()),
    ]
    if any(layer.least < layer.most for layer in entry.layers):
        least = min(layer.least / layer.weights for layer in entry.layers)
        most = max(layer.most / layer.weights for layer in entry.layers)
        lines.append(
            f"  spread by calibration: from {percent(least)} to {percent(most)} of a layer; below as if all had the "
            "same"
        )
    if any(group.least < group.most for group in entry.groups):
        lines.append(
            f"  spread by calibration over all blocks, for as many weights: {_spread(entry.groups)}; here as if every "
            "block had the same share"
        )
    if entry.whole:
        lines.append(f"  kept whole: {', '.join(entry.whole)}")
    if entry.packages:
        moments = max(package.moment_bytes for package in entry.packages)
        beside = max(package.workspace for package in entry.packages)
        pruning = f" and at least {size(beside)} to prune them" if beside else ""
        lines.append(
            f"  calibration: {several(plan.prompts, 'prompt')}, {several(len(entry.packages), 'package')} of at most "
            f"{size(moments)} of moments{pruning}, {several(entry.forwards, 'forward')}"
        )
    if layers:
        width = max(len(name) for name in (*(layer.name for layer in entry.layers), *entry.left_out))
        lines += [f"  {x.name:<{width}}  {count(x.weights):>8}  {percent(x.gone / x.weights):>6}" for x in entry.layers]
        lines += [f"  {name:<{width}}  stays as it is; {reason}" for name, reason in entry.left_out.items()]
        return lines
    kinds: dict[tuple[str, str, str], list[PlannedLayer]] = defaultdict(list)
    for layer in entry.layers:
        kinds[layer.part, layer.stream, layer.role].append(layer)
    for kind, members in kinds.items():
        total = sum(x.weights for x in members)
        share = sum(x.gone for x in members) / total
        lines.append(f"  {' '.join(kind):<30} {len(members):>4} layers  {count(total):>9}  {percent(share):>6}")
    return lines


def _spread(groups: tuple[PlannedGroup, ...]) -> str:
    """The fewest and the most heads and neurons that stay in a block."""
    kinds: dict[tuple[str, int, int, int], int] = defaultdict(int)
    for group in groups:
        kinds[group.kind, group.least, group.most, group.before] += 1
    return ", ".join(
        f"from {least} to {most} of {before} {kind} stay ({several(times, 'time')})"
        for (kind, least, most, before), times in kinds.items()
    )


def _share(kind: str, asked: float, groups: tuple[PlannedGroup, ...]) -> str:
    """What was asked for and what whole heads and aligned widths come to."""
    own = [group for group in groups if group.kind == kind]
    before, after = sum(group.before for group in own), sum(group.after for group in own)
    kept: dict[str, int] = defaultdict(int)
    for group in own:
        kept[f"{group.after} of {group.before}"] += 1
    multiple = math.gcd(*(group.after * group.width for group in own))
    return (
        f"  {kind}: asked {percent(asked)}, reached {percent(1 - after / before)}; stay "
        + ", ".join(f"{counts} ({several(times, 'time')})" for counts, times in kept.items())
        + f"; widths are multiples of {multiple}"
    )
