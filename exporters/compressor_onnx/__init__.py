"""Exporter `onnx`: the pruned network as an ONNX file, proven against torch before anyone relies on it."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from compressor.errors import CompressorError
from compressor.plugin import Export, Exporter

if TYPE_CHECKING:
    from compressor.pipeline import Pipeline

PACKAGES = ("onnx", "onnxruntime", "onnxscript")

TOLERANCES = {"float32": 2e-5, "float16": 1e-2}
"""Relative L2 between onnxruntime and torch that is let pass, by dtype of the file; some eight times what was measured
over all families (2.4e-6 and 1.4e-3)."""


class ONNX(Exporter):
    """Writes the pruned network as ONNX with dynamic batch, height, width and text length, and checks the file.

    onnxruntime must agree with torch on the traced shape and on another one, and every layer that is N:M sparse in
    torch must be so in the file along the reduction axis. File and input names are those that optimum-onnx reads.
    """

    dtype: Literal["float32", "float16"] = Field(
        default="float32", description="of the weights and of the arithmetic in the file"
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

    def available(self) -> str | None:
        """None if onnx, onnxruntime and onnxscript are installed, else how to install them."""
        missing = [name for name in PACKAGES if find_spec(name) is None]
        if not missing:
            return None
        return f'onnx needs {", ".join(missing)}; pip install "diffusion-compressor[onnx]"'

    def export(self, pipeline: Pipeline, folder: Path) -> Export:
        """Writes `<component>/model.onnx` and the component's `config.json`, then proves the file.

        Args:
            pipeline: its network is not changed; everything is computed on a copy on the CPU, which shares the
                weights where device and dtype are already right.
            folder: exists and is empty.

        Returns:
            The files and the checks: opset, dtype, reference, tolerance, the relative L2 of each shape, how many
            target layers were found in the file, and for each sparse layer its pattern.

        Raises:
            CompressorError: if a package is missing, the traced shape does not suit the network, torch cannot export
                it, the opset is not the one asked for, or onnxruntime or a layer's sparsity differs from torch.
        """
        problem = self.available()
        if problem is not None:
            raise CompressorError(problem)

        import torch

        from compressor.onnx_files import check, graph, sparse
        from compressor.structure.family import like

        dtype = getattr(torch, self.dtype)
        tolerance = self.tolerance or TOLERANCES[self.dtype]
        shape = graph.traced_shape(pipeline.module, self.batch, self.height, self.width, self.sequence)
        target = folder / pipeline.component_name
        target.mkdir()
        file = target / "model.onnx"
        network = graph.copy_of(pipeline.module, dtype)
        graph.write_config(network, target / "config.json")
        graph.write(network, pipeline.family, shape, dtype, self.opset, file)
        label = f"{pipeline.component_name}/{file.name}"
        opset = check.opset(file, self.opset, label)

        reference = network
        if like(pipeline.module)[1] is torch.float32:
            reference = graph.copy_of(pipeline.module, torch.float32)
        del network
        runtime = check.load(file, label)
        numeric = [
            check.compare(runtime, reference, pipeline.family, s, dtype, tolerance, label)
            for s in (shape, graph.other_shape(pipeline.module, shape))
        ]
        checks = {
            "opset": opset,
            "dtype": self.dtype,
            "reference": f"{like(reference)[1]} on the CPU",
            "tolerance": tolerance,
            "numeric": numeric,
            **sparse.verify(file, pipeline.targets, label),
        }
        files = tuple(sorted(path.relative_to(folder) for path in target.iterdir()))
        return Export(files, {pipeline.component_name: checks})
