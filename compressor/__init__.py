"""Makes large text-to-image diffusion models smaller and faster in one shot, without training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compressor.errors import CompressorError

__all__ = ["CompressorError", "load"]


def load(folder: str | Path, device: str = "auto", dtype: str = "auto") -> Any:
    """Loads the result of a run as a working diffusers pipeline, after checking every file against its hash.

    Args:
        folder: the `output` of a recipe.
        device: `auto`, `cpu`, `cuda`, ...
        dtype: `auto` (float32 on a CPU, as stored elsewhere), `float32`, `float16` or `bfloat16`.

    Raises:
        CompressorError: if it is no such folder, or a file is missing, damaged or changed.
    """
    from compressor import checkpoint

    return checkpoint.load(folder, device, dtype).pipe
