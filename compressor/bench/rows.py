"""What was measured of one shrunk network: how it was shrunk, and its times against the dense network's."""

from __future__ import annotations

from dataclasses import dataclass

from compressor.bench.timing import Times


@dataclass(frozen=True)
class Plan:
    """What is kept for one multiple, and what that leaves to compute.

    Attributes:
        multiple: of widths.
        kept: heads or neurons that each group keeps, by the group's name.
        of: how many the dense network has.
        parameters: of the shrunk network.
        dense_parameters: of the dense one.
        operations: multiply-adds of one sample.
        dense_operations: of the dense network.
    """

    multiple: int
    kept: dict[str, int]
    of: dict[str, int]
    parameters: int
    dense_parameters: int
    operations: int
    dense_operations: int


@dataclass(frozen=True)
class Row:
    """One shrunk network against the dense one, timed in turns.

    Attributes:
        model: name of the known model.
        forward: `eager`, `compiled` or `onnxruntime`.
        plan: how it was shrunk.
        shrunk: its times.
        dense: the dense network's, in the same turns.
        preparing: seconds for compiling or exporting the shrunk network and its first forward.
    """

    model: str
    forward: str
    plan: Plan
    shrunk: Times
    dense: Times
    preparing: float

    @property
    def ratio(self) -> float:
        """How many times as fast as the dense network."""
        return self.dense.median / self.shrunk.median
