"""Runs the network at some of a prompt's steps only: between them its last output stands for it.

A sampler that moves along the network's output takes longer steps then, as if it had fewer of them: what is saved are
forwards, of which a calibration has more than its sums need.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from compressor.calibration.replay import calling

Shapes = tuple[torch.Size, ...]


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
    many batches, it runs at each step. Where it ran because there was nothing yet that could stand for it, which is so
    in every batch, the call counts for itself; elsewhere for as many steps as a stride has.

    Calls of a step are told apart by the shapes of their arguments, and by their order: some pipelines call once with
    the prompt and once without.

    Args:
        stride: in steps; with 1, every call runs.
        batch: prompts of each.

    Attributes:
        held: whether the current call is one for which an output stands.
        ran: calls that the network ran.
        stood: those for which an output stood.
    """

    def __init__(self, stride: int, batch: int) -> None:
        self._stride, self._batch = stride, batch
        self.held = False
        self.ran = self.stood = 0
        self.next_batch(0)

    def next_batch(self, prompt: int) -> None:
        """Begins the batch with that first prompt, which decides at which steps it runs."""
        self._first = prompt // self._batch % self._stride
        self._step = -1
        self._calls: dict[Shapes, int] = {}
        self._begun: dict[Shapes, int] = {}
        self._outputs: dict[Shapes, list[Any]] = {}

    def begin(self, step: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        """Begins a call with these arguments.

        Args:
            step: from 0.
            args: of the network's forward.
            kwargs: likewise.

        Returns:
            How many steps it stands for: 0 if it is held.
        """
        self._shapes = tuple(leaf.shape for leaf in _pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        if step != self._step:
            self._step = step
            self._calls.clear()
        self._call = self._calls.get(self._shapes, 0)
        self._calls[self._shapes] = self._call + 1
        fresh = step == self._begun.setdefault(self._shapes, step)
        self.held = not fresh and step % self._stride != self._first
        self.ran += not self.held
        self.stood += self.held
        return 0 if self.held else 1 if fresh else self._stride

    def keep(self, output: Any) -> None:
        """Takes the output of a call that ran."""
        if self._stride > 1:
            outputs = self._outputs.setdefault(self._shapes, [])
            outputs[self._call : self._call + 1] = [_copy(output)]

    def output(self) -> Any:
        """What stands for a call that is held: the last output of such a call."""
        outputs = self._outputs[self._shapes]
        return _copy(outputs[min(self._call, len(outputs) - 1)])


@contextmanager
def holding(network: nn.Module, strides: Strides) -> Iterator[None]:
    """While it lasts, calls that are held give what stands for them. Entered behind all else that wraps a forward.

    Args:
        network: whose hooks begin every call of `strides`.
        strides: which are held.
    """
    run: Callable[..., Any] = network.forward

    @functools.wraps(run)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if strides.held:
            return strides.output()
        result = run(*args, **kwargs)
        strides.keep(result)
        return result

    with calling(network, forward):
        yield


def _copy(output: Any) -> Any:
    """What a pipeline may change without changing it for others."""
    return _pytree.tree_map_only(Tensor, torch.clone, output)
