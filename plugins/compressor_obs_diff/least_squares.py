"""The best weights on a given mask: exact least squares, all rows of several problems at once.

With the mask fixed, each row w of a layer has a problem of its own, min (w - w0) H (w - w0)^T with w = 0 where the mask
says so. Its solution is H_KK^-1 (H w0)_K on the kept columns K, another K in every row. Conjugate gradients solve all
rows together with one product by H a step, as proposed for pruning by Meng et al., "ALPS" (NeurIPS 2024). With a
metric G of the outputs, tr G (W' - W) H (W' - W)^T, the rows depend on one another: a step is a product by H and by G.
In the units of `Quadratic` no step needs to be preconditioned by the diagonals.
"""

# Shapes: N problems of O outputs and I inputs; S parts of each that do not depend on one another, of E numbers.

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compressor_obs_diff.quadratic import Quadratic

TOLERANCE = 1e-5
"""Of the residual of a part, relative to its right-hand side."""
GAIN = 1e-5
"""Of the error that is left: ten steps that take less off it are the last, on `builtin:shapes` the 30th to the 80th."""
LOOK = 10
"""Steps from one look at these to the next, each of which waits for a GPU."""
MOST_STEPS, COUPLED_STEPS = 500, 50
"""Without a metric; and with one, where ADMM leaves little to do."""


@dataclass(frozen=True)
class Fitted:
    """Weights on a mask.

    Attributes:
        weight_NOI: zero where the mask says so.
        residual: the largest of any row (with G, of any block of outputs), relative to its right-hand side; above
            `TOLERANCE` only after the most steps, or where ten more would take less than `GAIN` off every error.
        steps: products by the Hessian.
    """

    weight_NOI: Tensor
    residual: float
    steps: int


def fit(
    weight_NOI: Tensor,
    quadratic: Quadratic,
    removed_NOI: Tensor,
    start_NOI: Tensor | None = None,
    most: int | None = None,
) -> Fitted:
    """Fits the weights that are left to the dense layers' outputs.

    Args:
        weight_NOI: the dense weights, float32 or float64. Not changed.
        quadratic: H and G.
        removed_NOI: True where a weight is to be zero.
        start_NOI: weights to begin from, zero where `removed_NOI`; the dense ones on the mask if none.
        most: steps, at the most; if none as many as are meant for that.

    Returns:
        Never a larger error than that of the start: in any row, or with G in any block.
    """

    def dot(a_NOI: Tensor, b_NOI: Tensor) -> Tensor:
        return quadratic.independent(a_NOI * b_NOI).sum(2, keepdim=True)

    if most is None:
        most = MOST_STEPS if quadratic.metric_NBKK is None else COUPLED_STEPS
    b_NOI = quadratic.scaled(weight_NOI if start_NOI is None else start_NOI).masked_fill_(removed_NOI, 0)
    off_NOI = quadratic.scaled(weight_NOI).sub_(b_NOI)
    residual_NOI = quadratic.times(off_NOI)
    before_N = (off_NOI * residual_NOI).sum((1, 2), dtype=torch.float64)
    error_N = before_N.clone()
    residual_NOI.masked_fill_(removed_NOI, 0)
    dense_NOI = off_NOI.add_(b_NOI)
    wanted_NOI = quadratic.times(dense_NOI).masked_fill_(removed_NOI, 0)
    norm_NS1 = dot(wanted_NOI, wanted_NOI).sqrt().clamp(min=torch.finfo(wanted_NOI.dtype).tiny)
    del off_NOI, dense_NOI, wanted_NOI
    direction_NOI = residual_NOI.clone()
    rho_NS1 = dot(residual_NOI, residual_NOI)
    b_NSE, residual_NSE, direction_NSE = map(quadratic.independent, (b_NOI, residual_NOI, direction_NOI))
    steps, going_N11 = 0, torch.ones_like(before_N, dtype=torch.bool)[:, None, None]
    while True:
        if steps % LOOK == 0 or steps == most:
            worst_N = (rho_NS1.sqrt() / norm_NS1).amax((1, 2))
            arrived_N = worst_N <= TOLERANCE
            if steps:
                arrived_N |= before_N - error_N < GAIN * error_N
            before_N, going_N11 = error_N, ~arrived_N[:, None, None]
            ended, worst = torch.stack([arrived_N.all().to(worst_N.dtype), worst_N.max()]).tolist()
            if ended or steps == most:
                return Fitted(quadratic.unscaled(b_NOI), worst, steps)
        product_NOI = quadratic.times(direction_NOI).masked_fill_(removed_NOI, 0)
        curvature_NS1 = dot(direction_NOI, product_NOI)
        # a part that has arrived stands still, and so does a problem, whatever others are solved with it
        alpha_NS1 = torch.where(going_N11 & (curvature_NS1 > 0), rho_NS1 / curvature_NS1, 0)
        b_NSE.addcmul_(alpha_NS1, direction_NSE)
        residual_NSE.addcmul_(alpha_NS1, quadratic.independent(product_NOI), value=-1)
        error_N = error_N - (alpha_NS1 * rho_NS1).sum((1, 2), dtype=torch.float64)  # what the step takes off it
        next_NS1 = dot(residual_NOI, residual_NOI)
        direction_NSE.mul_(torch.where(rho_NS1 > 0, next_NS1 / rho_NS1, 0)).add_(residual_NSE)
        rho_NS1 = next_NS1
        steps += 1
