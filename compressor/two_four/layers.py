"""Linears with 2:4 weights: which ones a network has, and the layer that runs them sparse where that is faster."""

# Shapes: O outputs, I inputs.

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from compressor.sparsity import holds
from compressor.structure import Family, find_targets
from compressor.two_four import product
from compressor.two_four.product import Algorithm

Decide = Callable[[int, int, int, bool], Algorithm | None]
"""The kernel for tokens, inputs, outputs and a bias or none; None if the dense product is as fast."""


class TwoFourLinear(nn.Linear):
    """A linear with a 2:4 weight that takes the sparse product for those numbers of tokens for which it is faster.

    The dense weight is kept for all others.

    Attributes:
        packed: the weight as cuSPARSELt takes it; None until a kernel is given.
        algorithms: the kernel by number of tokens.
    """

    packed: Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.register_buffer("packed", None, persistent=False)
        self.algorithms: dict[int, Algorithm] = {}

    def take(self, tokens: int, algorithm: Algorithm) -> None:
        """From now on runs so many tokens by the sparse product."""
        if self.packed is None:
            self.packed = product.pack(self.weight.data)
        self.algorithms[tokens] = algorithm

    def forward(self, input: Tensor) -> Tensor:
        """As the linear."""
        algorithm = self.algorithms.get(input.numel() // self.in_features)
        if algorithm is None:
            return functional.linear(input, self.weight, self.bias)
        assert self.packed is not None
        return cast(
            Tensor,
            product.linear(input, self.packed, self.bias, self.out_features, algorithm[0], algorithm[1], algorithm[2]),
        )


@torch.no_grad()
def find(network: nn.Module, family: Family) -> dict[str, nn.Linear]:
    """The linears, by name, whose weights are 2:4: at most 2 of every 4 inputs, and not merely all zero."""
    found: dict[str, nn.Linear] = {}
    for target in find_targets(network, family):
        weight_OI = target.module.weight
        if target.inputs % 4 == 0 and bool(weight_OI.any()) and holds(weight_OI, 2, 4):
            found[target.name] = target.module
    return found


def replace(network: nn.Module, names: Iterable[str]) -> dict[str, TwoFourLinear]:
    """Puts a `TwoFourLinear` in the place of each of these linears; without a kernel it computes as before."""
    placed: dict[str, TwoFourLinear] = {}
    for name in names:
        parent, _, own = name.rpartition(".")
        layer = TwoFourLinear(cast(nn.Linear, network.get_submodule(name)))
        setattr(network.get_submodule(parent), own, layer)
        placed[name] = layer
    return placed


def observe(layers: dict[str, TwoFourLinear], forward: Callable[[], object]) -> dict[str, int]:
    """Runs a forward and tells how many tokens each layer was given."""
    seen: dict[str, int] = {}

    def remember(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[name] = args[0].numel() // cast(TwoFourLinear, module).in_features

        return hook

    handles = [layer.register_forward_pre_hook(remember(name)) for name, layer in layers.items()]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    return seen


def decide_all(layers: dict[str, TwoFourLinear], seen: dict[str, int], decide: Decide) -> dict[str, str]:
    """Gives every layer the kernel for the tokens that it saw, where there is one that is faster.

    Args:
        layers: by name.
        seen: how many tokens each was given.
        decide: asked once for each layer.

    Returns:
        The shapes, in words, of the layers that run sparse now, by name.
    """
    sparse: dict[str, str] = {}
    for name, tokens in seen.items():
        layer = layers[name]
        algorithm = decide(tokens, layer.in_features, layer.out_features, layer.bias is not None)
        if algorithm is not None:
            layer.take(tokens, algorithm)
            sparse[name] = f"{tokens} x {layer.in_features} x {layer.out_features}"
    return sparse
