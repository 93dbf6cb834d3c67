"""What errors of a layer's outputs do to the network's output: a metric, in blocks along its diagonal."""

# Shapes: B blocks of K outputs, O = B K outputs, I inputs.

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from compressor.calibration import Gradients

DAMPING = 0.3
"""Added to the diagonal, relative to its mean. From 0.1 to 1, one forward's error differed by less than a fifth on the
built-in pipelines.
"""

INDEPENDENT = "the network's output does not depend on it: its own outputs' error was minimised"
"""A note for a layer whose gradients are all zero, where the network's output is the objective."""


def metrics_of(second_NBKK: Tensor, layers: int) -> tuple[Tensor, Tensor]:
    """The damped means of g g^T, each layer's in units of its mean diagonal.

    Args:
        second_NBKK: the sums, of so many layers of each of N problems, in a row. Not changed.
        layers: of a problem, each with as many blocks.

    Returns:
        The metrics (N x B x K x K), and for which layers there is one (N x layers): where all gradients are zero, or
        some are not finite, all outputs count the same.
    """
    blocks = second_NBKK.shape[1] // layers
    mean_NL = second_NBKK.diagonal(dim1=2, dim2=3).unflatten(1, (layers, blocks)).mean((2, 3))
    known_NL = mean_NL.isfinite() & (mean_NL > 0)
    mean_NB11, known_NB11 = (each_NL.repeat_interleave(blocks, 1)[..., None, None] for each_NL in (mean_NL, known_NL))
    metric_NBKK = torch.where(known_NB11, second_NBKK / mean_NB11, 0)
    metric_NBKK.diagonal(dim1=2, dim2=3).add_(DAMPING)
    return metric_NBKK, known_NL


def metric_of(gradients: Gradients) -> Tensor | None:
    """The damped mean of g g^T (B x K x K), in units of its mean diagonal; None where all are zero or not finite."""
    metric_NBKK, known_NL = metrics_of(gradients.second_BKK[None], 1)
    return metric_NBKK[0] if known_NL.item() else None


def slopes_of(gradients: Gradients, weight: Tensor) -> Tensor | None:
    """The same in units of the network's output, which layers have in common, for the second moment of their inputs.

    Args:
        gradients: summed over all tokens.
        weight: what the tokens count together in the inputs' second moment, which has its layer's gradients in it.
    """
    metric_BKK = metric_of(gradients)
    if metric_BKK is None:
        return None
    return metric_BKK * (gradients.second_BKK.diagonal(dim1=1, dim2=2).mean() / weight)


def diagonal(metric_BKK: Tensor) -> Tensor:
    """Its O elements."""
    return metric_BKK.diagonal(dim1=1, dim2=2).reshape(-1)


def times(metric_BKK: Tensor, x_OI: Tensor) -> Tensor:
    """The product, O x I."""
    blocks, width, _ = metric_BKK.shape
    return (metric_BKK @ x_OI.reshape(blocks, width, -1)).reshape(x_OI.shape)
