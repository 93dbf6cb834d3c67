"""The inverse of a Cholesky factor by matrix products, a third of the operations of solving for it.

With A = [A11, A21^T; A21, A22] and X = L^-1 of A = L L^T,

    X11 = inverse of A11,  L21 = A21 X11^T,  X22 = inverse of A22 - L21 L21^T,  X21 = -X22 L21 X11:

halves are halved again until they are small, and all else are products.
"""

# Shapes: I inputs.

from __future__ import annotations

import torch
from torch import Tensor

BASE = 128
"""Rows of what is left to the library."""
GPU_BASE = 512
"""The same on a GPU, where small pieces are launches and little work. Not measured."""


def inverse_factor(matrix_II: Tensor) -> tuple[Tensor, Tensor]:
    """L^-1 with L L^T the matrix.

    Args:
        matrix_II: symmetric; its lower triangle is read. Changed.

    Returns:
        L^-1, lower triangular, and 0 if the matrix is positive definite, else another number: an integer tensor, so
        that no GPU is waited for.
    """
    inverse_II = torch.zeros_like(matrix_II)
    infos: list[Tensor] = []
    _fill(matrix_II, inverse_II, GPU_BASE if matrix_II.is_cuda else BASE, infos)
    return inverse_II, torch.stack(infos).abs().amax()


def _fill(matrix_II: Tensor, inverse_II: Tensor, base: int, infos: list[Tensor]) -> None:
    size = len(matrix_II)
    if size <= base:
        lower_II, info = torch.linalg.cholesky_ex(matrix_II)
        infos.append(info)
        eye_II = torch.eye(size, dtype=lower_II.dtype, device=lower_II.device)
        inverse_II.copy_(torch.linalg.solve_triangular(lower_II, eye_II, upper=False).tril_())
        return
    half = -(-size // (2 * base)) * base
    first_II, second_II = inverse_II[:half, :half], inverse_II[half:, half:]
    _fill(matrix_II[:half, :half], first_II, base, infos)
    lower = matrix_II[half:, :half] @ first_II.T
    matrix_II[half:, half:].addmm_(lower, lower.T, alpha=-1)
    _fill(matrix_II[half:, half:], second_II, base, infos)
    torch.mm(second_II, lower @ first_II, out=inverse_II[half:, :half]).neg_()
