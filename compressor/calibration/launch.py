"""Launches Triton kernels without Triton's look at every argument, which takes longer than many a kernel."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor
from triton import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor


class Launch:
    """A kernel and what was compiled of it, by kind of arguments.

    Args:
        kernel: a function under `triton.jit`; none of its numbers may be specialised: compiled code is told apart by
            the types of numbers, not by their values.
    """

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._compiled: dict[Hashable, Any] = {}

    def __call__(
        self, grid: tuple[int, ...], arguments: tuple[Any, ...], constants: tuple[Any, ...], warps: int, stages: int = 3
    ) -> None:
        """Launches it on the current stream of the GPU of its tensors.

        Args:
            grid: programs, in up to three dimensions.
            arguments: tensors, descriptors, numbers and None, in the order of the kernel's parameters.
            constants: its `tl.constexpr`, which come last.
            warps: of a program.
            stages: of its loops.
        """
        device = next(argument for argument in arguments if isinstance(argument, Tensor)).get_device()
        if device >= 0 and device != torch.cuda.current_device():
            with torch.cuda.device(device):
                self(grid, arguments, constants, warps, stages)
            return
        key = (device, constants, warps, stages, *map(_kind, arguments))
        compiled = self._compiled.get(key)
        if compiled is None:
            options = {"num_warps": warps, "num_stages": stages}
            if not isinstance(self._kernel, JITFunction):  # Triton's interpreter
                self._kernel[grid](*arguments, *constants, **options)
                return
            compiled = self._compiled[key] = self._kernel.warmup(*arguments, *constants, grid=grid, **options)
        compiled[(*grid, 1, 1)[:3]](*arguments, *constants)


def _kind(argument: Any) -> Hashable:
    """What compiled code depends on."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if isinstance(argument, TensorDescriptor):
        return argument.base.dtype, *argument.block_shape
    return type(argument)
