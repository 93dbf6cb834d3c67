"""Magnitude pruning: the smallest weights go, the others stay as they are (Han et al., NeurIPS 2015)."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, model_validator

from compressor.plugin import Elementwise, LayerResult, Pruner, check_sparsity
from compressor.registry import Choice

if TYPE_CHECKING:
    from compressor.calibration import Calibration
    from compressor.structure import Component, Target


class Magnitude(Pruner):
    """Removes the smallest weights of every layer; needs no calibration and no time."""

    sparsity: float | None = Field(default=None, gt=0, lt=1, description="the share of each layer's weights to remove")
    granularity: Annotated[Elementwise, Choice("granularity", Elementwise)] = Field(
        default="unstructured", validate_default=True, description="which weights stand or fall together"
    )

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
        """As many as the granularity says."""
        return self.granularity.zeros(target.outputs, target.inputs, self.sparsity)

    def holds(self, target: Target) -> bool:
        """Whether the zeros lie where the granularity wants them."""
        return self.granularity.holds(target.module.weight)

    def prune(self, component: Component, calibration: Calibration | None) -> Iterator[LayerResult]:
        """Layer by layer, by the absolute value of the weights."""
        for target in component.targets:
            start = time.perf_counter()
            weight_OI = target.module.weight.data
            zeros = self.zeros(target)
            weight_OI.masked_fill_(self.granularity.mask(weight_OI.float().abs(), zeros), 0)
            yield LayerResult(target.name, seconds=time.perf_counter() - start)
