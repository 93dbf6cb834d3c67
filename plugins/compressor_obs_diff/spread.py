"""Spreads zeros over layers by what they do to the network's output.

A layer's harm is the squared error of the network's output that its zeros cause. With the second moment H of its inputs
and the mean squared gradients g_o of its outputs, removing the weight w_oi and letting the rest of its row make up for
it costs g_o w_oi^2 / (H^-1)_ii: the sum over the cheapest is the harm at the mean share of zeros. From there it is
taken to grow, in every layer alike, with the square of the odds s / (1 - s) of the layer's share s. The sum of all

    sum_l  h_l (odds(s_l) / odds(mean))^2

is convex, and least where one zero more would cost the same in every layer, or the layer is at a bound.
"""

# Shapes: O outputs, I inputs, L layers.

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compressor_obs_diff.layers import problems_of
from compressor_obs_diff.metric import diagonal

if TYPE_CHECKING:
    from compressor.calibration import Moments, Package
    from compressor_obs_diff import OBSDiff

POWER = 2.0
"""Of the odds. From 30 to 90 % the harm of ADMM's zeros grew so in two families, in all layers nearly alike."""
_HALVINGS = 64  # of an interval, until float64 has hardly a number between its ends


@dataclass(frozen=True)
class Part:
    """What is known of one layer before zeros are spread.

    Attributes:
        name: of the layer.
        harm: with `zeros` weights removed.
        weights: how many it has.
        zeros: as many as the mean share comes to.
        least: zeros that it is to be given, at least.
        most: and at most.
    """

    name: str
    harm: float
    weights: int
    zeros: int
    least: int
    most: int


@torch.no_grad()
def parts(options: OBSDiff, package: Package, moments: dict[str, Moments]) -> list[Part]:
    """The layers of a package, which its sparsity would harm so much.

    Args:
        options: sparsity, spread, granularity, refit and damping.
        package: the layers, grouped by the input they share.
        moments: by group, with gradients. Not changed.

    Raises:
        CompressorError: if a Hessian is zero or not finite, or cannot be factorised.
    """
    found = []
    for group in package.groups:
        gathered = moments[group.name]
        weight = gathered.weight.item()
        for target, problem, _ in problems_of(options, group, gathered):
            gradients = gathered.gradients[target.name]
            slope_O = diagonal(gradients.second_BKK) / weight  # H sums over tokens by what they count, G over all
            inverse_I = problem.factor.upper_II.square().sum(0)
            weight_OI = target.module.weight.detach().float()
            cost_OI = slope_O[:, None] * weight_OI.square() / inverse_I
            zeros = options.zeros(target)
            cheapest = cost_OI.flatten().sort().values[:zeros].sum(dtype=torch.float64).item()
            found.append(Part(target.name, cheapest, weight_OI.numel(), zeros, *options.bounds(target)))
    return found


def allocate(layers: Iterable[Part]) -> dict[str, int]:
    """How many zeros each layer is given, so that they harm the least.

    Args:
        layers: whose `zeros` add up to what is to be given, and lie between `least` and `most`. Where no zero harms,
            all that may be are made.

    Returns:
        Numbers by name, with the sum of all `zeros`.
    """
    layers = sorted(layers, key=lambda layer: layer.name)  # who found them decides nothing
    weights_L = torch.tensor([layer.weights for layer in layers], dtype=torch.float64)
    zeros_L = torch.tensor([layer.zeros for layer in layers], dtype=torch.float64)
    least_L = torch.tensor([layer.least for layer in layers], dtype=torch.float64)
    most_L = torch.tensor([layer.most for layer in layers], dtype=torch.float64)
    harm_L = torch.tensor([layer.harm for layer in layers], dtype=torch.float64)
    positive = harm_L[harm_L > 0]
    harm_L = harm_L.clamp(min=1e-12 * positive.max().item() if len(positive) else 1.0)
    # The logarithm of what one zero more would cost, up to a constant: harm / weights / odds(mean)^2 * d odds^2 / ds
    mean_L = zeros_L.clamp(min=0.5) / weights_L
    offset_L = harm_L.log() - weights_L.log() - POWER * (mean_L.log() - (-mean_L).log1p())

    def given(price: float) -> Tensor:
        low_L, high_L = least_L / weights_L, most_L / weights_L
        for _ in range(_HALVINGS):
            share_L = (low_L + high_L) / 2
            dear_L = offset_L + _slope(share_L) > price
            low_L, high_L = torch.where(dear_L, low_L, share_L), torch.where(dear_L, share_L, high_L)
        return (high_L * weights_L).clamp(least_L, most_L)

    total = int(zeros_L.sum())
    low, high = -1e3, 1e3
    for _ in range(_HALVINGS):
        price = (low + high) / 2
        low, high = (price, high) if given(price).sum() < total else (low, price)
    exact_L = given(high)
    whole_L = exact_L.floor()
    missing = total - int(whole_L.sum())
    for layer in (exact_L - whole_L).argsort(descending=True, stable=True).tolist() * len(layers):
        step = (missing > 0) - (missing < 0)
        if not step:
            break
        if least_L[layer] <= whole_L[layer] + step <= most_L[layer]:
            whole_L[layer] += step
            missing -= step
    assert int(whole_L.sum()) == total
    return {layer.name: int(zeros) for layer, zeros in zip(layers, whole_L, strict=True)}


def _slope(share_L: Tensor) -> Tensor:
    """The logarithm of the derivative of odds^POWER, up to a constant."""
    return (POWER - 1) * share_L.log() - (POWER + 1) * (-share_L).log1p()
