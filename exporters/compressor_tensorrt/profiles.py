"""For which sizes an engine is built: what the recipe says, and what becomes of it for each input."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field, GetJsonSchemaHandler, model_validator
from pydantic_core import core_schema

from compressor.options import Options

if TYPE_CHECKING:
    from compressor.onnx_files.pieces import Piece, Shape
    from compressor.pipeline import Folder

Shapes = dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]
"""The smallest, the usual and the largest shape of each input."""

GUIDED = 2
"""Samples of the network for one picture with guidance: the prompt and the empty one."""


class Range(Options):
    """The sizes that an engine takes; it is fastest at `opt`. A bare number stands for all three."""

    min: int = Field(ge=1, description="the smallest")
    opt: int = Field(ge=1, description="the one that kernels are chosen for")
    max: int = Field(ge=1, description="the largest")

    @model_validator(mode="before")
    @classmethod
    def _read_short_form(cls, value: Any) -> Any:
        if isinstance(value, int) and not isinstance(value, bool):
            return {"min": value, "opt": value, "max": value}
        return value

    @model_validator(mode="after")
    def _check_order(self) -> Range:
        if not self.min <= self.opt <= self.max:
            raise ValueError(f"opt should be within min..max, found {self.opt} and {self.min}..{self.max}")
        return self

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler) -> dict:
        """A mapping, or a number; what is said of properties concerns mappings alone."""
        return {**handler.resolve_ref_schema(handler(schema)), "type": ["integer", "object"], "minimum": 1}

    @property
    def three(self) -> tuple[int, int, int]:
        """Smallest, usual, largest."""
        return self.min, self.opt, self.max

    def __str__(self) -> str:
        return str(self.opt) if self.min == self.max else f"{self.min}..{self.opt}..{self.max}"


class Profile(Options):
    """One optimization profile. Without options: one picture of the model's own size, with or without guidance."""

    batch: Range = Field(
        default=Range(min=1, opt=GUIDED, max=GUIDED),
        description="samples of the network; a picture with guidance takes two",
    )
    height: Range | None = Field(default=None, description="pixels; the model's own if not given")
    width: Range | None = Field(default=None, description="pixels; the model's own if not given")
    sequence: Range | None = Field(
        default=None, description="text tokens that the network is given; as many as the pipeline makes if not given"
    )

    def complete(self, folder: Folder) -> Profile:
        """The same with what was not given filled in from the model."""
        return Profile(
            batch=self.batch,
            height=self.height or _only(folder.default_size),
            width=self.width or _only(folder.default_size),
            sequence=self.sequence or _only(folder.text_tokens()),
        )

    def describe(self, piece: Piece, folder: Folder) -> dict[str, str]:
        """The ranges of the sizes that matter to a piece, for people: `1..2..4`; height and width in pixels."""
        ranges = self._of(piece, folder)
        return {name: str(ranges[name]) for name in piece.sizes}

    def usual(self, piece: Piece, folder: Folder) -> Shape:
        """The sizes of a piece's inputs that kernels are chosen for, in latents."""
        return self._three(piece, folder)[1]

    def shapes(self, piece: Piece, folder: Folder) -> Shapes:
        """The three shapes of each of a piece's inputs.

        Args:
            piece: makes inputs to measure.
            folder: says how many pixels a latent has; this profile must be complete.
        """
        import torch

        from compressor.onnx_files import graph

        found: list[dict[str, tuple[int, ...]]] = []
        for shape in self._three(piece, folder):
            inputs = graph.example(piece, piece.module, shape, torch.float32, seed=0)
            found.append({path[-1]: tuple(tensor.shape) for path, tensor in inputs.items()})
        smallest, usual, largest = found
        return {name: (smallest[name], usual[name], largest[name]) for name in usual}

    def _three(self, piece: Piece, folder: Folder) -> tuple[Shape, Shape, Shape]:
        from compressor.onnx_files.pieces import Shape

        batch, height, width, sequence = self._of(piece, folder).values()
        factor = folder.vae_factor
        smallest, usual, largest = (
            Shape(b, h // factor, w // factor, s)
            for b, h, w, s in zip(batch.three, height.three, width.three, sequence.three, strict=True)
        )
        return smallest, usual, largest

    def _of(self, piece: Piece, folder: Folder) -> dict[str, Range]:
        """The ranges for one piece, in the order of the sizes."""
        batch, height, width, sequence = self.batch, self.height, self.width, self.sequence
        assert height
        assert width
        assert sequence
        if "height" not in piece.sizes or piece.component == "vae":
            batch = Range(min=1, opt=batch.opt, max=batch.max)  # they are run without guidance's second sample
        if piece.longest != float("inf"):
            sequence = _only(int(piece.longest))
        elif piece.sizes == ("batch", "sequence") and folder.prompting is not None and folder.prompting.clip:
            before = folder.text_tokens() - folder.prompting.t5  # CLIP's tokens stand before those of T5
            sequence = Range(**{k: max(1, getattr(sequence, k) - before) for k in ("min", "opt", "max")})
        return {"batch": batch, "height": height, "width": width, "sequence": sequence}


def _only(size: int) -> Range:
    return Range(min=size, opt=size, max=size)
