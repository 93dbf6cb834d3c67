"""Prints a plan, as a table for people or as JSON for programs."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import asdict, fields

from compressor.plan import Plan, PlannedLayer, PlannedPruning
from compressor.units import count, percent, several, size


def as_json(plan: Plan) -> str:
    """Everything in the plan; a package is given by its layers and bytes."""
    data = {field.name: getattr(plan, field.name) for field in fields(plan)}
    data["entries"] = [
        {
            "pruner": entry.pruner,
            "layers": [asdict(layer) for layer in entry.layers],
            "packages": [
                {"layers": [t.name for g in package.groups for t in g.targets], "moment_bytes": package.moment_bytes}
                for package in entry.packages
            ],
            "forwards": entry.forwards,
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
    after = plan.parameters - plan.zeros
    lines = [
        f"model         {plan.source}",
        f"network       {plan.network}, family {plan.family}, {plan.linears} linears that can be pruned",
        f"size          {plan.width} x {plan.height} pixels",
        f"parameters    {count(plan.parameters)}, of which non-zero after: {count(after)} "
        f"({percent(after / plan.parameters)})",
        f"operations    {count(plan.macs)} multiply-adds a forward, of which by non-zero weights after: "
        f"{count(plan.nonzero_macs)} ({percent(plan.nonzero_macs / plan.macs)})",
    ]
    for entry in plan.entries:
        lines += ["", *_entry(entry, plan, layers)]
    lines += ["", *(f"warning: {warning}" for warning in plan.warnings)] if plan.warnings else []
    return "\n".join(lines) + "\n"


def _entry(entry: PlannedPruning, plan: Plan, layers: bool) -> list[str]:
    weights = sum(layer.weights for layer in entry.layers)
    zeros = sum(layer.zeros for layer in entry.layers)
    lines = [
        f"{entry.pruner}: {several(len(entry.layers), 'layer')}, {count(weights)} weights, "
        f"{count(zeros)} to become zero ({percent(zeros / weights)})",
    ]
    if entry.packages:
        most = max(package.moment_bytes for package in entry.packages)
        lines.append(
            f"  calibration: {several(plan.prompts, 'prompt')}, {several(len(entry.packages), 'package')} of at most "
            f"{size(most)} of moments, {several(entry.forwards, 'forward')}"
        )
    if layers:
        width = max(len(layer.name) for layer in entry.layers)
        lines += [
            f"  {x.name:<{width}}  {count(x.weights):>8}  {percent(x.zeros / x.weights):>6}" for x in entry.layers
        ]
        return lines
    kinds: dict[tuple[str, str, str], list[PlannedLayer]] = defaultdict(list)
    for layer in entry.layers:
        kinds[layer.part, layer.stream, layer.role].append(layer)
    for kind, members in kinds.items():
        total = sum(x.weights for x in members)
        share = sum(x.zeros for x in members) / total
        lines.append(f"  {' '.join(kind):<30} {len(members):>4} layers  {count(total):>9}  {percent(share):>6}")
    return lines
