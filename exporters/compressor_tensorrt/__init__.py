"""Exporter `tensorrt`: engines of the pruned pipeline for TensorRT or TensorRT-RTX, with evidence of 2:4 sparsity."""

from __future__ import annotations

import ctypes
import io
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator, model_validator

from compressor.errors import CompressorError
from compressor.options import Bytes, InputFile
from compressor.plugin import Export, Exporter
from compressor_tensorrt.profiles import Profile

if TYPE_CHECKING:
    from compressor.onnx_files.pieces import Piece
    from compressor.onnx_files.writing import Settings
    from compressor.pipeline import Folder, Pipeline
    from compressor.two_four.table import Row
    from compressor_tensorrt import builder

INSTALL = {"tensorrt": "pip install tensorrt", "tensorrt_rtx": 'pip install "diffusion-compressor[tensorrt-rtx]"'}
"""How each runtime is installed."""

ONNX = ("onnx", "onnxruntime", "onnxscript")

ENGINE, KERNELS = 3_000_000, 30_000
"""Bytes that an engine and its log take beside the weights, and as many more for each module and profile. TensorRT-RTX
wrote 2.5 MB for a text encoder of 31 modules and 8.8 MB for a U-Net of 317, both with hardly any weights."""

UNUSED = ("vae_encoder",)
"""What a pipeline that draws from text does not use."""

Name = Literal["transformer", "unet", "text_encoder", "text_encoder_2", "text_encoder_3", "vae_encoder", "vae_decoder"]


def has_driver() -> bool:
    """Whether NVIDIA's driver can be loaded here."""
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    return True


def has_gpu() -> bool:
    """Whether torch finds a CUDA device here."""
    import torch

    return torch.cuda.is_available()


class TensorRT(Exporter):
    """Builds TensorRT engines, the ONNX files behind them proven against torch, and keeps the builder's log.

    Networks are strongly typed: an engine computes in the types of the ONNX file. For each 2:4 sparse layer the report
    says whether it is sparse in the file, what the log says of it, and, where a GPU can load the engine, which kernel
    runs it. Then the engine is also held against torch.
    """

    runtime: Literal["tensorrt", "tensorrt_rtx"] = Field(
        default="tensorrt",
        description="tensorrt builds for the GPU of this machine; tensorrt_rtx for GeForce and RTX GPUs, without one",
    )
    dtype: Literal["float32", "float16", "bfloat16"] = Field(
        default="float16", description="of the weights and of the arithmetic in the engine"
    )
    components: tuple[Name, ...] | None = Field(
        default=None,
        strict=False,
        min_length=1,
        description="what becomes an engine; all that drawing from text needs if not given",
    )
    profiles: tuple[Profile, ...] = Field(
        default=(),
        strict=False,
        description="sizes to build for, one optimization profile each; one of the model's own size if not given",
    )
    sparse_weights: bool = Field(default=True, description="let the builder choose kernels for 2:4 sparse weights")
    workspace: Bytes | None = Field(
        default=None,
        description="the most memory that a layer may take for itself, as 4GiB; all if not given",
    )
    timing_cache: str | None = Field(
        default=None, description="a file of measured times, read if it is there and written; only tensorrt has one"
    )
    version_compatible: bool = Field(
        default=False, description="let later versions of the runtime run the engine, too; only tensorrt can"
    )
    weight_streaming: bool = Field(
        default=False, description="let the weights stay in the host's memory when the engine runs"
    )
    probe: InputFile | None = Field(
        default=None,
        description="a table of `compressor probe`: the report gives each 2:4 layer's times by it",
    )
    compute_capabilities: tuple[str, ...] = Field(
        default=(),
        strict=False,
        description="build for just these, such as `8.6`, with tensorrt_rtx; all from 8.0 on if not given",
    )

    @field_validator("compute_capabilities", mode="before")
    @classmethod
    def _read_numbers(cls, value: Any) -> Any:
        """YAML reads 8.6 as a number."""
        return [str(v) if isinstance(v, float) else v for v in value] if isinstance(value, list) else value

    @model_validator(mode="after")
    def _check_runtime(self) -> TensorRT:
        if self.runtime == "tensorrt" and self.compute_capabilities:
            raise ValueError(
                "compute_capabilities has no effect: tensorrt builds for the GPU of this machine; remove it, "
                "or choose runtime tensorrt_rtx"
            )
        if self.runtime == "tensorrt_rtx" and self.timing_cache is not None:
            raise ValueError("timing_cache has no effect: tensorrt_rtx does not time kernels when it builds; remove it")
        if self.runtime == "tensorrt_rtx" and self.version_compatible:
            raise ValueError("version_compatible is not to be had of tensorrt_rtx, only of tensorrt; remove it")
        return self

    def available(self) -> str | None:
        """None if the runtime and what writes ONNX are installed, else how to install them."""
        if find_spec(self.runtime) is None:
            return f"tensorrt: the runtime {self.runtime} is not installed; {INSTALL[self.runtime]}"
        if missing := [name for name in ONNX if find_spec(name) is None]:
            return f'tensorrt needs {", ".join(missing)}; pip install "diffusion-compressor[onnx]"'
        if self.runtime == "tensorrt" and not has_driver():
            return (
                "tensorrt: the runtime tensorrt builds on a GPU, and this machine has no NVIDIA driver; "
                "choose runtime tensorrt_rtx, or export on the machine that will run the engine"
            )
        return None

    def check(self, folder: Folder) -> None:
        """Refuses components that the model lacks, sizes that it cannot draw, and unknown compute capabilities."""
        from compressor.onnx_files import pieces
        from compressor_tensorrt import builder

        if self.probe is not None:
            from compressor.two_four import table

            try:
                table.read(self.probe)
            except CompressorError as error:
                raise CompressorError(f"probe: {error}") from None
        for name in self.components or ():
            if pieces.known(name) not in folder.components:
                raise CompressorError(
                    f"components: no '{name}' to export: {folder.pipeline_class} has {', '.join(folder.components)}"
                )
        if self.compute_capabilities and find_spec(self.runtime) is not None:  # a plan needs no runtime
            trt = builder.load(self.runtime)
            for name in self.compute_capabilities:
                try:
                    builder.capability(trt, name)
                except CompressorError as error:
                    raise CompressorError(f"compute_capabilities: {error}") from None
        unit = pieces.unit_of(folder.config(folder.network)) * folder.vae_factor
        for i, profile in enumerate(self.profiles):
            where = f"profiles[{i}]."
            for name in ("height", "width"):
                sides = getattr(profile, name)
                for side in sides.three if sides else ():
                    folder.check_size(**{"height": None, "width": None, name: side}, where=where)
                    if side % unit:
                        raise CompressorError(f"{where}{name}: should be a multiple of {unit} pixels, found {side}")

    def space(self, pipeline: Pipeline) -> int:
        """About how many bytes the engines take, and the largest ONNX file on the way to them."""
        return self._bytes(self._find(pipeline)[0])

    def export(self, pipeline: Pipeline, folder: Path) -> Export:
        """Writes `<component>/model.engine`, its `config.json` and `build.log` for each component.

        Args:
            pipeline: its components are not changed.
            folder: exists and is empty.

        Returns:
            The files and, by component, the checks: runtime, types, profiles, how far the ONNX file is from torch and,
            on a GPU, how far the engine is; and for each sparse layer what is known of it.

        Raises:
            CompressorError: if the runtime is not there, a component cannot be had, the ONNX file differs from torch,
                it cannot be parsed or built, or the engine differs from torch.
        """
        if (problem := self.available()) is not None:
            raise CompressorError(problem)
        from compressor.onnx_files import writing
        from compressor_tensorrt import builder

        trt = builder.load(self.runtime)
        found, left_out = self._find(pipeline)
        settings = writing.Settings(dtype=self.dtype)
        writing.check_space("engines and the largest ONNX file", self._bytes(found), folder)
        profiles = [profile.complete(pipeline.folder) for profile in self.profiles or (Profile(),)]
        checks: dict[str, Any] = {"runtime": builder.version(trt)}
        for piece in found:
            (folder / piece.name).mkdir()
            checks[piece.name] = self._build(trt, piece, pipeline, profiles, settings, folder / piece.name)
        if left_out:
            checks["left_out"] = left_out
        files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
        return Export(tuple(files), checks)

    def verify(self, pipeline: Pipeline, folder: Path) -> dict[str, Any]:
        """Runs the engines of an earlier export on the GPU, against torch again; nothing is done without a GPU."""
        if not has_gpu():
            return {}
        if (problem := self.available()) is not None:
            raise CompressorError(problem)
        from compressor.onnx_files import pieces, writing
        from compressor_tensorrt import builder, engine

        trt, settings = builder.load(self.runtime), writing.Settings(dtype=self.dtype)
        profile = (self.profiles or (Profile(),))[0].complete(pipeline.folder)
        found, _ = pieces.find(pipeline, [path.parent.name for path in sorted(folder.glob("*/model.engine"))])
        checks = {}
        for piece in found:
            data, shape = (folder / piece.name / "model.engine").read_bytes(), profile.usual(piece, pipeline.folder)
            log = builder.Log(io.StringIO())
            try:
                _, checks[piece.name] = engine.prove(trt, data, piece, shape, settings.dtype_of(piece), log)
            except engine.CannotLoad:
                if self.runtime == "tensorrt":
                    raise
        return checks

    def _find(self, pipeline: Pipeline) -> tuple[list[Piece], dict[str, str]]:
        from compressor.onnx_files import pieces

        found, left_out = pieces.find(pipeline, self.components)
        unused = UNUSED if self.components is None else ()
        return [piece for piece in found if piece.name not in unused], left_out

    def _bytes(self, found: list[Piece]) -> int:
        from compressor.onnx_files import writing

        files = [writing.bytes_of([piece], writing.Settings(dtype=self.dtype)) for piece in found]
        modules = sum(len(list(piece.module.modules())) for piece in found)
        kernels = len(found) * ENGINE + modules * KERNELS * max(1, len(self.profiles))
        return sum(files) + kernels + max(files)  # every engine, and one ONNX file at a time

    def _build(
        self, trt: Any, piece: Piece, pipeline: Pipeline, profiles: list[Profile], settings: Settings, target: Path
    ) -> dict[str, Any]:
        """One component: the ONNX file, its proof, the engine, and what is known of it."""
        import onnx_ir as ir

        from compressor.onnx_files import graph, sparse, writing
        from compressor_tensorrt import builder, evidence

        shapes = [profile.shapes(piece, pipeline.folder) for profile in profiles]
        graph.write_config(piece.module, target / "config.json")
        with tempfile.TemporaryDirectory(dir=target) as scratch:
            file = Path(scratch) / piece.name / "model.onnx"
            file.parent.mkdir()
            written = writing.write(piece, settings, file)
            if written["dtype"] == "bfloat16":
                proof = sparse.verify(file, piece.targets, piece.name) if piece.targets else {}
                proof |= {"numeric": "not compared: onnxruntime's CPU provider takes no bfloat16"}
            else:
                proof = writing.prove(piece, settings, file)
            nodes = {
                layer: [str(node.name) for node in found] for layer, found in sparse.linears(ir.load(file)).items()
            }
            names = {node: layer for layer, found in nodes.items() for node in found}
            begun = time.perf_counter()
            with (target / "build.log").open("w", encoding="utf-8") as stream:
                log = builder.Log(stream, f"{scratch}/")
                data = builder.build(trt, file, shapes, self._settings(), names, log, piece.name)
            seconds = time.perf_counter() - begun
        (target / "model.engine").write_bytes(data)
        text = (target / "build.log").read_text(encoding="utf-8")
        said, layers, ran = evidence.read_log(text), evidence.read_layers(text), "not run: no CUDA device here"
        if has_gpu():
            from compressor_tensorrt import engine

            shape = profiles[0].usual(piece, pipeline.folder)
            with (target / "build.log").open("a", encoding="utf-8") as stream:
                try:
                    layers, ran = engine.prove(trt, data, piece, shape, written["dtype"], builder.Log(stream))
                except engine.CannotLoad as error:
                    if self.runtime == "tensorrt":  # which builds for this GPU; the other one for those of users
                        raise
                    ran = f"not run: {error}"
        patterns = proof.pop("sparse", {})
        sizes = {layer.name: (layer.outputs, layer.inputs) for layer in piece.targets}
        return {
            **written,
            **proof,
            "profiles": [profile.describe(piece, pipeline.folder) for profile in profiles],
            "build_seconds": seconds,
            "layers": len(layers),
            "engine": ran,
            "log": {
                "eligible": said.eligible.count if said.eligible else "says nothing of sparsity",
                "chosen": said.chosen.count if said.chosen else "says nothing of sparsity",
            },
            "sparse": evidence.by_layer(
                nodes, patterns, sizes, said, layers, self._times(piece, pipeline, profiles[0]) if patterns else {}
            ),
        }

    def _times(self, piece: Piece, pipeline: Pipeline, profile: Profile) -> dict[str, Row | None]:
        """The table's rows for a component's linears at the sizes that kernels are chosen for, by the linear's name."""
        if self.probe is None:
            return {}
        from compressor.structure import trace
        from compressor.two_four import table

        shape, found = profile.usual(piece, pipeline.folder), table.read(self.probe)
        sides = {"height": shape.height, "width": shape.width, "sequence": shape.sequence}
        seen = trace(pipeline.folder.twin(), pipeline.family, **sides)
        return {
            layer.name: found.find(shape.batch * seen.tokens[layer.name], layer.inputs, layer.outputs)
            for layer in piece.targets
        }

    def _settings(self) -> builder.Settings:
        from compressor_tensorrt import builder

        return builder.Settings(
            self.sparse_weights,
            self.workspace,
            None if self.timing_cache is None else Path(self.timing_cache).expanduser(),
            self.version_compatible,
            self.weight_streaming,
            self.compute_capabilities,
        )
