"""Tells where code waits for a GPU, in tests that run on one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from compressor.calibration.replay import watched


def count_waits(work: Callable[..., object], *args: Any) -> int:
    """How often a call waits for the GPU."""
    torch.cuda.synchronize()
    _, waits = watched(lambda: work(*args))
    return waits
