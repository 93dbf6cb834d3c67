"""What ADMM and the refit minimise, of several problems at once: the squared error of outputs in a metric.

An error D of the weights costs tr G D H D^T, with H the second moment of the inputs and G a metric of the outputs, the
identity if none is given. In units in which H and G have diagonals of ones, A = d^-1/2 H d^-1/2, K = e^-1/2 G e^-1/2
and B = e^1/2 W d^1/2, it is tr K B A B^T, whose gradient by B is K B A (times two).
"""

# Shapes: N problems of O outputs and I inputs; B blocks of K outputs.

from __future__ import annotations

from torch import Tensor

from compressor_obs_diff import product


class Quadratic:
    """The form for N problems.

    Attributes:
        gram_NII: A.
        metric_NBKK: K, in blocks along its diagonal; None for the identity.
    """

    def __init__(self, hessian_NII: Tensor, metric_NBKK: Tensor | None = None) -> None:
        """Brings both into their units.

        Args:
            hessian_NII: damped, symmetric, positive definite, float32 or float64. Changed: becomes A.
            metric_NBKK: G, likewise, of the same dtype. Changed: becomes K.
        """
        self._inputs_N1I = _scale(hessian_NII)[:, None]
        self.gram_NII = hessian_NII
        self._by_gram = product.right(self.gram_NII, fixed=True)
        self.metric_NBKK = metric_NBKK
        if metric_NBKK is not None:
            self._outputs_NO1 = _scale(metric_NBKK).flatten(1)[..., None]
            self._by_metric = product.left(metric_NBKK.flatten(0, 1), fixed=True)

    def scaled(self, weight_NOI: Tensor) -> Tensor:
        """B of weights, in new memory."""
        b_NOI = weight_NOI * self._inputs_N1I
        return b_NOI if self.metric_NBKK is None else b_NOI.mul_(self._outputs_NO1)

    def unscaled(self, b_NOI: Tensor) -> Tensor:
        """The weights, in new memory."""
        weight_NOI = b_NOI / self._inputs_N1I
        return weight_NOI if self.metric_NBKK is None else weight_NOI.div_(self._outputs_NO1)

    def times(self, b_NOI: Tensor) -> Tensor:
        """K B A, in new memory."""
        product_NOI = product.multiply(product.left(b_NOI), self._by_gram)
        return product_NOI if self.metric_NBKK is None else blockwise(self._by_metric, product_NOI)

    def independent(self, b_NOI: Tensor) -> Tensor:
        """A view, N x S x E, of the S parts that do not depend on one another: rows, or blocks of a metric."""
        parts = b_NOI.shape[1] if self.metric_NBKK is None else self.metric_NBKK.shape[1]
        return b_NOI.view(len(b_NOI), parts, -1)


def blockwise(blocks: product.Parts, x_NOI: Tensor) -> Tensor:
    """Blocks along the diagonal of every problem, in a row (N B x K x K), times X (N x O x I)."""
    x_BKI = x_NOI.reshape(len(blocks.parts), -1, x_NOI.shape[-1])
    return product.multiply(blocks, product.right(x_BKI)).view(x_NOI.shape)


def _scale(matrix: Tensor) -> Tensor:
    """Divides in place by the roots of the diagonal, and gives these."""
    scale = matrix.diagonal(dim1=-2, dim2=-1).sqrt()
    matrix.div_(scale[..., :, None]).div_(scale[..., None, :])
    return scale
