"""Differentiates some of the network's calls, which tells how its output depends on its layers' outputs.

With e ~ N(0, 1) for every element of the network's output and g the gradient of <e, output> at one token of a layer's
output, E[g g^T] is what an error of that token does to the squared error of the network's output, to first order: the
Gauss-Newton matrix, one of the two factors of K-FAC (Martens and Grosse, "Optimizing Neural Networks with
Kronecker-factored Approximate Curvature", ICML 2015). Outputs of different blocks are taken to be independent.

Every call counts the same: its g g^T are divided by the mean of g^2 over all its layers. Without that the calls with
the largest gradients decide: in the built-in Flux pipeline those of the last steps, where gradients are five times as
large as in the first.
"""

# Shapes: O outputs.

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree

from compressor.calibration import influence, replay
from compressor.calibration.strides import Strides
from compressor.structure import Target

SHARE = 1 / 6
"""Of the network's calls that are differentiated. A quarter left as much error, an eighth a fiftieth more."""
LEAST = 200
"""Steps of prompts that are differentiated, at the least, where there are as many and as many may be summed."""

ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Kernels that are differentiated: without cuDNN's, whose backward pass failed on an H200 (torch 2.11, float16)."""


Take = Callable[[Mapping[str, Tensor], Mapping[str, Tensor], Tensor], None]
"""Is given the gradients of one call, by the layers' names, the squares of their tokens, and what these are to be
multiplied by."""


def share_of(prompts: int, steps: float, most: float) -> float:
    """The share of the calls that are differentiated, where so many prompts are sampled in so many steps.

    Args:
        prompts: in all.
        steps: of each, at which the network runs; their mean.
        most: the share that may be summed.
    """
    return min(most, max(SHARE, LEAST / (prompts * steps)))


class Differentiated:
    """Which of a network's calls are differentiated, with which noise, and what makes gradients of all comparable.

    Calls are chosen at random, but the first one, and so is the noise; both are the same every time. What differs from
    call to call lies in tensors that are written before it, so that one that is replayed by a CUDA graph reads them.

    Args:
        share: of the calls.

    Attributes:
        now: whether the current call is.
        count: of those that were.
        scales: what a call's g g^T are multiplied by, by the first prompt of its batch and which call of that it is;
            float64 without dimensions, where the network is, so that no GPU is waited for. Those of calls that are
            known, from another package's pass over the same prompts, are kept, so that gradients of both compare.
    """

    def __init__(self, share: float) -> None:
        self._share = share
        self._generator = torch.Generator()
        self._noises: dict[Hashable, Tensor] = {}
        self._noise: Tensor | None = None
        self._scale: Tensor | None = None
        self._kind: Hashable = None
        self._place: tuple[int, Hashable] = (0, None)
        self.now = False
        self.count = 0
        self.scales: dict[tuple[int, Hashable], Tensor] = {}
        self.next_batch(0)

    def next_batch(self, prompt: int) -> None:
        """Begins the batch with that first prompt, which decides what is drawn: whatever was sampled before."""
        self._generator.manual_seed(prompt)
        self._batch, self._call = prompt, -1

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any], call: Hashable = None) -> None:
        """Begins a call that the network runs, with these arguments.

        Args:
            args: of the network's forward.
            kwargs: likewise.
            call: which one of its batch it is, whatever the batch's size; None for its number.
        """
        self._call += 1
        self._place = self._batch, self._call if call is None else call
        chosen = torch.rand((), generator=self._generator).item() < self._share
        self.now = chosen or self._batch == self._call == 0
        if not self.now:
            return
        self.count += 1
        self._kind = replay.kind_of(args, kwargs)
        self._noise = self._noises.get(self._kind)
        if self._noise is not None:
            self._noise.copy_(self._draw(self._noise), non_blocking=True)
        if self._scale is not None:
            self._scale.copy_(self.scales[self._place]) if self._place in self.scales else self._scale.fill_(math.nan)

    def noise(self, output: Tensor) -> Tensor:
        """N(0, 1) for each element of the network's output."""
        if self._noise is None:
            self._noise = self._draw(output).to(output, non_blocking=True)
            if self._kind is not None:
                self._noises[self._kind] = self._noise
        return self._noise

    def scale(self, found: Tensor) -> Tensor:
        """What squared gradients are multiplied by: that of a call that is known, else what was found."""
        if self._scale is None:
            self._scale = self.scales.get(self._place, found).clone()
        else:
            self._scale.copy_(torch.where(self._scale.isnan(), found, self._scale))
        return self._scale

    def end(self) -> None:
        """Ends a call, whose scale now is known."""
        if self.now and self._place not in self.scales:
            assert self._scale is not None
            self.scales[self._place] = self._scale.clone()
        self.now = False

    def release(self) -> None:
        """Ends a pass: its tensors are of no use to another, of a network that may have changed."""
        self._noises.clear()
        self._noise = self._scale = None
        self.now = False
        self.next_batch(0)

    def _draw(self, like: Tensor) -> Tensor:
        noise = torch.randn(like.shape, generator=self._generator)
        return noise.pin_memory() if like.is_cuda else noise  # from where it is copied without waiting for the GPU


@contextmanager
def watch(
    network: nn.Module,
    targets: Iterable[Target],
    take: Take,
    differentiated: Differentiated,
    forget: Callable[[], None] | None = None,
    strides: Strides | None = None,
) -> Iterator[None]:
    """While it lasts, some calls of the network are differentiated by what their layers give out.

    Only what runs after the first of the layers is kept for the backward pass. All of that happens within the network's
    forward, for whoever wraps it later to record.

    Args:
        network: called without gradients, as pipelines do.
        targets: its layers.
        take: is called at the end of each of these calls.
        differentiated: which. `next_batch` is to be called before every batch by whoever samples it.
        forget: is called after that, and where a call has failed.
        strides: which calls the network runs; all if None.
    """
    plain = network.forward
    outputs: dict[str, Tensor] = {}

    def after_layer(target: Target) -> Callable[[nn.Module, Any, Tensor], Tensor | None]:
        def hook(_module: nn.Module, _args: Any, output: Tensor) -> Tensor | None:
            if not differentiated.now:
                return None
            outputs[target.name] = output if output.requires_grad else output.detach().requires_grad_()
            return outputs[target.name]

        return hook

    @functools.wraps(plain)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if not differentiated.now:
            return plain(*args, **kwargs)
        try:
            with torch.enable_grad(), sdpa_kernel(ATTENTION):
                result = plain(*args, **kwargs)
                noise = differentiated.noise(result[0])
                grads = torch.autograd.grad(result[0], list(outputs.values()), noise, allow_unused=True)
            found = {
                name: torch.zeros_like(output) if grad is None else grad
                for (name, output), grad in zip(outputs.items(), grads, strict=True)
            }
            outputs.clear()
            squares = {name: influence.squares(grad) for name, grad in found.items()}
            take(found, squares, differentiated.scale(_scale(found.values(), squares.values())))
        finally:
            outputs.clear()
            if forget is not None:
                forget()
        return _pytree.tree_map_only(Tensor, Tensor.detach, result)

    frozen = [parameter for parameter in network.parameters() if parameter.requires_grad]

    def before_network(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if strides is None:
            differentiated.begin(args, kwargs)
        elif strides.runs:
            differentiated.begin(args, kwargs, strides.call)

    handles = [
        network.register_forward_pre_hook(before_network, with_kwargs=True),
        network.register_forward_hook(lambda *_: differentiated.end()),
    ]
    handles += [target.module.register_forward_hook(after_layer(target)) for target in targets]
    try:
        for parameter in frozen:
            parameter.requires_grad_(False)
        with replay.calling(network, forward):
            yield
    finally:
        differentiated.release()
        for handle in handles:
            handle.remove()
        for parameter in frozen:
            parameter.requires_grad_()


def _scale(grads: Iterable[Tensor], squares: Iterable[Tensor]) -> Tensor:
    """One over the mean square of all, of which tokens that are not finite are zeros; 1 where all are zero."""
    total = torch.stack([squares_T.sum(dtype=torch.float64) for squares_T in squares]).sum()
    return torch.where(total > 0, sum(grad.numel() for grad in grads) / total, 1)
