"""A small report and a few pairs of images."""

import dataclasses

import pytest
import torch

from compressor.plugin import Samples
from compressor.report import (
    CalibrationFacts,
    ExportFacts,
    GroupRow,
    LayerRow,
    ModelFacts,
    ProofFacts,
    Report,
    Size,
    Sizes,
    Structure,
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


def make_group(index: int = 0, part: str = "attn", kind: str = "heads", **changes) -> GroupRow:
    """Four of six heads that are 32 wide are left."""
    name = f"transformer_blocks.{index}"
    row = GroupRow(f"{name}.{part}.{kind}", name, kind, width=32, before=6, after=4, removed=(1, 4), asked=0.3)
    return dataclasses.replace(row, **changes)


def make_neurons(index: int = 0, part: str = "ff", **changes) -> GroupRow:
    """512 of 768 neurons are left."""
    numbers = {"width": 1, "before": 768, "after": 512, "removed": tuple(range(256))}
    return make_group(index, part, "neurons", **(numbers | changes))


def make_shrunk_rows(index: int = 0) -> tuple[LayerRow, ...]:
    """Linears of one block that lost two of its six heads and 256 of its 768 neurons; 192 is the width outside."""
    name = f"transformer_blocks.{index}"
    calibrated = {"error": 0.05, "damping": 0.01, "seconds": 0.3}
    plain = {"error": None, "damping": None, "seconds": 0.0}
    heads = {"block": name, "parameters": 36864, "removed": 12288, "asked": 12288, "zeros": 0}
    neurons = {"block": name, "parameters": 147456, "removed": 49152, "asked": 49152, "zeros": 0}
    neurons["part"] = "feed_forward"
    return (
        make_row(f"{name}.attn.to_q", outputs=128, inputs=192, **heads, **plain),
        make_row(f"{name}.attn.to_out.0", role="output", outputs=192, inputs=128, **heads, **calibrated),
        make_row(f"{name}.ff.net.0.proj", role="up", outputs=512, inputs=192, **neurons, **plain),
        make_row(f"{name}.ff.net.2", role="down", outputs=192, inputs=512, **neurons, **calibrated),
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
        calibration=CalibrationFacts(
            128, 20, 3.0, 16, 4, 160, 480, 107, 9_830_400, {"transformer_blocks.0.attn.to_q": 7}
        ),
        metrics={"pairs": {"psnr": 31.234, "psnr_se": 0.5, "images": 4.0}},
        exports=(ExportFacts("onnx", {"onnx/transformer.onnx": 18_400_000}, checks, 2.5),),
        warnings=("the calibration has few tokens",),
    )


@pytest.fixture
def shrunk(report: Report) -> Report:
    """A run that took out heads and neurons of two blocks, and made no zeros."""
    before = dataclasses.replace(report.sizes.before, nonzero=9_999)
    after = Size(parameters=8_000, nonzero=7_999, operations=600_000, nonzero_operations=600_000, bytes=16_000)
    groups = tuple(group for b in (1, 2) for group in (make_neurons(b), make_group(b)))
    return dataclasses.replace(
        report,
        layers=tuple(row for b in (1, 2) for row in make_shrunk_rows(b)),
        sizes=Sizes(before, after),
        structure=Structure(groups, (), (ProofFacts(1.5e-7, 1e-4, 2.2e-3, 1e-2),)),
    )


@pytest.fixture
def mixed(shrunk: Report) -> Report:
    """The same, and another pruner made half of the weights of another layer zero."""
    row = make_row("transformer_blocks.3.attn.to_q", block="transformer_blocks.3", pruner="wanda")
    after = dataclasses.replace(shrunk.sizes.after, nonzero=5_000, nonzero_operations=400_000)
    return dataclasses.replace(
        shrunk, layers=(*shrunk.layers, row), sizes=dataclasses.replace(shrunk.sizes, after=after)
    )


@pytest.fixture
def samples() -> Samples:
    generator = torch.Generator().manual_seed(0)
    dense, latents = torch.rand(4, 3, 64, 64, generator=generator), torch.randn(4, 4, 8, 8, generator=generator)
    prompts = tuple(f"a red circle number {i}" for i in range(4))
    return Samples(prompts, dense, (dense + 0.1).clamp(0, 1), latents, 1.1 * latents)
