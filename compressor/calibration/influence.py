"""How much each token counts in the second moments of a layer's inputs and of the gradients at its outputs.

An error D x of a token's output moves the network's output by J D x: the squared error is the sum over tokens of
(g^T D x)^2, with g = J^T e the gradient of a random projection. As one product of two second moments, tr G D H D^T, it
is told best if each has in it what the other leaves out: the inputs' weighted by |g|^2, the gradients' by |x|^2. That
is one step from the identity towards the nearest Kronecker product (Van Loan and Pitsianis, "Approximation with
Kronecker Products", 1993). Tokens that hardly matter, as those of a plain background, then hardly count.
"""

# Shapes: T tokens, I inputs, O outputs.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

EVEN = 0.25
"""Of what a call's inputs count, the share that all its tokens have alike: |g|^2 is that of one random projection, and
where a token counts nothing, nothing holds its error back. Without it some captions were lost on the built-in U-Net."""


@dataclass(frozen=True)
class Influence:
    """Of the tokens of one call, for the layers that read one input.

    Attributes:
        inputs_T: what each counts in the inputs' moments, float32.
        gradients_T: what each counts in those of the gradients: |x|^2, zero where that is not finite.
        most_2: the largest of both, float32.
        means_L: for each layer, what gradients count on average, each by its square: what to divide by, so that the sum
            of their squares stays the same.
    """

    inputs_T: Tensor
    gradients_T: Tensor
    most_2: Tensor
    means_L: Tensor


def of(x: Tensor, gradients: Sequence[Tensor]) -> Influence:
    """Weighs the tokens of one call.

    Args:
        x: the input, ... x I.
        gradients: at the outputs of the layers that read it, ... x O each.
    """
    squares_LT = torch.stack([_squares(gradient) for gradient in gradients])
    inputs_T = squares_LT.sum(0) / sum(gradient.shape[-1] for gradient in gradients)
    mean = inputs_T.mean()
    # where the network's output does not depend on any of them, all tokens count the same
    inputs_T = torch.where(mean > 0, (1 - EVEN) * inputs_T + EVEN * mean, 1)
    gradients_T = _squares(x)
    means_L = (squares_LT @ gradients_T) / squares_LT.sum(1)
    means_L = torch.where(means_L > 0, means_L, 1)  # of gradients, or inputs, that are all zero
    return Influence(inputs_T, gradients_T, torch.stack([inputs_T.amax(), gradients_T.amax()]), means_L)


def _squares(x: Tensor) -> Tensor:
    """The sum of each token's squares; zero where it is not finite."""
    norm_T = torch.linalg.vector_norm(x.reshape(-1, x.shape[-1]), dim=1, dtype=torch.float32)
    return norm_T.square().nan_to_num(nan=0, posinf=0)
