"""Draws the tokens of a forward whose moments are summed, where a share of them is to stand for all."""

# Shapes: B samples, T tokens of a sample, N tokens drawn of it, K = B N, I inputs.

from __future__ import annotations

import hashlib

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
        self._prompt = self._forward = 0
        self._places: dict[tuple[int, int, torch.device], Tensor] = {}
        self._current: set[tuple[int, int, torch.device]] = set()

    def next_batch(self, prompt: int) -> None:
        """From now on it is drawn for a batch that begins with that prompt: the same whatever was drawn before."""
        self._prompt, self._forward = prompt, 0

    def next_forward(self, refill: bool = False) -> None:
        """From now on other tokens are drawn.

        Args:
            refill: whether to draw at once for all inputs that there have been, into the tensors that they were given:
                a forward that is replayed does not ask.
        """
        self._forward += 1
        self._current.clear()
        if refill:
            for key, place_K in self._places.items():
                place_K.copy_(self._draw(*key[:2]), non_blocking=True)  # in order with the rest of a GPU's work
                self._current.add(key)

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
        drawn = self._drawn(tokens)
        if x.dim() < 3 or drawn >= tokens:
            return None, 1.0
        key = samples, tokens, x.device
        if key not in self._current:
            self._places[key] = self._draw(samples, tokens).to(x.device, non_blocking=True)
            self._current.add(key)
        return self._places[key], tokens / drawn

    def _drawn(self, tokens: int) -> int:
        return max(1, round(self._share * tokens))

    def _draw(self, samples: int, tokens: int) -> Tensor:
        """The same whatever else is drawn for this forward."""
        drawn = self._drawn(tokens)
        what = f"{self._seed} {self._prompt} {self._forward} {samples} {tokens}"
        seed = int.from_bytes(hashlib.sha256(what.encode()).digest()[:4], "big")  # it does not look at more bits
        generator = torch.Generator().manual_seed(seed)
        within_BN = torch.rand(samples, drawn, generator=generator, dtype=torch.float64)
        place_BN = ((torch.arange(drawn) + within_BN) * (tokens / drawn)).long().clamp_(max=tokens - 1)
        return (place_BN + tokens * torch.arange(samples)[:, None]).flatten()
