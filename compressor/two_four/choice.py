"""Which kernel runs a layer: as measured on this GPU when it is first asked for, or as a table says."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from compressor.errors import CompressorError
from compressor.two_four import product
from compressor.two_four.product import Algorithm, Timed
from compressor.two_four.table import Table

FASTER = 1.02
"""What a 2:4 product has to gain to be taken where nothing else is said: more than timings differ by chance."""


@dataclass
class Measuring:
    """Measures every shape once, when it is first asked for.

    Attributes:
        dtype: of weights and inputs.
        device: where.
        faster: how many times as fast as dense a 2:4 product has to be.
        say: told of every shape.
        timed: what was measured, by shape and bias.
    """

    dtype: torch.dtype
    device: torch.device
    faster: float
    say: Callable[[str], None]
    timed: dict[tuple[int, int, int, bool], Timed] = field(default_factory=dict)

    def __call__(self, tokens: int, inputs: int, outputs: int, bias: bool) -> Algorithm | None:
        key = tokens, inputs, outputs, bias
        if key not in self.timed:
            self.timed[key] = product.measure(
                tokens, inputs, outputs, bias=bias, dtype=self.dtype, device=self.device, turns=9
            )
            self.say(f"{tokens} x {inputs} x {outputs}: {explain(self.timed[key])}")
        return chosen(self.timed[key], self.faster)


@dataclass(frozen=True)
class Tabled:
    """Reads a table of `compressor probe`.

    Attributes:
        table: measured on this GPU.
        file: its name, for messages.
        faster: how many times as fast as dense a 2:4 product has to be.
    """

    table: Table
    file: str
    faster: float

    def check(self, device: str, versions: dict[str, str], dtype: torch.dtype) -> None:
        """Refuses a table of another GPU, torch, cuSPARSELt or dtype, whose kernels have other numbers and times.

        Raises:
            CompressorError: saying what differs.
        """
        for what, given, here in (
            ("GPU", self.table.device, device),
            *((name, self.table.versions.get(name), versions.get(name)) for name in ("torch", "cusparselt")),
        ):
            if given != here:
                raise CompressorError(
                    f"{self.file}: should be measured with the {what} of this machine, {here}, found {given}; run "
                    "`compressor probe` here, or leave --probe out"
                )
        wanted = str(dtype).removeprefix("torch.")
        if self.table.dtype != wanted:
            raise CompressorError(
                f"{self.file}: should be measured in {wanted} as the network is, found {self.table.dtype}; run "
                f"`compressor probe --dtype {wanted}`, or leave --probe out"
            )

    def __call__(self, tokens: int, inputs: int, outputs: int, bias: bool) -> Algorithm | None:
        row = self.table.find(tokens, inputs, outputs)
        if row is None:
            raise CompressorError(
                f"{self.file}: has no row for {tokens} x {inputs} x {outputs} (tokens x inputs x outputs); measure "
                "this size and batch with `compressor probe`, or leave --probe out"
            )
        return chosen(Timed(row.dense, row.sparse, row.algorithm), self.faster)


def chosen(timed: Timed, faster: float) -> Algorithm | None:
    """The kernel, if it gains as much."""
    if not timed.sparse or timed.algorithm is None:
        return None
    gained = statistics.median(timed.dense) / statistics.median(timed.sparse)
    return timed.algorithm if gained >= faster else None


def explain(timed: Timed) -> str:
    """What was measured, in words."""
    dense = 1e6 * statistics.median(timed.dense)
    if not timed.sparse:
        return f"dense {dense:.1f} µs, no 2:4 product: {timed.note}"
    sparse = 1e6 * statistics.median(timed.sparse)
    return f"dense {dense:.1f} µs, 2:4 {sparse:.1f} µs, {dense / sparse:.2f}x"
