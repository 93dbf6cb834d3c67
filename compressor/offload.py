"""Components of a pipeline take turns on a GPU: while one computes, the others wait in the CPU's memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn


class Turn(ModelHook):
    """Sends the other components off, and brings its own, before its forward. It stays until another one is called.

    diffusers' own offloading is not used, as it sends the network off at the end of every call of the pipeline: between
    two of them it is calibrated, pruned and proved.

    Attributes:
        execution_device: where the component computes; diffusers looks for it by this name.
    """

    def __init__(self, execution_device: torch.device, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.execution_device = execution_device
        self._members = tuple(members)

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Before the module's forward, and before `encode` and `decode` of an autoencoder."""
        self.begin(module)
        return args, kwargs

    def begin(self, module: nn.Module) -> None:
        """Makes it this module's turn."""
        for other in self._members:
            if other is not module:
                other.to("cpu")
        module.to(self.execution_device)


def take_turns(components: Sequence[nn.Module], device: torch.device) -> None:
    """From now on each component is on the device only from its own call to that of another one.

    Args:
        components: on the CPU.
        device: a GPU.
    """
    for component in components:
        add_hook_to_module(component, Turn(device, components))


def bring(component: nn.Module) -> None:
    """Makes it a component's turn without calling it; does nothing if there are no turns."""
    if (hook := _turn(component)) is not None:
        hook.begin(component)


def computes_on(component: nn.Module) -> torch.device:
    """The device that a component computes on, though it may wait on another one."""
    hook = _turn(component)
    return next(component.parameters()).device if hook is None else hook.execution_device


def _turn(component: nn.Module) -> Turn | None:
    hook = getattr(component, "_hf_hook", None)
    return hook if isinstance(hook, Turn) else None
