"""Accumulates second moments of the gradients at a layer's outputs, in blocks along the diagonal."""

# Shapes: T tokens, O outputs in B blocks of K.

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.calibration import kernels
from compressor.calibration.moments import add_products, finite, mirror, times_roots

BLOCK = 2048
"""The most outputs whose gradients are multiplied with one another: the cost of all of them grows with their square, of
solving with it with their cube. Blocks of 128 lost less than a tenth of what the whole matrix gained."""


@dataclass
class Gradients:
    """Second moments of the gradients g at a layer's outputs, in blocks along the diagonal.

    Attributes:
        second_BKK: weighted sum of g g^T within each block of outputs, float32.
        tokens: how many tokens were summed, unweighted; an integer tensor, so that no GPU is waited for.
        skipped: how many had an infinite or undefined entry and were left out; likewise.
        halved: whether the blocks are right on and below their diagonals only, until `finish`.
    """

    second_BKK: Tensor
    tokens: Tensor
    skipped: Tensor
    halved: bool = False

    @classmethod
    def empty(cls, outputs: int, device: torch.device) -> Gradients:
        """Sums of nothing for a layer of that many outputs."""
        blocks, width = blocks_of(outputs)
        zero = torch.zeros((), dtype=torch.int64, device=device)
        return cls(torch.zeros(blocks, width, width, device=device), zero, zero.clone())

    def add(
        self, gradient: Tensor, weight: float = 1.0, live: Tensor | None = None, root_T: Tensor | None = None
    ) -> None:
        """Adds the tokens of one backward pass.

        The weight enters through the products' factor and never through g, which a half-precision dtype would round.

        Args:
            gradient: ... x O, in any floating-point dtype; not changed.
            weight: how much the pass counts.
            live: another factor, as a GPU has it, float64 without dimensions; only where there are `kernels` for it.
            root_T: the root of what each token counts, as in `Moments.add`.
        """
        width = self.second_BKK.shape[-1]
        kernel = kernels.of(gradient)
        if kernel is not None:
            g_TO = gradient.reshape(-1, gradient.shape[-1])
            found = kernel.read(g_TO, total=False, squares=False, root_T=root_T)
            kernel.settle(found, kernel.Sums(self.tokens, self.skipped), 1.0)
            for block, second_KK in enumerate(self.second_BKK):
                kernel.multiply(second_KK, found, weight, live=live, first=block * width)
            self.halved = True
            return
        assert live is None
        g_TO, good_T = finite(gradient)
        if root_T is not None:
            g_TO = times_roots(g_TO, root_T)
        good = good_T.sum()
        self.tokens.add_(good)
        self.skipped.add_(len(g_TO) - good)
        for second_KK, g_TK in zip(self.second_BKK, g_TO.split(width, dim=1), strict=True):
            second_KK.copy_(add_products(second_KK, g_TK, weight))

    def finish(self) -> None:
        """Completes the blocks."""
        if self.halved:
            for second_KK in self.second_BKK:
                mirror(second_KK)
        self.halved = False


def blocks_of(outputs: int) -> tuple[int, int]:
    """Into how many equal blocks of at most `BLOCK` outputs they are cut, as few as can be, and their width."""
    blocks = next(n for n in range(-(-outputs // BLOCK), outputs + 1) if outputs % n == 0)
    return blocks, outputs // blocks
