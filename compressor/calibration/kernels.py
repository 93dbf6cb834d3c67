"""Whether the kernels for half-precision inputs run here, which spare a GPU most of what moments cost in PyTorch."""

from __future__ import annotations

import functools
from importlib import import_module
from importlib.util import find_spec
from subprocess import CalledProcessError
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)


def of(x: Tensor) -> Any:
    """The module `product_kernel`, or None where PyTorch has to sum this tensor."""
    return _module() if x.dtype in HALF and usable(x.device) else None


def usable(device: torch.device) -> bool:
    """Whether kernels run there: these, and those of plugins, as they need no more than these."""
    return device.type == "cuda" and problem(device) is None


def note(device: torch.device, dtype: torch.dtype) -> str | None:
    """A warning if moments will cost more than they need to, or None."""
    if device.type != "cuda" or dtype not in HALF:
        return None
    found = problem(device)
    return found and f"moments are summed by PyTorch, which costs a GPU several times as much as by kernels: {found}"


@functools.cache
def problem(device: torch.device) -> str | None:
    """Why the kernels cannot be used on that GPU, or None. The first call compiles small ones."""
    if find_spec("triton") is None:
        return "triton is not installed"
    if torch.version.hip is not None:
        return "they were tried on NVIDIA's GPUs only"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"they need compute capability 8.0, found {capability[0]}.{capability[1]}"
    try:
        kernel: Any = _module()
        found = kernel.read(torch.zeros(1, 8, dtype=torch.float16, device=device), total=False, squares=False)
        kernel.multiply(torch.zeros(8, 8, device=device), found, 1.0)
    except (ImportError, OSError, RuntimeError, CalledProcessError) as error:  # such as a missing C compiler
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return f"triton failed: {str(error).strip().splitlines()[0]}"
    return None


def _module() -> ModuleType:
    return import_module("compressor.calibration.product_kernel")
