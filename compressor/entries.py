"""Gives every entry of a recipe's `prune` its layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import nn

from compressor.errors import CompressorError
from compressor.plugin import Pruner
from compressor.recipe import Recipe
from compressor.registry import Choice
from compressor.structure import Component, Family, Group, Target, Trace, consumers, find_targets, select
from compressor.units import several

_NO_UNITS = "adaLN, which has neither heads nor neurons"
"""Why a structured pruner leaves a layer as it is."""


@dataclass(frozen=True)
class Entry:
    """One entry of the recipe's `prune`, with the layers it is given.

    Attributes:
        where: its place in the recipe, as `prune[0]`.
        name: the plugin's name.
        pruner: the plugin.
        component: the network and the chosen layers.
        removals: how many heads or neurons will leave, by group, 0 for those of which none by rounding; empty unless
            the pruner is structured.
        choices: from which numbers calibration will choose instead, by the same groups.
        left_out: layers that the recipe chose and the pruner leaves as they are, and why.
    """

    where: str
    name: str
    pruner: Pruner
    component: Component
    removals: Mapping[Group, int] = field(default_factory=dict)
    choices: Mapping[Group, tuple[int, ...]] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)

    @property
    def layers(self) -> tuple[Target, ...]:
        """Those that may change, in order of execution: all that were chosen, or the linears of the groups."""
        if not self.removals:
            return self.component.targets
        changing = {target.name for group in self.removals for target in (*group.producers, *group.consumers)}
        every = find_targets(self.component.module, self.component.family)
        return tuple(target for target in every if target.name in changing)

    @property
    def calibrated(self) -> tuple[Target, ...]:
        """Those whose inputs the pruner asks for, if it asks for any, and for each of which it gives a result."""
        return consumers(self.shrinking) if self.removals else self.component.targets

    @property
    def shrinking(self) -> tuple[Group, ...]:
        """The groups that lose heads or neurons, or may."""
        return tuple(group for group, numbers in self.choices.items() if numbers[-1])


def enter(recipe: Recipe, name: str, module: nn.Module, family: Family, seen: Trace) -> tuple[Entry, ...]:
    """Gives every entry of the recipe's `prune` its layers.

    Args:
        recipe: checked.
        name: of the network.
        module: the network, possibly on the meta device.
        family: its table.
        seen: a forward of one sample, which says how many tokens each layer is given.

    Raises:
        CompressorError: if a pattern matches nothing, or a pruner leaves out all layers that it is given, or cannot
            prune one of the others.
    """
    linears = find_targets(module, family, adaln=True)
    entries = []
    for i, entry in enumerate(recipe.prune):
        try:
            targets = select(linears, entry.targets.include, entry.targets.exclude)
        except CompressorError as error:
            raise CompressorError(f"prune[{i}].{error}") from None
        left_out = _leave_out(f"prune[{i}]", entry.pruner, targets, seen)
        targets = tuple(target for target in targets if target.name not in left_out)
        entry.pruner.check(targets)
        component = Component(name, module, family, targets)
        try:
            removals = entry.pruner.removals(component)
        except CompressorError as error:
            raise CompressorError(f"prune[{i}]: {error}") from None
        if removals:
            whole = {target.name: _NO_UNITS for target in targets if target.layer.part == "adaln"}
            component = replace(component, targets=tuple(t for t in targets if t.name not in whole))
            left_out |= whole
        plugin = Choice("pruner").name(entry.pruner)
        choices = {group: entry.pruner.choices(group, count) for group, count in removals.items()}
        entries.append(Entry(f"prune[{i}]", plugin, entry.pruner, component, removals, choices, left_out))
    return tuple(entries)


def _leave_out(where: str, pruner: Pruner, targets: tuple[Target, ...], seen: Trace) -> dict[str, str]:
    """The layers that a pruner leaves as they are, and why."""
    try:
        reasons = {target.name: pruner.leaves_out(target, seen.tokens[target.name]) for target in targets}
    except CompressorError as error:
        raise CompressorError(f"{where}: {error}") from None
    left_out = {name: reason for name, reason in reasons.items() if reason is not None}
    if len(left_out) == len(targets):
        name, reason = next(iter(left_out.items()))
        raise CompressorError(
            f"{where}: leaves all {len(targets)} layers as they are, so that nothing is to be done; {name}: {reason}"
        )
    return left_out


def explain_left_out(entries: tuple[Entry, ...]) -> tuple[str, ...]:
    """A warning for each entry that leaves some of its layers as they are, with the reasons and how often each."""
    found = []
    for entry in entries:
        if entry.left_out:
            reasons = Counter(entry.left_out.values())
            found.append(
                f"{entry.where}: {several(len(entry.left_out), 'layer')} of "
                f"{len(entry.left_out) + len(entry.component.targets)} stay as they are: "
                + "; ".join(f"{several(count, 'layer')} of {reason}" for reason, count in reasons.items())
            )
    return tuple(found)


def check_apart(entries: tuple[Entry, ...]) -> None:
    """Refuses a layer that two entries would prune: the second would not know of the first one's zeros.

    Raises:
        CompressorError: naming the first such layer.
    """
    taken: dict[str, Entry] = {}
    for entry in entries:
        for target in entry.layers:
            other = taken.setdefault(target.name, entry)
            if other is not entry:
                raise CompressorError(
                    f"{entry.where}: {target.name} is pruned by {other.where} already; "
                    "give each its own layers by targets"
                )
