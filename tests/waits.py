"""Tells where code waits for a GPU, in tests that run on one."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch


def count_waits(work: Callable[..., object], *args: Any) -> int:
    """How often a call waits for the GPU."""
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")  # torch warns as well that it may not see every wait
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing CUDA operation" in str(warning.message) for warning in caught)
