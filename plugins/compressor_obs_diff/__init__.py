"""OBS-Diff: one-shot optimal-brain-surgeon pruning with timestep-weighted Hessians (arXiv 2510.06751, ICLR 2026)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from compressor.errors import CompressorError
from compressor.plugin import (
    Elementwise,
    Granularity,
    LayerResult,
    MomentKind,
    Pruner,
    Removed,
    Structured,
    Weighting,
    check_sparsity,
)
from compressor.registry import Choice

if TYPE_CHECKING:
    from compressor.calibration import Calibration, Moments
    from compressor.calibration import Group as Inputs
    from compressor.structure import Component, Group, Target


class OBSDiff(Pruner):
    """Removes weights at the least cost to the layer's output and lets the remaining ones make up for them."""

    sparsity: float | None = Field(default=None, gt=0, lt=1, description="the share of each layer's weights to remove")
    spread: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="how far the share of zeros of a layer, or of heads or neurons of a block, may be from the one "
        "asked for, by what that does to the network's output; for objective network",
    )
    granularity: Annotated[Granularity, Choice("granularity")] = Field(
        default="unstructured", validate_default=True, description="which weights stand or fall together"
    )
    weighting: Annotated[Weighting, Choice("weighting")] = Field(
        default="log_decrease", validate_default=True, description="how much each inference step counts"
    )
    objective: Literal["layer", "network"] = Field(
        default="layer",
        description="whose outputs are to stay as they are: the layer's, or, by gradients, the network's; "
        "for solver admm, and for heads and neurons",
    )
    solver: Literal["obs", "admm"] = Field(
        default="obs", description="how single weights and N:M are chosen: by the paper's sweep, or by ADMM"
    )
    refit: bool = Field(
        default=False,
        description="fit the weights that are left, and the bias, by least squares; of single weights and N:M",
    )
    damping: float = Field(
        default=0.01, gt=0, le=1, description="added to the Hessian's diagonal, relative to its mean"
    )
    block: int = Field(default=128, ge=1, description="columns updated at a time; of single weights and N:M")
    fusion: Literal["energy", "rank_fusion"] = Field(
        default="energy",
        description="how the two streams of a joint attention agree on heads: by errors relative to each stream's "
        "energy, or by the paper's reciprocal ranks",
    )

    @model_validator(mode="after")
    def _check_effects(self) -> Any:
        check_sparsity(self.granularity, self.sparsity)
        structured = isinstance(self.granularity, Structured)
        default = {name: field.default for name, field in type(self).model_fields.items()}
        for name in ("solver", "refit", "block"):
            if structured and getattr(self, name) != default[name]:
                raise ValueError(
                    f"{name} has no effect: heads and neurons are chosen one by one and fitted anew; leave it out"
                )
        if self.spread and self.sparsity is None and not structured:
            raise ValueError("spread has no effect: this granularity decides what every layer loses; leave it out")
        if self.spread and self.objective != "network":
            raise ValueError(
                "spread needs objective network, whose gradients tell what the zeros of each layer do; add it, or "
                "leave spread out"
            )
        if self.sparsity is not None and not self.spread <= self.sparsity < 1 - self.spread:
            raise ValueError(
                f"spread should leave every layer a share from 0 to less than 1, found {self.sparsity:g} with a spread "
                f"of {self.spread:g}; at most {min(self.sparsity, 0.999 - self.sparsity):.3g} would do"
            )
        if not structured and self.fusion != default["fusion"]:
            raise ValueError("fusion has no effect: only heads are shared by two streams; leave it out")
        if self.objective == "network" and self.fusion != default["fusion"]:
            raise ValueError("fusion has no effect: errors of the network's output add up by themselves; leave it out")
        if self.objective == "network" and self.solver == "obs" and not structured:
            raise ValueError(
                "objective network needs solver admm: the sweep of obs takes every output for itself; choose solver "
                "admm, or leave objective out"
            )
        if self.solver != "obs" and self.block != default["block"]:
            raise ValueError(f"block has no effect: solver {self.solver} has no blocks; leave it out")
        return self

    @property
    def moments(self) -> MomentKind:
        """Second moments, and those of gradients where the objective is the network's output."""
        return "gradients" if self.objective == "network" else "second"

    def check(self, targets: Sequence[Target]) -> None:
        """Refuses layers whose shape does not fit the granularity."""
        if isinstance(self.granularity, Elementwise):
            for target in targets:
                self.granularity.check(target)

    def leaves_out(self, target: Target, tokens: int) -> str | None:
        """As the granularity says."""
        return self.granularity.leaves_out(target, tokens) if isinstance(self.granularity, Elementwise) else None

    def zeros(self, target: Target) -> int:
        """As many as the granularity says; none where heads and neurons leave."""
        if isinstance(self.granularity, Elementwise):
            return self.granularity.zeros(target.outputs, target.inputs, self.sparsity)
        return 0

    def bounds(self, target: Target) -> tuple[int, int]:
        """`spread` below and above the sparsity."""
        zeros = self.zeros(target)
        if not self.spread or self.sparsity is None:
            return zeros, zeros
        weights = target.outputs * target.inputs
        least = math.ceil((self.sparsity - self.spread) * weights - 1e-6)
        most = math.floor((self.sparsity + self.spread) * weights + 1e-6)
        return min(least, zeros), max(most, zeros)

    def workspace(self, groups: Sequence[Inputs]) -> int:
        """What the largest problem takes."""
        from compressor_obs_diff.groups import workspace as of_removals
        from compressor_obs_diff.layers import workspace as of_layers

        return of_layers(self, groups) if isinstance(self.granularity, Elementwise) else of_removals(groups)

    def passes(self, packages: int) -> int:
        """With a spread, all packages are calibrated on the dense network first; the first one is not done again."""
        return 2 * packages - 1 if self.spread else packages

    def holds(self, target: Target) -> bool:
        """Whether the zeros lie where the granularity wants them."""
        return not isinstance(self.granularity, Elementwise) or self.granularity.holds(target.module.weight)

    def removals(self, component: Component) -> Mapping[Group, int]:
        """As many as the granularity says."""
        if not isinstance(self.granularity, Structured):
            return {}
        removals = self.granularity.removals(component)
        if self.spread and all(len(self.choices(group, count)) == 1 for group, count in removals.items()):
            raise CompressorError(
                f"spread {self.spread:g} leaves no choice: no block has another aligned width with a share that near "
                "to the one asked for; give more, or leave spread out"
            )
        return removals

    def choices(self, group: Group, count: int) -> tuple[int, ...]:
        """Every aligned width within `spread` of the share asked for; without a spread, as many as `removals` says."""
        if self.spread and isinstance(self.granularity, Structured):
            return self.granularity.choices(group, count, self.spread)
        return (count,)

    def shares(self) -> Mapping[str, float]:
        """As given to the granularity."""
        return self.granularity.shares() if isinstance(self.granularity, Structured) else {}

    def prune(self, component: Component, calibration: Calibration | None) -> Iterator[LayerResult | Removed]:
        """Package by package: gathers moments on the network as pruned so far, then solves the package's layers."""
        from compressor.structure import consumers
        from compressor_obs_diff import batch, budget, spread
        from compressor_obs_diff.groups import prune_groups
        from compressor_obs_diff.layers import prune_package

        assert calibration is not None
        planned = self.removals(component)
        choices = {group: self.choices(group, count) for group, count in planned.items()}
        choices = {group: numbers for group, numbers in choices.items() if numbers[-1]}
        packages = calibration.packages(
            consumers(choices) or component.targets, self.moments, self.workspace, deal_out=True
        )
        removals = {group: planned[group] for group in choices}
        if isinstance(self.granularity, Elementwise):
            slow = batch.note(self.solver, self.granularity, next(component.module.parameters()).device)
            if slow is not None:
                calibration.warn(slow)
        zeros: dict[str, int] | None = None
        moments: dict[str, Moments] = {}
        if self.spread:
            curves: list[budget.Curve] = []
            parts: list[spread.Part] = []
            for package in reversed(packages):  # so that the first one need not be calibrated again
                moments.clear()
                moments = calibration.collect(package, self.moments, self.weighting)
                if choices:
                    curves += budget.curves(self, planned, choices, package, moments)
                else:
                    parts += spread.parts(self, package, moments)
            if choices:
                numbers = budget.allocate([curve for share in calibration.gather(curves) for curve in share])
                removals = {group: numbers[group.name] for group in choices}
            else:
                zeros = spread.allocate([part for share in calibration.gather(parts) for part in share])
        for package in packages:
            if not (self.spread and package is packages[0]):
                moments = calibration.collect(package, self.moments, self.weighting)
            if choices:
                yield from prune_groups(self, removals, package, moments)
            else:
                yield from prune_package(self, package, moments, zeros)
