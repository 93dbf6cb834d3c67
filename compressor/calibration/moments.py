"""Accumulates moments of what layers are fed, one set for all layers that share an input."""

# Shapes: T tokens, I inputs.

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compressor.calibration import kernels

if TYPE_CHECKING:
    from compressor.calibration.curvature import Gradients


class Unrecordable(RuntimeError):
    """An addition takes its weight from Python, so that a CUDA graph would repeat that of the forward it recorded."""


@dataclass
class Moments:
    """Raw, timestep-weighted sums over the tokens x of one input.

    Attributes:
        squares_I: sum of a_t x^2, float32, with a_t the weight of the step, times the forwards that one that is summed
            stands for.
        total_I: sum of a_t x, float32.
        second_II: sum of a_t x x^T, float32, or None if only norms were asked for.
        tokens: how many tokens were summed, unweighted; an integer tensor, so that no GPU is waited for.
        skipped: how many had an infinite or undefined entry and were left out; likewise.
        weight: sum of a_t over the tokens that were summed, float64: `total_I` over it is the inputs' mean.
        gradients: for each layer that reads the input, second moments of the gradients at its outputs; empty unless
            they were asked for. Then tokens count differently, as `influence` says, and a_t has that in it.
        halved: whether `second_II` is right on and below its diagonal only, until `finish`.
    """

    squares_I: Tensor
    total_I: Tensor
    second_II: Tensor | None
    tokens: Tensor
    skipped: Tensor
    weight: Tensor
    gradients: dict[str, Gradients] = field(default_factory=dict)
    halved: bool = False

    @property
    def bytes(self) -> int:
        """What all sums take."""
        large = (self.second_II, *(found.second_BKK for found in self.gradients.values()))
        return sum(x.nbytes for x in (self.squares_I, self.total_I, *large) if x is not None)

    @classmethod
    def empty(cls, inputs: int, second: bool, device: torch.device) -> Moments:
        """Sums of nothing for an input of that width."""
        zero = torch.zeros((), dtype=torch.int64, device=device)
        return cls(
            squares_I=torch.zeros(inputs, device=device),
            total_I=torch.zeros(inputs, device=device),
            second_II=torch.zeros(inputs, inputs, device=device) if second else None,
            tokens=zero,
            skipped=zero.clone(),
            weight=torch.zeros((), dtype=torch.float64, device=device),
        )

    def add(
        self,
        x: Tensor,
        weight: float,
        live: Tensor | None = None,
        root_T: Tensor | None = None,
    ) -> None:
        """Adds the tokens of one forward.

        The weight enters through the products' factor and never through x, which a half-precision dtype would round.
        Roots do enter through x: so the sums stay those of real numbers, of x and of a constant 1, both times the root.

        Args:
            x: ... x I, in any floating-point dtype; not changed.
            weight: a_t of the step, times the forwards that this one stands for.
            live: the weight as a GPU has it, float64 without dimensions, which an addition that is recorded in a CUDA
                graph reads whenever it is replayed.
            root_T: the root of what each token counts, float32; all count 1 if None. Times x it is to fit x's dtype.

        Raises:
            Unrecordable: if it is being recorded and there are no `kernels` for x.
        """
        x_TI = x.reshape(-1, x.shape[-1])
        kernel = kernels.of(x_TI)
        if kernel is not None:
            factor = 1.0 if live is not None else weight
            squares_I = self.squares_I if self.second_II is None else None
            sums = kernel.Sums(self.tokens, self.skipped, self.weight, self.total_I, squares_I)
            found = kernel.read(x_TI, total=True, squares=squares_I is not None, root_T=root_T)
            if self.second_II is None:
                kernel.settle(found, sums, factor, live)
            else:
                kernel.multiply(self.second_II, found, factor, sums, live)
                self.halved = True
            return
        if live is not None and x.is_cuda and torch.cuda.is_current_stream_capturing():
            raise Unrecordable(f"inputs in {str(x.dtype).removeprefix('torch.')} are summed without kernels")
        x_TI, good_T = finite(x_TI)
        good = good_T.sum()
        self.tokens.add_(good)
        self.skipped.add_(len(x_TI) - good)
        if root_T is None:
            self.weight.add_(good, alpha=weight)
            self.total_I.add_(x_TI.sum(0, dtype=torch.float32), alpha=weight)
        else:
            root_T = root_T * good_T
            x_TI = times_roots(x_TI, root_T)
            self.weight.add_(root_T.square().sum(dtype=torch.float64), alpha=weight)
            self.total_I.add_(root_T @ x_TI.float(), alpha=weight)
        if self.second_II is None:
            self.squares_I.add_(x_TI.float().square().sum(0), alpha=weight)
            return
        self.second_II = add_products(self.second_II, x_TI, weight)

    def finish(self) -> Moments:
        """Completes the second moments, and takes the sum of squares from their diagonal, where there are any."""
        if self.second_II is not None:
            if self.halved:
                mirror(self.second_II)
            self.squares_I = self.second_II.diagonal().clone()
        for found in self.gradients.values():
            found.finish()
        self.halved = False
        return self


def mirror(matrix_II: Tensor) -> None:
    """Copies what lies below the diagonal to above it, in place and without a second matrix."""
    for start in range(0, len(matrix_II), 1024):
        block = slice(start, start + 1024)
        matrix_II[block, start + 1024 :] = matrix_II[start + 1024 :, block].T
        square = matrix_II[block, block]
        square.copy_(square.tril() + square.tril(-1).T)


def finite(x: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens of ... x I as T x I, those that are not finite as zeros, and which are finite (T)."""
    x_TI = x.reshape(-1, x.shape[-1])
    good_T = x_TI.abs().amax(dim=1) < float("inf")  # as isfinite(x_TI).all(dim=1), with fewer passes over x
    return torch.where(good_T[:, None], x_TI, 0), good_T


def times_roots(x_TI: Tensor, root_T: Tensor) -> Tensor:
    """Tokens times the roots of what they count, in the tokens' dtype."""
    return (x_TI * root_T[:, None]).to(x_TI.dtype)


def add_products(second_II: Tensor, x_TI: Tensor, weight: float) -> Tensor:
    """`second_II` + weight x^T x, in place where that can be."""
    if x_TI.is_cuda and x_TI.dtype in (torch.float16, torch.bfloat16):
        # half-precision products on tensor cores, summed in float32
        return torch.addmm(second_II, x_TI.T, x_TI, alpha=weight, out_dtype=torch.float32)
    x_TI = x_TI.float()
    return second_II.addmm_(x_TI.T, x_TI, alpha=weight)
