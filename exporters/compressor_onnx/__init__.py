"""Exporter `onnx`: the pruned pipeline as ONNX files, each proven against torch before anyone relies on it."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from compressor.errors import CompressorError
from compressor.plugin import Export, Exporter

if TYPE_CHECKING:
    from compressor.onnx_files.pieces import Piece
    from compressor.onnx_files.writing import Settings
    from compressor.pipeline import Folder, Pipeline

PACKAGES = ("onnx", "onnxruntime", "onnxscript")

ComponentName = Literal[
    "transformer", "unet", "text_encoder", "text_encoder_2", "text_encoder_3", "vae_encoder", "vae_decoder"
]


class ONNX(Exporter):
    """Writes the pipeline as ONNX files with dynamic batch, height, width and text length, and checks each of them.

    onnxruntime must agree with torch on the traced shape and on another one, and every layer that is N:M sparse in
    torch must be so in the file along the reduction axis. Folders, file and input names are those that optimum-onnx
    reads.
    """

    components: tuple[ComponentName, ...] | None = Field(
        default=None,
        strict=False,
        min_length=1,
        description="what becomes an ONNX file; everything that can if not given: the network, CLIP and T5 encoders, "
        "both halves of the autoencoder",
    )
    dtype: Literal["float32", "float16", "bfloat16"] = Field(
        default="float32",
        description="of the weights and of the arithmetic in the files; onnxruntime's CPU provider takes no bfloat16",
    )
    opset: int | None = Field(
        default=None,
        ge=18,
        description="ONNX operator set, never silently another; torch's own default if not given",
    )
    tolerance: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="largest relative L2 from torch to onnxruntime; 2e-5 for float32 and 1e-2 for float16 if not given",
    )
    batch: int = Field(default=2, ge=2, description="samples of the traced shape; the file takes any number")
    height: int | None = Field(
        default=None,
        ge=2,
        description="latent rows of the traced shape; at most 32 and the model's own if not given",
    )
    width: int | None = Field(
        default=None, ge=2, description="latent columns of the traced shape; as for the height if not given"
    )
    sequence: int = Field(default=24, ge=2, description="text tokens of the traced shape; the file takes any number")

    @field_validator("dtype")
    @classmethod
    def _refuse_bfloat16(cls, dtype: str) -> str:
        if dtype == "bfloat16":
            raise ValueError(
                "onnxruntime's CPU provider, which proves every file, takes no bfloat16; choose float16 or float32"
            )
        return dtype

    @field_validator("opset")
    @classmethod
    def _know_opset(cls, opset: int | None, info: ValidationInfo) -> int | None:
        """Refuses what cannot be written here; a manifest, which is JSON, speaks of files that were written."""
        if opset is None or info.mode == "json" or any(find_spec(name) is None for name in PACKAGES):
            return opset
        from compressor_onnx import opsets

        if (problem := opsets.explain(opset)) is not None:
            raise ValueError(problem)
        return opset

    def available(self) -> str | None:
        """None if onnx, onnxruntime and onnxscript are installed, else how to install them."""
        missing = [name for name in PACKAGES if find_spec(name) is None]
        return f'onnx needs {", ".join(missing)}; pip install "diffusion-compressor[onnx]"' if missing else None

    def check(self, folder: Folder) -> None:
        """Refuses components that the pipeline lacks, and a shape that does not suit.

        Raises:
            CompressorError: naming the option.
        """
        from compressor.onnx_files import pieces

        for name in self.components or ():
            if pieces.known(name) not in folder.components:
                having = ", ".join(folder.components)
                raise CompressorError(f"components: no '{name}' to export: {folder.pipeline_class} has {having}")
        unit = pieces.unit_of(folder.config(folder.network))
        for name, side in (("height", self.height), ("width", self.width)):
            if side is not None and (side % unit or side < 2 * unit):
                raise CompressorError(
                    f"{name}: should be a multiple of {unit} latents, at least {2 * unit}, found {side}"
                )

    def space(self, pipeline: Pipeline) -> int:
        """About how many bytes the files take."""
        found, _, settings = self._plan(pipeline)
        from compressor.onnx_files import writing

        return writing.bytes_of(found, settings)

    def export(self, pipeline: Pipeline, folder: Path) -> Export:
        """Writes `<component>/model.onnx` and the component's `config.json`, then proves each file.

        Beside them go `model_index.json`, the tokenizers and the scheduler, so that the folder is a pipeline.

        Args:
            pipeline: its components are not changed; everything is computed on copies on the CPU, which share the
                weights where device and dtype are already right.
            folder: exists and is empty.

        Returns:
            The files and, by component, the checks: dtype, opset, inputs and outputs, reference, tolerance, relative L2
            at each shape, how many target layers were found in the file, and for each sparse layer its pattern.

        Raises:
            CompressorError: if a package is missing, a component cannot be had, the disk is too small, the traced shape
                does not suit a component, torch cannot export it, the opset is not the one asked for, or onnxruntime
                or a layer's sparsity differs from torch.
        """
        found, left_out, settings = self._plan(pipeline)
        from compressor.onnx_files import graph, writing
        from compressor_onnx import layout

        names = ", ".join(piece.name for piece in found)
        writing.check_space(f"the files of {names}", writing.bytes_of(found, settings), folder)
        checks: dict[str, Any] = {}
        for piece in found:
            target = folder / piece.name
            target.mkdir()
            graph.write_config(piece.module, target / "config.json")
            file = target / "model.onnx"
            checks[piece.name] = writing.write(piece, settings, file) | writing.prove(piece, settings, file)
        if pipeline.pipe is not None:
            layout.copy_rest(pipeline, folder)
        if left_out:
            checks["left_out"] = left_out
        files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
        return Export(tuple(files), checks)

    def verify(self, pipeline: Pipeline, folder: Path) -> dict[str, Any]:
        """Proves the files of an earlier export again, as `export` did, against the pipeline.

        Args:
            pipeline: the result that they were written from. Not changed.
            folder: as `export` left it.

        Raises:
            CompressorError: as `export`.
        """
        found, _, settings = self._plan(pipeline)
        from compressor.onnx_files import writing

        checks: dict[str, Any] = {}
        for piece in found:
            file = folder / piece.name / "model.onnx"
            proof = writing.prove(piece, settings, file)
            checks[piece.name] = writing.describe(piece, settings, file) | proof
        return checks

    def _plan(self, pipeline: Pipeline) -> tuple[list[Piece], dict[str, str], Settings]:
        if (problem := self.available()) is not None:
            raise CompressorError(problem)
        from compressor.onnx_files import pieces, writing

        settings = writing.Settings(**self.model_dump(exclude={"components"}))
        return *pieces.find(pipeline, self.components), settings
