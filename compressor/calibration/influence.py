"""How much each token counts in the second moments of a layer's inputs and of the gradients at its outputs.

An error D x of a token's output moves the network's output by J D x: the squared error is the sum over tokens of
(g^T D x)^2, with g = J^T e the gradient of a random projection. As one product of two second moments, tr G D H D^T, it
is told best if each has in it what the other leaves out: the inputs' weighted by |g|^2, the gradients' by |x|^2. That
is one step from the identity towards the nearest Kronecker product (Van Loan and Pitsianis, "Approximation with
Kronecker Products", 1993). Tokens that hardly matter, as those of a plain background, then hardly count.

The product's size is another matter: with H a sum in which tokens count |g|^2, and G one over all tokens whose trace is
that of plain sums, tr G D (H / weight) D^T is in units of the network's error, in which layers compare.
"""

# Shapes: T tokens, I inputs, O outputs.

from __future__ import annotations

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
        inputs_T: the roots of what each counts in the inputs' moments, float32, at most 1: inputs may be large.
        inputs: what a root of 1 counts, float64 without dimensions.
        gradients_T: the roots of what each counts in the gradients' moments, 1 on average: gradients may be small.
        gradients_L: what a root of 1 counts for each layer, float64; so that the sum of the gradients' squares is as if
            all tokens counted the same.
    """

    inputs_T: Tensor
    inputs: Tensor
    gradients_T: Tensor
    gradients_L: Tensor


def of(x: Tensor, squares_LT: Tensor, outputs: int) -> Influence:
    """Weighs the tokens of one call, without waiting for a GPU.

    Args:
        x: the input, ... x I.
        squares_LT: of the gradients at the outputs of the layers that read it, as `squares` gives them.
        outputs: of all these layers.
    """
    inputs_T = squares_LT.sum(0) / outputs
    mean = inputs_T.mean()
    # where the network's output does not depend on any of them, all tokens count the same
    inputs_T = torch.where(mean > 0, (1 - EVEN) * inputs_T + EVEN * mean, 1)
    gradients_T = squares(x)
    means_L = (squares_LT @ gradients_T) / squares_LT.sum(1)
    means_L = torch.where(means_L > 0, means_L, 1)  # of gradients, or inputs, that are all zero
    most, average = inputs_T.amax(), gradients_T.mean()
    return Influence(
        _roots(inputs_T, most), most.double(), _roots(gradients_T, average), average.double() / means_L.double()
    )


def _roots(counts_T: Tensor, unit: Tensor) -> Tensor:
    return torch.where(unit > 0, counts_T / unit, 1).sqrt()


def squares(x: Tensor) -> Tensor:
    """The sum of the squares of each token of ... x I, float32; zero where it is not finite."""
    norm_T = torch.linalg.vector_norm(x.reshape(-1, x.shape[-1]), dim=1, dtype=torch.float32)
    return norm_T.square().nan_to_num(nan=0, posinf=0)
