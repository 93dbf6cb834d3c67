"""L1-norm pruning: the heads and neurons of the smallest weights leave (Li et al., "Pruning Filters", ICLR 2017)."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from compressor.plugin import LayerResult, Pruner, Removed, Structured
from compressor.registry import Choice

if TYPE_CHECKING:
    from compressor.calibration import Calibration
    from compressor.structure import Component, Group, Target


class L1Norm(Pruner):
    """Removes the heads and neurons whose weights sum to the least; the others stay as they are."""

    granularity: Annotated[Structured, Choice("granularity", Structured)] = Field(
        description="how many heads and neurons leave"
    )

    def check(self, targets: Sequence[Target]) -> None:
        """Every layer will do."""

    def zeros(self, target: Target) -> int:
        """None: what goes leaves the network."""
        return 0

    def removals(self, component: Component) -> Mapping[Group, int]:
        """As many as the granularity says."""
        return self.granularity.removals(component)

    def shares(self) -> Mapping[str, float]:
        """As given to the granularity."""
        return self.granularity.shares()

    def prune(self, component: Component, calibration: Calibration | None) -> Iterator[LayerResult | Removed]:
        """Group by group, by the sum of |w| over all rows and columns that leave with a head or a neuron."""
        from compressor.sparsity import lowest
        from compressor.structure import magnitudes, zero

        removals = {group: count for group, count in self.removals(component).items() if count}
        for group, count in removals.items():
            start = time.perf_counter()
            units = tuple(lowest(magnitudes(group), count).nonzero()[:, 0].tolist())
            zero(group, units)
            yield Removed(group, units)
            seconds = (time.perf_counter() - start) / len(group.consumers)
            yield from (LayerResult(target.name, seconds=seconds) for target in group.consumers)
