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

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from compressor.calibration import influence
from compressor.structure import Target

SHARE = 1 / 6
"""Of the network's calls that are differentiated. A quarter left as much error, an eighth a fiftieth more."""
LEAST = 200
"""Steps of prompts that are differentiated, at the least, where there are as many."""

ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Kernels that are differentiated: without cuDNN's, whose backward pass failed on an H200 (torch 2.11, float16)."""


Scales = dict[tuple[int, int], Tensor]
"""What a call's g g^T are multiplied by, by the first prompt of its batch and its number in that; float64 without
dimensions, where the network is, so that no GPU is waited for."""


Take = Callable[[Mapping[str, Tensor], Mapping[str, Tensor], Tensor], None]
"""Is given the gradients of one call, by the layers' names, the squares of their tokens, and what these are to be
multiplied by."""


def share_of(prompts: int, steps: int, most: float) -> float:
    """The share of the calls that are differentiated, where so many prompts are sampled in so many steps.

    Args:
        prompts: in all.
        steps: of each.
        most: the share that may be summed.
    """
    return min(most, max(SHARE, LEAST / (prompts * steps)))


@contextmanager
def watch(
    network: nn.Module, targets: Iterable[Target], take: Take, scales: Scales, share: float
) -> Iterator[Callable[[int], None]]:
    """While it lasts, some calls of the network are differentiated by what their layers give out.

    Only what runs after the first of the layers is recorded for it. The calls are chosen at random, but the first one,
    and so is the noise; both are the same every time. What it gives is to be called before every batch with the number
    of its first prompt, which decides both: whoever samples the batch, and whatever was sampled before.

    Args:
        network: called without gradients, as pipelines do.
        targets: its layers.
        take: is called after each of these calls.
        scales: of calls that are known, as those of another package's pass over the same prompts, which make gradients
            of both comparable; those of others are added.
        share: of the calls.
    """
    generator = torch.Generator().manual_seed(0)
    kernels = ExitStack()
    outputs: dict[str, Tensor] = {}
    differentiated, batch, call = False, 0, -1

    def next_batch(prompt: int) -> None:
        nonlocal batch, call
        generator.manual_seed(prompt)
        batch, call = prompt, -1

    def before_network(*_: Any) -> None:
        nonlocal differentiated, call
        call += 1
        differentiated = torch.rand((), generator=generator).item() < share or (batch, call) == (0, 0)
        torch.set_grad_enabled(differentiated)
        if differentiated:
            kernels.enter_context(sdpa_kernel(ATTENTION))

    def after_layer(target: Target) -> Callable[[nn.Module, Any, Tensor], Tensor | None]:
        def hook(_module: nn.Module, _args: Any, output: Tensor) -> Tensor | None:
            if not differentiated:
                return None
            outputs[target.name] = output if output.requires_grad else output.detach().requires_grad_()
            return outputs[target.name]

        return hook

    def after_network(_module: nn.Module, _args: Any, result: Any) -> Any:
        nonlocal differentiated
        if not differentiated:
            return None
        output = result[0]
        noise = torch.randn(output.shape, generator=generator)
        if output.is_cuda:
            noise = noise.pin_memory()  # from where it is copied without waiting for the GPU
        noise = noise.to(output, non_blocking=True)
        grads = torch.autograd.grad(output, list(outputs.values()), noise, allow_unused=True)
        torch.set_grad_enabled(False)
        kernels.close()
        found = {
            name: torch.zeros_like(output) if grad is None else grad
            for (name, output), grad in zip(outputs.items(), grads, strict=True)
        }
        squares = {name: influence.squares(grad) for name, grad in found.items()}
        if (batch, call) not in scales:
            scales[batch, call] = _scale(found.values(), squares.values())
        outputs.clear()
        take(found, squares, scales[batch, call])
        differentiated = False
        return (output.detach(), *result[1:]) if isinstance(result, tuple) else None

    frozen = [parameter for parameter in network.parameters() if parameter.requires_grad]
    handles = [network.register_forward_pre_hook(before_network), network.register_forward_hook(after_network)]
    handles += [target.module.register_forward_hook(after_layer(target)) for target in targets]
    try:
        for parameter in frozen:
            parameter.requires_grad_(False)
        yield next_batch
    finally:
        kernels.close()
        for handle in handles:
            handle.remove()
        for parameter in frozen:
            parameter.requires_grad_()


def _scale(grads: Iterable[Tensor], squares: Iterable[Tensor]) -> Tensor:
    """One over the mean square of all, of which tokens that are not finite are zeros; 1 where all are zero."""
    total = torch.stack([squares_T.sum(dtype=torch.float64) for squares_T in squares]).sum()
    return torch.where(total > 0, sum(grad.numel() for grad in grads) / total, 1)
