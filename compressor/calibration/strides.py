"""Runs the network at some of a prompt's steps only: calls at the others are held, and get the last output again.

A sampler that moves along the network's output takes longer steps then, as if it had fewer of them: what is saved are
forwards, of which a calibration has more than its sums need.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from compressor.calibration.replay import calling
from compressor.recipe import Calibration as Options

STRIDE = 2
"""Where a recipe has none: it left as much error as 1 on the built-in pipelines."""

FEWEST = 10
"""Steps with which that was measured; with fewer, the network runs at each."""


def stride_of(options: Options, prompts: int, noisy: bool | None) -> int:
    """In how many steps the network runs once.

    Args:
        options: the recipe's, which decide if they have a stride.
        prompts: in all; where they are a single batch, no other could run at other steps.
        noisy: whether the scheduler adds noise, of which an output that is held knows nothing; None if that is unknown.
    """
    if options.stride is not None:
        return options.stride
    return STRIDE if options.steps >= FEWEST and prompts > options.batch and noisy is False else 1


def mean_runs(steps: int, stride: int) -> float:
    """At how many of a prompt's steps the network runs, over batches that begin their strides everywhere."""
    return 1 + (steps - 1) / stride


def first_runs(steps: int, stride: int) -> int:
    """At how many steps it runs in the first batch."""
    return 1 + (steps - 1) // stride


def all_runs(steps: int, stride: int, batches: int) -> int:
    """How often it runs in so many batches, where it is called once a step."""
    return sum(1 + sum(step % stride == batch % stride for step in range(1, steps)) for batch in range(batches))


class Strides:
    """Which calls of a batch the network runs.

    It runs at the first step, and then at every `stride`-th one, from batch to batch beginning one step later: in as
    many batches, it runs at each step. Where it runs because there is no output yet that could be held, which is so in
    every batch, the call counts for itself; elsewhere for as many steps as a stride has.

    Calls of a step are told apart by the shapes of their arguments, and by their order: some pipelines call once with
    the prompt and once without.

    Args:
        stride: in steps; with 1, every call runs.
        batch: prompts of each.

    Attributes:
        runs: whether the network runs the current call; else it is held.
        call: which one of its batch it is, by step and order.
        ran: calls that ran.
        held: calls that were held.
    """

    def __init__(self, stride: int, batch: int) -> None:
        self._stride, self._batch = stride, batch
        self.runs = True
        self.call: Hashable = None
        self.ran = self.held = 0
        self.next_batch(0)

    def next_batch(self, prompt: int) -> None:
        """Begins the batch with that first prompt, which decides at which steps it runs."""
        self._first = prompt // self._batch % self._stride
        self._step = -1
        self._calls: dict[tuple[torch.Size, ...], int] = {}
        self._begun: dict[Hashable, int] = {}
        self._outputs: dict[Hashable, Any] = {}

    def begin(self, step: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        """Begins a call with these arguments.

        Args:
            step: from 0.
            args: of the network's forward.
            kwargs: likewise.

        Returns:
            How many steps it stands for: 0 if it is held.
        """
        shapes = tuple(leaf.shape for leaf in _pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        if step != self._step:
            self._step = step
            self._calls.clear()
        self._calls[shapes] = self._calls.get(shapes, 0) + 1
        self._kind = shapes, self._calls[shapes]
        self.call = step, sum(self._calls.values())
        fresh = step == self._begun.setdefault(self._kind, step)
        self.runs = fresh or step % self._stride == self._first
        self.ran += self.runs
        self.held += not self.runs
        return 0 if not self.runs else 1 if fresh else self._stride

    def keep(self, output: Any) -> None:
        """Takes the output of a call that ran."""
        if self._stride > 1:
            self._outputs[self._kind] = _copy(output)

    def output(self) -> Any:
        """Of the last such call that ran, for one that is held."""
        return _copy(self._outputs[self._kind])


@contextmanager
def holding(network: nn.Module, strides: Strides) -> Iterator[None]:
    """While it lasts, calls that are held get the last output. Entered behind all else that wraps a forward.

    Args:
        network: whose hooks begin every call of `strides`.
        strides: which are held.
    """
    run: Callable[..., Any] = network.forward

    @functools.wraps(run)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if not strides.runs:
            return strides.output()
        result = run(*args, **kwargs)
        strides.keep(result)
        return result

    with calling(network, forward):
        yield


def _copy(output: Any) -> Any:
    """What a pipeline may change without changing it for others."""
    return _pytree.tree_map_only(Tensor, torch.clone, output)
