"""Draws the network's calls whose inputs are summed, where a share of them is to stand for all."""

from __future__ import annotations

import random


class Calls:
    """One call of every stretch of 1 / share calls of a batch, at random within it: some pipelines call twice a step.

    From batch to batch it moves on by one, round the stretch, so that in 1 / share batches, where that is whole, every
    call is drawn once. Where batches run at different steps, that is so of those that run at the same ones. Whatever a
    batch's number of calls, each is drawn with the same chance, and where drawn stands for one over that.

    Args:
        share: of the calls, above 0; with 1 all are drawn.
        seed: decides which are drawn of all batches.
        steps: the fewest calls of a batch. In the first batch the share is at least 1 / steps, so that one is drawn.
        batch: prompts of each.
        stride: batches after which one runs at the same steps again, as `Strides` says.
    """

    def __init__(self, share: float, seed: int, steps: int, batch: int, stride: int = 1) -> None:
        self._share = share
        self._seed = seed
        self._steps = steps
        self._round = batch * stride
        self.next_batch(0)

    def next_batch(self, prompt: int) -> None:
        """From now on it is drawn for a batch that begins with that prompt: the same whatever was drawn before."""
        self._random = random.Random(f"calls {self._seed}")
        self._moved = prompt // self._round * self._share
        self._chance = self._share if prompt else max(self._share, 1 / self._steps)
        self._call = self._stretch = 0
        self._next = self._draw()

    def next_call(self) -> float:
        """Begins a call of the batch.

        Returns:
            How many calls it stands for: 0 if it was not drawn, else 1 / share, or twice that where it lies in two
            stretches and was drawn of both.
        """
        drawn = 0
        while self._next == self._call:
            drawn += 1
            self._next = self._draw()
        self._call += 1
        return drawn / self._chance

    def _draw(self) -> int:
        """Which call, of the next stretch."""
        within = (self._random.random() + self._moved) % 1
        place = int((self._stretch + within) / self._chance)
        self._stretch += 1
        return place
