"""How many heads and neurons leave each block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from compressor.errors import CompressorError
from compressor.plugin import Structured

if TYPE_CHECKING:
    from compressor.structure import Component, Group


class HeadsAndNeurons(Structured):
    """Whole heads of the attentions and whole neurons of the feed-forwards, in widths that a GPU likes."""

    heads: float | None = Field(default=None, gt=0, lt=1, description="the share of the attentions' heads to remove")
    neurons: float | None = Field(
        default=None, gt=0, lt=1, description="the share of the feed-forwards' hidden neurons to remove"
    )
    multiple: int = Field(default=64, ge=1, description="the number of neurons kept is a multiple of this")
    heads_multiple: int = Field(
        default=1, ge=1, description="the number of heads that an attention keeps is a multiple of this"
    )
    keep_first: int = Field(default=1, ge=0, description="how many blocks at the beginning stay whole")
    keep_last: int = Field(default=1, ge=0, description="how many blocks at the end stay whole")

    @model_validator(mode="after")
    def _check_given(self) -> Any:
        if self.heads is None and self.neurons is None:
            raise ValueError("should have a share of heads, neurons or both to remove, such as 0.3; found neither")
        if self.neurons is None and self.multiple != type(self).model_fields["multiple"].default:
            raise ValueError("multiple has no effect: it is of neurons, and none are removed; leave it out")
        if self.heads is None and self.heads_multiple != type(self).model_fields["heads_multiple"].default:
            raise ValueError("heads_multiple has no effect: no heads are removed; leave it out")
        return self

    def shares(self) -> Mapping[str, float]:
        """As given."""
        given = {"heads": self.heads, "neurons": self.neurons}
        return {kind: share for kind, share in given.items() if share is not None}

    def removals(self, component: Component) -> Mapping[Group, int]:
        """As near to the shares asked for as whole heads and aligned widths come, over all blocks that may change.

        A group may change if all its linears are among the layers chosen and its block is not kept whole.
        """
        from compressor.structure import find_groups, spread, within

        groups = find_groups(component.module, component.family)
        blocks = list(dict.fromkeys(group.block for group in groups))
        whole = {*blocks[: self.keep_first], *blocks[max(len(blocks) - self.keep_last, 0) :]}
        if blocks and whole == set(blocks):
            raise CompressorError(
                f"structured: should leave a block to remove from, found keep_first {self.keep_first} and keep_last "
                f"{self.keep_last} of {len(blocks)} blocks"
            )
        free = [group for group in within(groups, component.targets) if group.block not in whole]
        found: dict[Group, int] = {}
        for kind, ratio in self.shares().items():
            multiple = self.multiple if kind == "neurons" else self.heads_multiple
            chosen = [group for group in free if group.kind == kind]
            if not chosen:
                raise CompressorError(
                    f"structured: {kind} {ratio} finds no {kind} that may leave: should be given all the layers of an "
                    f"attention or feed-forward, in a block that is not kept whole; widen targets, or leave {kind} out"
                )
            widest = max(group.count for group in chosen)
            if multiple > widest and multiple != type(self).model_fields["multiple"].default:
                option = "multiple" if kind == "neurons" else "heads_multiple"
                raise CompressorError(
                    f"structured: {option} should be at most {widest}, the most {kind} in one group, found {multiple}"
                )
            kept = spread([group.count for group in chosen], ratio, multiple, [group.name for group in chosen])
            leaving = {group: group.count - count for group, count in zip(chosen, kept, strict=True)}
            if not any(leaving.values()):
                raise CompressorError(
                    f"structured: {kind} {ratio} comes to nothing: there are {sum(group.count for group in chosen)} in "
                    f"{len(chosen)} groups, and they leave in steps of {multiple}; ask for more, or leave {kind} out"
                )
            found |= leaving
        return {group: found[group] for group in groups if group in found}

    def choices(self, group: Group, count: int, spread: float) -> tuple[int, ...]:
        """Every number that leaves an aligned width and a share within `spread` of the one asked for."""
        asked = self.multiple if group.kind == "neurons" else self.heads_multiple
        step = asked if group.count >= asked else 1
        share = self.shares()[group.kind]
        widths = {group.count, *range(step, group.count, step)}
        near = {group.count - kept for kept in widths if abs(1 - kept / group.count - share) <= spread + 1e-9}
        return tuple(sorted({count, *near}))
