"""Draws pictures from prompts, each from noise of its own, in batches that fit the memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from compressor.calibration.sampling import Encoded, Settings, out_of_memory, sample
from compressor.errors import CompressorError
from compressor.pipeline import Pipeline
from compressor.progress import Progress


def draw(
    pipeline: Pipeline, encoded: Sequence[Encoded], settings: Settings, batch: int, progress: Progress, title: str
) -> tuple[Tensor, Tensor]:
    """Draws one picture for each prompt.

    Args:
        pipeline: on its device.
        encoded: N prompts.
        settings: steps, guidance and size.
        batch: prompts at a time; halved when memory runs out.
        progress: shows a bar.
        title: of the bar.

    Returns:
        Images in [0, 1], N x 3 x H x W, and final latents, N x ..., both float32 on the CPU.

    Raises:
        CompressorError: if memory runs out even for one picture.
    """
    images: list[Tensor] = []
    latents: list[Tensor] = []
    position = 0
    with progress.task(title, total=len(encoded)) as advance:
        while position < len(encoded):
            prompts = encoded[position : position + batch]
            try:
                drawn = sample(pipeline, prompts, settings, "pt")
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                if batch == 1:
                    raise CompressorError(
                        "out of memory while drawing a single picture; choose a smaller height and width, or float16 "
                        "as model.dtype"
                    ) from error
                batch //= 2
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                continue
            images.append(drawn[0])
            latents.append(drawn[1])
            position += len(prompts)
            advance(len(prompts))
    return torch.cat(images), torch.cat(latents)
