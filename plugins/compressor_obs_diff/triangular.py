"""The inverse of a Cholesky factor by matrix products, a third of the operations of solving for it.

With A = [A11, A21^T; A21, A22] and X = L^-1 of A = L L^T,

    X11 = inverse of A11,  L21 = A21 X11^T,  X22 = inverse of A22 - L21 L21^T,  X21 = -X22 L21 X11:

halves are halved again until they are small, and all else are products.
"""

# Shapes: N matrices of I inputs, or none before the I: one matrix.

from __future__ import annotations

import torch
from torch import Tensor

BASE = 128
"""Rows of what is left to the library."""
GPU_BASE = 512
"""The same on a GPU. On an H200 one of 6144 rows in float64 takes as long with 128 to 1024, within a tenth."""


def inverse_factor(matrix_NII: Tensor) -> tuple[Tensor, Tensor]:
    """L^-1 with L L^T the matrix, of one matrix or of several at once.

    Args:
        matrix_NII: symmetric, N x I x I or I x I; the lower triangles are read. Changed.

    Returns:
        L^-1, lower triangular, and for each matrix 0 if it is positive definite, else another number: an integer
        tensor (N, or without a dimension), so that no GPU is waited for.
    """
    inverse_NII = torch.zeros_like(matrix_NII)
    infos: list[Tensor] = []
    _fill(matrix_NII, inverse_NII, GPU_BASE if matrix_NII.is_cuda else BASE, infos)
    return inverse_NII, torch.stack(infos).abs().amax(0)


def _fill(matrix_NII: Tensor, inverse_NII: Tensor, base: int, infos: list[Tensor]) -> None:
    size = matrix_NII.shape[-1]
    if size <= base:
        lower_NII, info_N = torch.linalg.cholesky_ex(matrix_NII)
        infos.append(info_N)
        eye_II = torch.eye(size, dtype=lower_NII.dtype, device=lower_NII.device)
        inverse_NII.copy_(torch.linalg.solve_triangular(lower_NII, eye_II, upper=False).tril_())
        return
    half = -(-size // (2 * base)) * base
    first_NII, second_NII = inverse_NII[..., :half, :half], inverse_NII[..., half:, half:]
    _fill(matrix_NII[..., :half, :half], first_NII, base, infos)
    lower = matrix_NII[..., half:, :half] @ first_NII.mT
    rest_NII = matrix_NII[..., half:, half:]
    (rest_NII.addmm_ if rest_NII.dim() == 2 else rest_NII.baddbmm_)(lower, lower.mT, alpha=-1)
    _fill(rest_NII, second_NII, base, infos)
    torch.matmul(second_NII, lower @ first_NII, out=inverse_NII[..., half:, :half]).neg_()


def square(inverse_NII: Tensor, out_NII: Tensor) -> None:
    """X^T X of lower triangles X, by halves: a third of the operations of a product. With X = L^-1 it is the inverse.

    Args:
        inverse_NII: not changed.
        out_NII: is written to, both triangles; may have any strides, but for the last.
    """
    size = inverse_NII.shape[-1]
    if size <= 2 * (GPU_BASE if inverse_NII.is_cuda else BASE):
        torch.bmm(inverse_NII.mT, inverse_NII, out=out_NII)
        return
    half = size // 2
    low_NII, second_NII = inverse_NII[:, half:, :half], inverse_NII[:, half:, half:]
    square(inverse_NII[:, :half, :half], out_NII[:, :half, :half])
    out_NII[:, :half, :half].baddbmm_(low_NII.mT, low_NII)
    square(second_NII, out_NII[:, half:, half:])
    torch.bmm(second_NII.mT, low_NII, out=out_NII[:, half:, :half])
    out_NII[:, :half, half:] = out_NII[:, half:, :half].mT
