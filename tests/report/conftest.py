"""A small report and a few pairs of images."""

import dataclasses

import pytest
import torch

from compressor.plugin import Samples
from compressor.report import (
    CalibrationFacts,
    ExportFacts,
    LayerRow,
    ModelFacts,
    Report,
    Size,
    Sizes,
)

SUFFIXES = (
    ("attn.to_q", "attention", "query", "image"),
    ("attn.add_k_proj", "attention", "key", "text"),
    ("attn.to_out.0", "attention", "output", "image"),
    ("ff.net.2", "feed_forward", "down", "image"),
)


def make_row(name: str = "transformer_blocks.0.attn.to_q", **changes) -> LayerRow:
    row = LayerRow(
        name,
        block="transformer_blocks.0",
        part="attention",
        role="query",
        stream="image",
        pruner="obs_diff",
        outputs=50,
        inputs=20,
        parameters=1000,
        removed=0,
        asked=500,
        zeros=500,
        error=0.02,
        damping=0.01,
        seconds=1.5,
    )
    return dataclasses.replace(row, **changes)


def make_rows(blocks: int) -> tuple[LayerRow, ...]:
    """Rows of an SD3-like transformer, whose last block has no text key."""
    return tuple(
        make_row(
            f"transformer_blocks.{b}.{suffix}",
            block=f"transformer_blocks.{b}",
            part=part,
            role=role,
            stream=stream,
            error=0.001 * 3**b,
        )
        for b in range(blocks)
        for suffix, part, role, stream in SUFFIXES
        if b < blocks - 1 or stream == "image"
    )


@pytest.fixture
def report() -> Report:
    size = Size(parameters=10_000, nonzero=10_000, operations=800_000, nonzero_operations=800_000, bytes=20_000)
    pruned = dataclasses.replace(size, nonzero=4_500, nonzero_operations=360_000)
    checks = {"shapes": [{"largest": 1e-6}], "2:4": True}
    return Report(
        recipe={"model": {"source": "builtin:shapes"}, "prune": [{"obs_diff": {"sparsity": 0.5}}]},
        versions={"torch": "2.13.0"},
        device="a CPU with 2 cores",
        model=ModelFacts(
            "builtin:shapes", "StableDiffusion3Pipeline", "transformer", "SD3Transformer2DModel", "sd3", "float32"
        ),
        layers=make_rows(3),
        sizes=Sizes(size, pruned),
        times={"load": 1.25, "calibrate": 200.0},
        peak_memory={"cpu_resident": 1_400_000_000, "gpu_allocated": 0},
        calibration=CalibrationFacts(128, 20, 3.0, 16, 4, 640, 9_830_400, {"transformer_blocks.0.attn.to_q": 7}),
        metrics={"pairs": {"psnr": 31.234, "psnr_se": 0.5, "images": 4.0}},
        exports=(ExportFacts("onnx", {"onnx/transformer.onnx": 18_400_000}, checks, 2.5),),
        warnings=("the calibration has few tokens",),
    )


@pytest.fixture
def samples() -> Samples:
    generator = torch.Generator().manual_seed(0)
    dense, latents = torch.rand(4, 3, 64, 64, generator=generator), torch.randn(4, 4, 8, 8, generator=generator)
    prompts = tuple(f"a red circle number {i}" for i in range(4))
    return Samples(prompts, dense, (dense + 0.1).clamp(0, 1), latents, 1.1 * latents)
