"""Wanda: weights times input norms, compared within an output row (Sun et al., ICLR 2024).

In the timestep-weighted form in which the OBS-Diff paper (arXiv 2510.06751) compares against it, every step's squared
inputs count by a weighting; `uniform`, the default here, is Wanda as published.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, model_validator

from compressor.plugin import Elementwise, LayerResult, MomentKind, Pruner, Weighting, check_sparsity
from compressor.registry import Choice

if TYPE_CHECKING:
    from compressor.calibration import Calibration, Group
    from compressor.structure import Component, Target

SORTED = 40
"""Bytes a weight that putting scores in order takes on a GPU; 37 were measured of rows of 15360, 17 of 1536."""


class Wanda(Pruner):
    """Removes the weights of least |w| times input norm from every output row; the others stay as they are."""

    sparsity: float | None = Field(
        default=None, gt=0, lt=1, description="the share of each row's weights to remove, rounded down"
    )
    granularity: Annotated[Elementwise, Choice("granularity", Elementwise)] = Field(
        default="unstructured", validate_default=True, description="which weights stand or fall together"
    )
    weighting: Annotated[Weighting, Choice("weighting")] = Field(
        default="uniform", validate_default=True, description="how much each inference step counts"
    )

    @property
    def moments(self) -> MomentKind:
        """Norms are all it needs."""
        return "norms"

    @model_validator(mode="after")
    def _check_sparsity(self) -> Any:
        check_sparsity(self.granularity, self.sparsity)
        return self

    def check(self, targets: Sequence[Target]) -> None:
        """Refuses layers whose shape does not fit the granularity."""
        for target in targets:
            self.granularity.check(target)

    def leaves_out(self, target: Target, tokens: int) -> str | None:
        """As the granularity says."""
        return self.granularity.leaves_out(target, tokens)

    def zeros(self, target: Target) -> int:
        """The same number in every row, rounded down as in the paper's code."""
        if self.sparsity is None:
            return self.granularity.zeros(target.outputs, target.inputs, None)
        return target.outputs * math.floor(target.inputs * self.sparsity + 1e-9)  # 0.29 of 100 is 29, not 28

    def holds(self, target: Target) -> bool:
        """Whether the zeros lie where the granularity wants them."""
        return self.granularity.holds(target.module.weight)

    def workspace(self, groups: Sequence[Group]) -> int:
        """The scores of the largest layer, in order."""
        weights = (target.outputs * target.inputs for group in groups for target in group.targets)
        return SORTED * max(weights, default=0)

    def prune(self, component: Component, calibration: Calibration | None) -> Iterator[LayerResult]:
        """Package by package: gathers input norms on the network as pruned so far, then masks the package's layers."""
        assert calibration is not None
        for package in calibration.packages(component.targets, self.moments, self.workspace, deal_out=True):
            moments = calibration.collect(package, self.moments, self.weighting)
            for group in package.groups:
                norm_I = moments.pop(group.name).squares_I.sqrt()
                for target in group.targets:
                    start = time.perf_counter()
                    weight_OI = target.module.weight.data
                    zeros = self.zeros(target)
                    score_OI = weight_OI.float().abs() * norm_I
                    weight_OI.masked_fill_(self.granularity.mask(score_OI, zeros, per_row=True), 0)
                    yield LayerResult(target.name, seconds=time.perf_counter() - start)
