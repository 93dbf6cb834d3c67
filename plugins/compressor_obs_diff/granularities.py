"""Which weights stand or fall together: single weights, or N of every M inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, model_validator

from compressor.errors import CompressorError
from compressor.options import InputFile
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

    keep: int = Field(default=2, ge=1, description="N, the weights that stay in every group")
    of: int = Field(default=4, ge=2, description="M, the inputs in a group")
    only_where_faster: float | None = Field(
        default=None, ge=1, description="leave layers dense that 2:4 makes less than so many times as fast"
    )
    probe: InputFile = Field(
        default="probe.json", description="the table of `compressor probe` that says so, beside the recipe"
    )
    batch: int | None = Field(
        default=None,
        ge=1,
        description="samples of the network's forward to look up; may be left out where the table has one number",
    )

    @model_validator(mode="after")
    def _check_order(self) -> Any:
        if len({"keep", "of"} & self.model_fields_set) == 1:
            raise ValueError("keep and of should be given together, or neither for 2 of 4; found one of them")
        if self.keep >= self.of:
            raise ValueError(f"keep should be less than of, found keep {self.keep} of {self.of}")
        if self.only_where_faster is not None and (self.keep, self.of) != (2, 4):
            raise ValueError(
                f"only_where_faster needs keep 2 of 4, the only pattern that GPUs are faster with, found keep "
                f"{self.keep} of {self.of}"
            )
        for name in ("probe", "batch"):
            if self.only_where_faster is None and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} has no effect without only_where_faster; leave it out")
        return self

    def check(self, target: Target) -> None:
        """Refuses a layer whose inputs are no multiple of M."""
        if target.inputs % self.of:
            raise CompressorError(
                f"{target.name}: keep {self.keep} of {self.of} needs a multiple of {self.of} inputs, found "
                f"{target.inputs}; choose another M, or leave the layer out with targets.exclude"
            )

    def leaves_out(self, target: Target, tokens: int) -> str | None:
        """A layer whose shape gains less than `only_where_faster` in the table."""
        from compressor.two_four import product, table

        if self.only_where_faster is None:
            return None
        found = table.read(self.probe)
        if self.batch is None and len(found.batches) != 1:
            known = ", ".join(map(str, found.batches)) or "none"
            raise CompressorError(f"n_m.batch: should say which batch of {self.probe} counts, one of {known}")
        batch = self.batch or found.batches[0]
        row = found.find(batch * tokens, target.inputs, target.outputs)
        if row is None and target.layer.part == "adaln":  # a token a sample: a probe of a model has no such row
            why = product.unfit(batch * tokens, target.inputs, target.outputs)
            if why:
                return f"{batch * tokens} x {target.inputs} x {target.outputs}: no 2:4 product: {why}"
        if row is None:
            raise CompressorError(
                f"{target.name}: {self.probe} has no row for {batch * tokens} x {target.inputs} x {target.outputs} "
                f"(tokens x inputs x outputs); `compressor probe RECIPE --batch {batch} --output {self.probe}` "
                "measures it on a GPU"
            )
        if row.ratio is None:
            return f"{row.shape}: no 2:4 product: {row.note}"
        if row.ratio < self.only_where_faster:
            return f"{row.shape}: 2:4 is {row.ratio:.2f}x as fast, should be {self.only_where_faster:g}x"
        return None

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
