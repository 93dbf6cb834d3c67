"""Draws the tokens of a forward whose moments are summed, where a share of them is to stand for all."""

# Shapes: B samples, T tokens of a sample, N tokens drawn of it, K = B N, I inputs.

from __future__ import annotations

import torch
from torch import Tensor


class Tokens:
    """One token of every stretch of 1 / share tokens, in each sample another; all inputs of a length get the same.

    Args:
        share: of the tokens, above 0; with 1 nothing is drawn.
        seed: decides what is drawn in all forwards.
    """

    def __init__(self, share: float, seed: int) -> None:
        self._share = share
        self._seed = seed
        self._generator = torch.Generator().manual_seed(seed)
        self._places: dict[tuple[int, int], Tensor] = {}

    def next_batch(self, prompt: int) -> None:
        """From now on it is drawn for a batch that begins with that prompt: the same whatever was drawn before."""
        self._generator.manual_seed((self._seed + prompt) % 2**32)

    def next_forward(self) -> None:
        """From now on other tokens are drawn."""
        self._places.clear()

    def draw(self, x: Tensor) -> tuple[Tensor | None, float]:
        """Some of an input's tokens, and how many tokens each of them stands for.

        Sums over them, times that number, have the sums over all as their expectation.

        Args:
            x: B x ... x I; the axes between are a sample's tokens. Not changed.

        Returns:
            The drawn tokens' places among those of all samples, K, and T / N; None and 1 where all tokens are taken. N
            is the whole number nearest to the share of T, at least 1.
        """
        samples = x.shape[0]
        tokens = x.shape[:-1].numel() // max(samples, 1)
        drawn = max(1, round(self._share * tokens))
        if x.dim() < 3 or drawn >= tokens:
            return None, 1.0
        place_K = self._places.get((samples, tokens))
        if place_K is None:
            within_BN = torch.rand(samples, drawn, generator=self._generator, dtype=torch.float64)
            place_BN = ((torch.arange(drawn) + within_BN) * (tokens / drawn)).long().clamp_(max=tokens - 1)
            place_K = (place_BN + tokens * torch.arange(samples)[:, None]).flatten()
            place_K = place_K.to(x.device, non_blocking=True)  # in order with the rest of a GPU's work, not waited for
            self._places[samples, tokens] = place_K
        return place_K, tokens / drawn
