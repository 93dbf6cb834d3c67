"""Pictures from captions with a fixed seed each, and the quality table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from compressor.shapes import captions as caption_lists
from compressor.shapes import scenes
from compressor.shapes.judge import Judge, frechet_distance, score

STEPS = 20
GUIDANCE = 3.0
"""Guidance scale at which the quality table is made."""

_REFERENCE_SEED = 7


def generate(
    pipeline: Any,
    captions: Sequence[str],
    *,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    seed: int = 0,
    batch: int = 64,
    max_sequence_length: int | None = None,
) -> Tensor:
    """Makes one picture a caption; picture i has noise of its own, drawn on the CPU from `seed` and i.

    Args:
        pipeline: A diffusers text-to-image pipeline.
        captions: What to show.
        steps: Of the sampler.
        guidance: Guidance scale; 1 is none.
        seed: Of the noise.
        batch: How many pictures to make at a time; changes the speed alone.
        max_sequence_length: Of T5's part, for pipelines that have one; None for their default.

    Returns:
        N x 3 x H x W, float32 in [0, 1], on the CPU.
    """
    made = []
    length = {} if max_sequence_length is None else {"max_sequence_length": max_sequence_length}
    for start in range(0, len(captions), batch):
        chunk = list(captions[start : start + batch])
        generators = [torch.Generator().manual_seed(seed * 1_000_003 + start + i) for i in range(len(chunk))]
        output = pipeline(
            prompt=chunk, num_inference_steps=steps, guidance_scale=guidance, generator=generators, output_type="pt",
            height=scenes.SIDE, width=scenes.SIDE, **length,
        )  # fmt: skip
        made.append(output.images.float().cpu())
    return torch.cat(made)


def quality(
    pipeline: Any,
    judge: Judge,
    captions: Sequence[str] | None = None,
    *,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    seed: int = 0,
) -> tuple[dict[str, dict[str, float]], Tensor]:
    """The quality table of a pipeline.

    Args:
        pipeline: What makes the pictures.
        judge: What reads them.
        captions: The first 512 evaluation captions if None.
        steps: Of the sampler.
        guidance: Guidance scale.
        seed: Of the noise.

    Returns:
        The rows by name (`right`, `error`, `count`; see `judge.score`), and the pictures. The row `frechet` holds the
        `distance` of the pictures to drawn scenes, eight a caption, and that of as many other `drawn` scenes as there
        are pictures: the distance of few pictures is biased upwards, so that only their difference means something.
    """
    captions = caption_lists.evaluation()[:512] if captions is None else captions
    batch = 16 if pipeline.device.type == "cpu" else 256
    pictures = generate(pipeline, captions, steps=steps, guidance=guidance, seed=seed, batch=batch)
    rows = {
        name: {"right": row.right, "error": row.error, "count": row.count}
        for name, row in score(judge, pictures, captions).items()
    }
    reference = scenes.render(scenes.sample(8 * len(captions), _REFERENCE_SEED, pairs=0.5))
    drawn = scenes.render(scenes.sample(len(captions), _REFERENCE_SEED + 1, pairs=0.5))
    frechet = {
        "distance": frechet_distance(judge, pictures, reference),
        "drawn": frechet_distance(judge, drawn, reference),
    }
    return rows | {"frechet": frechet}, pictures


def as_text(rows: dict[str, dict[str, float]]) -> str:
    """The table for people."""
    lines = [
        f"{name:<12} {100 * row['right']:6.2f} %  +- {100 * row['error']:.2f}  of {row['count']:.0f}"
        for name, row in rows.items()
        if "right" in row
    ]
    return "\n".join(
        [*lines, f"{'frechet':<12} {rows['frechet']['distance']:6.1f}, of drawn scenes {rows['frechet']['drawn']:.1f}"]
    )
