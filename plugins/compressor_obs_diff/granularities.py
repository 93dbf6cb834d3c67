"""Which weights stand or fall together: single weights, or N of every M inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, model_validator

from compressor.errors import CompressorError
from compressor.plugin import Elementwise

if TYPE_CHECKING:
    from torch import Tensor

    from compressor.structure import Target


class Unstructured(Elementwise):
    """Single weights, wherever they are; `sparsity` says how many."""

    needs_sparsity: ClassVar[bool] = True

    def check(self, target: Target) -> None:
        """Fits every layer."""

    def columns(self, block: int) -> int:
        """A whole block at a time."""
        return block

    def zeros(self, outputs: int, inputs: int, sparsity: float | None) -> int:
        """The whole number nearest to `sparsity * outputs * inputs`."""
        from compressor.sparsity import count

        assert sparsity is not None
        return count(sparsity, outputs * inputs)

    def mask(self, score_OI: Tensor, zeros: int, *, per_row: bool = False) -> Tensor:
        """The lowest scores of all, or of every row."""
        from compressor.sparsity import lowest, lowest_per_row

        if not per_row:
            return lowest(score_OI, zeros)
        assert zeros % score_OI.shape[0] == 0
        return lowest_per_row(score_OI, zeros // score_OI.shape[0])


class NM(Elementwise):
    """Keeps N of every M consecutive inputs of an output: 2 of 4 is what sparse tensor cores take."""

    needs_sparsity: ClassVar[bool] = False

    keep: int = Field(ge=1, description="N, the weights that stay in every group")
    of: int = Field(ge=2, description="M, the inputs in a group")

    @model_validator(mode="after")
    def _check_order(self) -> Any:
        if self.keep >= self.of:
            raise ValueError(f"keep should be less than of, found keep {self.keep} of {self.of}")
        return self

    def check(self, target: Target) -> None:
        """Refuses a layer whose inputs are no multiple of M."""
        if target.inputs % self.of:
            raise CompressorError(
                f"{target.name}: keep {self.keep} of {self.of} needs a multiple of {self.of} inputs, found "
                f"{target.inputs}; choose another M, or leave the layer out with targets.exclude"
            )

    def columns(self, block: int) -> int:
        """One group at a time."""
        return self.of

    def zeros(self, outputs: int, inputs: int, sparsity: float | None) -> int:
        """M - N in every group."""
        return outputs * (inputs // self.of) * (self.of - self.keep)

    def holds(self, weight_OI: Tensor) -> bool:
        """Whether every group has at most N non-zeros."""
        from compressor.sparsity import holds

        return holds(weight_OI, self.keep, self.of)

    def mask(self, score_OI: Tensor, zeros: int, *, per_row: bool = False) -> Tensor:
        """The M - N lowest scores of every group."""
        from compressor.sparsity import lowest_of_groups

        assert zeros == self.zeros(score_OI.shape[0], score_OI.shape[1], None)
        return lowest_of_groups(score_OI, self.keep, self.of)
