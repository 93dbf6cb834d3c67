"""OBS-Diff: one-shot optimal-brain-surgeon pruning with timestep-weighted Hessians (arXiv 2510.06751, ICLR 2026)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field, model_validator

from compressor.plugin import Granularity, LayerResult, MomentKind, Pruner, Weighting, check_sparsity
from compressor.registry import Choice

if TYPE_CHECKING:
    from compressor.calibration import Calibration
    from compressor.structure import Component, Target


class OBSDiff(Pruner):
    """Removes weights at the least cost to the layer's output and lets the remaining ones make up for them."""

    moments: ClassVar[MomentKind] = "second"

    sparsity: float | None = Field(default=None, gt=0, lt=1, description="the share of each layer's weights to remove")
    granularity: Annotated[Granularity, Choice("granularity")] = Field(
        default="unstructured", validate_default=True, description="which weights stand or fall together"
    )
    weighting: Annotated[Weighting, Choice("weighting")] = Field(
        default="log_decrease", validate_default=True, description="how much each inference step counts"
    )
    damping: float = Field(
        default=0.01, gt=0, le=1, description="added to the Hessian's diagonal, relative to its mean"
    )
    block: int = Field(default=128, ge=1, description="columns updated at a time")

    @model_validator(mode="after")
    def _check_sparsity(self) -> Any:
        check_sparsity(self.granularity, self.sparsity)
        return self

    def check(self, targets: Sequence[Target]) -> None:
        """Refuses layers whose shape does not fit the granularity."""
        for target in targets:
            self.granularity.check(target)

    def zeros(self, target: Target) -> int:
        """As many as the granularity says."""
        return self.granularity.zeros(target.outputs, target.inputs, self.sparsity)

    def holds(self, target: Target) -> bool:
        """Whether the zeros lie where the granularity wants them."""
        return self.granularity.holds(target.module.weight)

    def prune(self, component: Component, calibration: Calibration | None) -> Iterator[LayerResult]:
        """Package by package: gathers moments on the network as pruned so far, then solves the package's layers."""
        from compressor_obs_diff.layers import prune_package

        assert calibration is not None
        for package in calibration.packages(component.targets, self.moments):
            moments = calibration.collect(package, self.moments, self.weighting)
            yield from prune_package(self, package, moments)
