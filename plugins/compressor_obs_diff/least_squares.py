"""The best weights on a given mask: exact least squares, all rows at once.

With the mask fixed, each row w of a layer has a problem of its own, min (w - w0) H (w - w0)^T with w = 0 where the mask
says so. Its solution is H_KK^-1 (H w0)_K on the kept columns K, another K in every row. Conjugate gradients solve all
rows together with one product by H a step, as proposed for pruning by Meng et al., "ALPS" (NeurIPS 2024). With a
metric G of the outputs, tr G (W' - W) H (W' - W)^T, the rows depend on one another: a step is a product by H and by G.
"""

# Shapes: O outputs, I inputs; B blocks of K outputs.

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compressor_obs_diff.metric import diagonal, times

TOLERANCE = 1e-5
"""Of a row's residual, relative to its right-hand side."""
GAIN = 1e-5
"""Of the error that is left: ten steps that take less off it are the last, on `builtin:shapes` the 30th to the 80th."""
MOST_STEPS = 500


@dataclass(frozen=True)
class Fitted:
    """Weights on a mask.

    Attributes:
        weight_OI: zero where the mask says so.
        residual: the largest of any row (with G, of all together), relative to its right-hand side; above `TOLERANCE`
            only after the most steps, or where ten more would take less than `GAIN` off the error.
        steps: products by the Hessian.
    """

    weight_OI: Tensor
    residual: float
    steps: int


def fit(
    weight_OI: Tensor,
    hessian_II: Tensor,
    removed_OI: Tensor,
    start_OI: Tensor | None = None,
    metric_BKK: Tensor | None = None,
    most: int = MOST_STEPS,
) -> Fitted:
    """Fits the weights that are left to the dense layer's outputs.

    Args:
        weight_OI: the dense weights, float32 or float64. Not changed.
        hessian_II: damped, symmetric, positive definite, of the same dtype. Not changed.
        removed_OI: True where a weight is to be zero.
        start_OI: weights to begin from, zero where `removed_OI`; the dense ones on the mask if none.
        metric_BKK: G, in blocks along its diagonal, damped, symmetric, positive definite, of the same dtype; the
            identity if none. Not changed.
        most: steps, at the most.

    Returns:
        Never a larger error than that of the start: in any row, or with G in all together.
    """

    def product(x_OI: Tensor) -> Tensor:
        x_OI = x_OI @ hessian_II
        return (x_OI if metric_BKK is None else times(metric_BKK, x_OI)).masked_fill_(removed_OI, 0)

    def dot(a_OI: Tensor, b_OI: Tensor) -> Tensor:
        products_O = (a_OI * b_OI).sum(1)
        return products_O if metric_BKK is None else products_O.sum().expand_as(products_O)

    def shared(of_rows_O: Tensor) -> Tensor:
        """The sum over all rows; with G, each has that of all of them already."""
        return of_rows_O.sum(dtype=torch.float64) if metric_BKK is None else of_rows_O[0].double()

    diagonal_OI = hessian_II.diagonal().expand_as(weight_OI)
    if metric_BKK is not None:
        diagonal_OI = torch.outer(diagonal(metric_BKK), hessian_II.diagonal())
    wanted_OI = product(weight_OI)
    norm_O = dot(wanted_OI, wanted_OI).sqrt().clamp(min=torch.finfo(wanted_OI.dtype).tiny)
    x_OI = (weight_OI if start_OI is None else start_OI).masked_fill(removed_OI, 0)
    residual_OI = wanted_OI - product(x_OI)
    scaled_OI = residual_OI / diagonal_OI
    direction_OI = scaled_OI.clone()
    rho_O = dot(residual_OI, scaled_OI)
    worst = (dot(residual_OI, residual_OI).sqrt() / norm_O).max().item()
    off_OI = x_OI - weight_OI
    heavy_OI = off_OI @ hessian_II
    heavy_OI = heavy_OI if metric_BKK is None else times(metric_BKK, heavy_OI)
    error = (off_OI * heavy_OI).sum(dtype=torch.float64)
    before = error
    del off_OI, heavy_OI
    steps = 0
    while worst > TOLERANCE and steps < most:
        product_OI = product(direction_OI)
        curvature_O = dot(direction_OI, product_OI)
        # a row that has arrived stands still
        alpha_O = torch.where(curvature_O > 0, rho_O / curvature_O, 0)
        x_OI += alpha_O[:, None] * direction_OI
        residual_OI -= alpha_O[:, None] * product_OI
        error = error - shared(alpha_O * rho_O)  # what the step takes off it
        scaled_OI = residual_OI / diagonal_OI
        next_O = dot(residual_OI, scaled_OI)
        beta_O = torch.where(rho_O > 0, next_O / rho_O, 0)
        direction_OI = scaled_OI + beta_O[:, None] * direction_OI
        rho_O = next_O
        steps += 1
        if steps % 10 == 0:  # looking at it waits for the GPU
            worst = (dot(residual_OI, residual_OI).sqrt() / norm_O).max().item()
            if before - error < GAIN * error:
                break
            before = error
    return Fitted(x_OI, worst, steps)
