"""Replays a network's forwards by CUDA graphs: Python takes as long to launch their kernels as a GPU to run them.

What hooks inside the network make of its layers' inputs is recorded with it, and so repeated. Hooks on the network
itself run as ever, before and after: there is told what differs from forward to forward.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from compressor.calibration import kernels
from compressor.calibration.timing import Events, Meter

MOST = 4
"""Graphs kept, one for each kind of arguments: batches of full size and the last one."""


@dataclass(frozen=True)
class _Recorded:
    graph: torch.cuda.CUDAGraph
    given: list[Tensor]
    result: Any
    events: Events


def possible(network: nn.Module, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether moments of a network's inputs can be recorded: there are kernels for them, and it stays where it is."""
    offloaded = hasattr(network, "_hf_hook")
    return device.type == "cuda" and dtype in kernels.HALF and not offloaded and kernels.problem(device) is None


class Replay:
    """A network whose forwards can be replayed, if nothing in them asks for a number that is on the GPU.

    Attributes:
        problem: why they are not, once that is known.
    """

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self.problem: str | None = None

    @contextmanager
    def replaying(self, meter: Meter) -> Iterator[None]:
        """While it lasts, a forward with arguments as those of one before is recorded, and all further ones replayed.

        Forwards that are differentiated are not, nor any with arguments that are neither tensors on the current GPU nor
        plain constants. What is recorded is forgotten at the end.

        Args:
            meter: is told of the blocks that are timed in a replay.
        """
        plain = self._network.forward
        own = "forward" in self._network.__dict__
        seen: set[Hashable] = set()
        recorded: dict[Hashable, _Recorded] = {}

        @functools.wraps(plain)
        def forward(*args: Any, **kwargs: Any) -> Any:
            leaves, spec = _pytree.tree_flatten((args, kwargs))
            key = None if self.problem or torch.is_grad_enabled() else _kind(leaves, spec)
            if key is None:
                return plain(*args, **kwargs)
            if key not in recorded:
                if key not in seen or len(recorded) == MOST:  # the first one compiles kernels, and fills caches
                    seen.add(key)
                    return plain(*args, **kwargs)
                try:
                    recorded[key] = _record(plain, leaves, spec, meter)
                except RuntimeError as error:  # memory that ran out, too: the forward itself may have enough
                    self.problem = str(error).strip().splitlines()[0]
                    return plain(*args, **kwargs)
            return _replay(recorded[key], leaves, meter)

        self._network.forward = forward
        try:
            yield
        finally:
            if own:
                self._network.forward = plain
            else:
                del self._network.forward
            recorded.clear()


def _kind(leaves: list[Any], spec: _pytree.TreeSpec) -> Hashable:
    """What arguments that can share a graph have in common; None if there can be none for them."""
    found: list[Hashable] = [str(spec)]
    for leaf in leaves:
        if isinstance(leaf, Tensor) and _on_current_gpu(leaf):
            found.append((leaf.shape, leaf.dtype))
        elif leaf is None or isinstance(leaf, bool | int | str):
            found.append((type(leaf), leaf))
        else:
            return None
    return tuple(found)


def _on_current_gpu(x: Tensor) -> bool:
    return x.is_cuda and x.get_device() == torch.cuda.current_device()


def _record(plain: Callable[..., Any], leaves: list[Any], spec: _pytree.TreeSpec, meter: Meter) -> _Recorded:
    kept = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    args, kwargs = _pytree.tree_unflatten(kept, spec)
    graph = torch.cuda.CUDAGraph()
    with meter.recording() as events, torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = plain(*args, **kwargs)
    return _Recorded(graph, [leaf for leaf in kept if isinstance(leaf, Tensor)], result, events)


def _replay(recorded: _Recorded, leaves: list[Any], meter: Meter) -> Any:
    given = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    for kept, new in zip(recorded.given, given, strict=True):
        kept.copy_(new)
    recorded.graph.replay()
    meter.replay(recorded.events)
    return _pytree.tree_map_only(Tensor, torch.clone, recorded.result)
