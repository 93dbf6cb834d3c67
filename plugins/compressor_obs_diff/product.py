"""Products of float32 matrices by the tensor cores of a GPU: each number as the sum of two in half precision.

With X = X1 + X2 and Y = Y1 + Y2, the first of each pair rounded to float16 and the second what rounding took,

    X Y = [X1, X2, X1] [Y1; Y1; Y2],

summed in float32, but for X2 Y2, a four-millionth of it. Rows of X and columns of Y are first multiplied by powers of
two that leave their largest numbers just below 2^14, so that no number overflows, and none is lost that is not 2^38
times smaller. Elsewhere they are multiplied as they are.
"""

# Shapes: N problems; O x I times I x J.

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.calibration import kernels

LEAST = 512
"""Terms of a sum, at the least, for the products to be worth taking apart."""
LARGEST = 14
"""Numbers are brought below two to this power; sums of products then stay far below what float32 holds."""


@dataclass(frozen=True)
class Parts:
    """A factor of a product.

    Attributes:
        parts: the matrices themselves, or, along the dimension that is summed over, their halves in float16.
        scale: by what a product with the halves is to be multiplied; broadcasts over the matrix. None without halves.
    """

    parts: Tensor
    scale: Tensor | None

    def rows(self, problem: int, first: int, last: int) -> Parts:
        """Some rows of the left factor of one problem, still with a dimension for the problem."""
        place = slice(problem, problem + 1), slice(first, last)
        return Parts(self.parts[place], None if self.scale is None else self.scale[place])

    def of(self, problem: int) -> Parts:
        """A right factor of one problem, still with a dimension for it."""
        place = slice(problem, problem + 1)
        return Parts(self.parts[place], None if self.scale is None else self.scale[place])


def left(x_NOI: Tensor, *, fixed: bool = False) -> Parts:
    """The left factor of products.

    Args:
        x_NOI: finite; not changed.
        fixed: many will be multiplied by it: all of a matrix gets one scale, which is cheaper.
    """
    return _take_apart(x_NOI, -1, (-2, -1) if fixed else (-1,), (0, 2))


def right(x_NIJ: Tensor, *, fixed: bool = False) -> Parts:
    """The right factor of products; as `left`."""
    return _take_apart(x_NIJ, -2, (-2, -1) if fixed else (-2,), (0, 1))


def multiply(x: Parts, y: Parts) -> Tensor:
    """X Y (N x O x J)."""
    if x.scale is None or y.scale is None:
        return x.parts @ y.parts
    if x.parts.is_cuda:
        product_NOJ = torch.bmm(x.parts, y.parts, out_dtype=torch.float32)
    else:  # nothing but tests comes here
        product_NOJ = x.parts.float() @ y.parts.float()
    return product_NOJ.mul_(x.scale * y.scale)


def worthwhile(x: Tensor, terms: int) -> bool:
    """Whether to take a factor apart for sums of so many terms."""
    return x.is_cuda and x.dtype == torch.float32 and terms >= LEAST


def _take_apart(x: Tensor, dim: int, together: tuple[int, ...], first_at: tuple[int, int]) -> Parts:
    terms = x.shape[dim]
    if not worthwhile(x, terms):
        return Parts(x, None)
    if together == (dim,) and kernels.usable(x.device):  # each line has a scale of its own
        from compressor_obs_diff import halves_kernel

        return Parts(*halves_kernel.take_apart(x, dim, 3 - sum(first_at), LARGEST))
    exponent = torch.linalg.vector_norm(x, torch.inf, together, keepdim=True).frexp().exponent.clamp(min=-100)
    power = (LARGEST - exponent).float().exp2()
    shape = list(x.shape)
    shape[dim] = 3 * terms
    parts = torch.empty(shape, dtype=torch.float16, device=x.device)
    places = [parts.narrow(dim, third * terms, terms) for third in range(3)]
    scaled = x * power
    for third in first_at:
        places[third].copy_(scaled)
    scaled.sub_(places[0])
    places[3 - sum(first_at)].copy_(scaled)
    return Parts(parts, power.reciprocal())
