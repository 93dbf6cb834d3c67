"""Spreads the heads and neurons that leave over the blocks, by what they do to the network's output.

The harm of removing n heads of an attention, or n neurons of a feed-forward, is the squared error of the network's
output, to first order: what removing them one after the other costs in the metric of the outputs, with H and G summed
over all of calibration. So harms of heads and of neurons, of all blocks and streams, may be added up and compared; and
where a group is at its bound, or one more unit would cost more for each weight that leaves than elsewhere, others give.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from compressor_obs_diff.greedy import Fusion
from compressor_obs_diff.groups import batches, rule, streams_of
from compressor_obs_diff.removal import Problem, Stream, costs_together

if TYPE_CHECKING:
    from compressor.calibration import Moments, Package
    from compressor.structure import Group
    from compressor_obs_diff import OBSDiff


@dataclass(frozen=True)
class Curve:
    """What is known of one group before it is known how many leave.

    Attributes:
        name: of the group.
        weights: how many leave with each head or neuron.
        planned: how many heads or neurons would leave without a spread; one of `choices`.
        choices: how many may leave, ascending.
        harms: of the choices.
    """

    name: str
    weights: int
    planned: int
    choices: tuple[int, ...]
    harms: tuple[float, ...]


@torch.no_grad()
def curves(
    options: OBSDiff,
    planned: Mapping[Group, int],
    choices: Mapping[Group, tuple[int, ...]],
    package: Package,
    moments: Mapping[str, Moments],
) -> list[Curve]:
    """The groups whose consumers lie in a package, and what each choice would harm.

    Heads and neurons that the same linears read are looked at apart, each as if the others stayed.

    Args:
        options: damping.
        planned: how many leave by default, by group.
        choices: how many may leave, by group.
        package: consumers, by the input they read.
        moments: by group of the package, with gradients, of the dense network. Not changed.

    Raises:
        CompressorError: if a Hessian is zero or not finite, or cannot be factorised.
    """
    inputs = {target.name: shared.name for shared in package.groups for target in shared.targets}
    here = [[group] for group in choices if group.consumers[0].name in inputs]
    most = {group: numbers[-1] for group, numbers in choices.items()}
    harms: dict[Group, list[float]] = {}
    for batch in batches(here, most, package, moments):
        harms |= _harms(options, {group: most[group] for (group,) in batch}, inputs, moments)
    return [
        Curve(
            group.name,
            group.unit_weights,
            planned[group],
            choices[group],
            tuple(harms[group][min(number, len(harms[group]) - 1)] for number in choices[group]),
        )
        for (group,) in here
    ]


def _harms(
    options: OBSDiff, most: Mapping[Group, int], inputs: Mapping[str, str], moments: Mapping[str, Moments]
) -> dict[Group, list[float]]:
    """What it harms if none leave, if one does, and so on; nothing else is kept of what was solved together."""
    alike: dict[Fusion, list[tuple[Group, list[Stream]]]] = {}
    for group in most:
        streams = streams_of(options, group.consumers, inputs, moments)
        alike.setdefault(rule(options, streams), []).append((group, streams))
    harms: dict[Group, list[float]] = {}
    for fusion, members in alike.items():
        costs = [torch.zeros(0, 1, dtype=torch.float64)] * len(members)
        if fusion == "sum":  # else the network's output does not depend on it
            group = members[0][0]
            columns_GD = group.columns(group.consumers[0], range(group.count)).view(group.count, group.width)
            problems = [Problem(streams, most[group]) for group, streams in members]
            costs = costs_together(problems, columns_GD, options.damping, "sum")
        for (group, _), costs_RS in zip(members, costs, strict=True):
            harms[group] = torch.cat([torch.zeros(1, dtype=torch.float64), costs_RS.sum(1).cumsum(0)]).tolist()
    return harms


def allocate(found: Sequence[Curve]) -> dict[str, int]:
    """How many heads or neurons leave each group, so that they harm the least for the weights that leave with them.

    Each group begins with its fewest. Then, again and again, that step of a group is taken, to any of its further
    numbers, which costs the least for each weight that leaves with it, among the steps that are not too large for what
    is still to leave. A last step may be too large, if it brings the sum nearer.

    Returns:
        Numbers by name. Of the weights that were planned to leave, at most half of the smallest step that is left,
        of any group, is not met.
    """
    place = [0] * len(found)
    missing = sum(curve.weights * (curve.planned - curve.choices[0]) for curve in found)
    steps = [step for i in range(len(found)) if (step := _cheapest(found[i], i, 0, missing))]
    heapq.heapify(steps)
    while steps:
        _, i, to = heapq.heappop(steps)
        size = _size(found[i], place[i], to)
        if size <= missing:
            missing -= size
            place[i] = to
        if step := _cheapest(found[i], i, place[i], missing):
            heapq.heappush(steps, step)
    last = [
        (_size(curve, place[i], place[i] + 1), i) for i, curve in enumerate(found) if place[i] + 1 < len(curve.choices)
    ]
    if last and min(last)[0] < 2 * missing:
        place[min(last)[1]] += 1
    return {curve.name: curve.choices[at] for curve, at in zip(found, place, strict=True)}


def _size(curve: Curve, at: int, to: int) -> int:
    return curve.weights * (curve.choices[to] - curve.choices[at])


def _cheapest(curve: Curve, index: int, at: int, most: int) -> tuple[float, int, int] | None:
    """The step from one choice to a further one that costs the least for each weight, of those not too large."""
    fitting = [to for to in range(at + 1, len(curve.choices)) if _size(curve, at, to) <= most]
    if not fitting:
        return None
    return min(((curve.harms[to] - curve.harms[at]) / _size(curve, at, to), index, to) for to in fitting)
