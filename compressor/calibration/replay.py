"""Replays a network's forwards by CUDA graphs: Python takes as long to launch their kernels as a GPU to run them.

What hooks inside the network make of its layers' inputs is recorded with it, and so repeated, and so is the backward
pass of a forward that is differentiated. Hooks on the network itself run as ever, before and after: there is told what
differs from forward to forward.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from compressor.calibration import kernels
from compressor.calibration.timing import Events, Meter

T = TypeVar("T")

MOST = 8
"""Graphs kept, one for each kind of forward: with moments and without, in batches of full size and in the last one. As
many of backward passes."""

BEFORE = 2
"""Forwards of a kind that run before one is recorded: in the first, kernels are compiled, the second is watched."""


@dataclass(frozen=True)
class _Recorded:
    graph: torch.cuda.CUDAGraph
    given: list[Tensor]
    result: Any
    events: Events


def obstacle(network: nn.Module, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why moments of a network's inputs cannot be recorded, or None: kernels make them, and it stays where it is."""
    if device.type != "cuda":
        return f"the network is on {device.type}"
    if dtype not in kernels.HALF:
        return f"the network is in {str(dtype).removeprefix('torch.')}"
    if hasattr(network, "_hf_hook"):
        return "components are offloaded"
    return kernels.problem(device)


class Replay:
    """A network whose forwards can be replayed, if nothing in them asks for a number that is on the GPU.

    Attributes:
        problem: why none is, once that is known.
        problem_of_differentiated: why those that are differentiated are not, though others may be.
        recorded: which were in the last pass, and have not been given up since: with True in it, some that are
            differentiated, with False, some others.
    """

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self.problem: str | None = None
        self.problem_of_differentiated: str | None = None
        self.recorded: set[bool] = set()

    @contextmanager
    def replaying(
        self,
        meter: Meter,
        *,
        summed: Callable[[], bool] = lambda: False,
        differentiated: Callable[[], bool] = lambda: False,
    ) -> Iterator[None]:
        """While it lasts, a forward of the kind of two before it is recorded, and all further ones replayed.

        Of one kind are those whose arguments are alike, and that are all summed or all not, all differentiated or not.

        Not recorded are forwards that are called with gradients, nor any with arguments that are neither tensors on the
        current GPU nor plain constants. What is recorded is forgotten at the end.

        Args:
            meter: is told of the blocks that are timed in a replay.
            summed: whether the forward that begins adds to moments.
            differentiated: whether it has a backward pass inside; if these cannot be recorded, others still are.
        """
        plain = self._network.forward
        seen: dict[Hashable, int] = {}
        # of either kind in memory of its own: what is given up leaves nothing in the other's
        graphs: dict[bool, dict[Hashable, _Recorded]] = {False: {}, True: {}}
        self.recorded.clear()

        def stop(backward: bool, problem: str) -> None:
            self._stop(backward, problem)
            for either in (False, True):
                if either not in self.recorded:
                    graphs[either].clear()

        @functools.wraps(plain)
        def forward(*args: Any, **kwargs: Any) -> Any:
            backward = differentiated()
            if self.why_not(backward) is not None or torch.is_grad_enabled():
                return plain(*args, **kwargs)
            leaves, spec = _pytree.tree_flatten((args, kwargs))
            arguments = _kind(leaves, spec)
            if arguments is None:
                stop(False, "it is given what is neither a tensor on the current GPU nor a plain constant")
                return plain(*args, **kwargs)
            key, recorded = (backward, summed(), arguments), graphs[backward]
            if key not in recorded:
                seen[key] = seen.get(key, 0) + 1
                if seen[key] < BEFORE or len(recorded) == MOST:
                    return plain(*args, **kwargs)
                if seen[key] == BEFORE:
                    result, waits = watched(lambda: plain(*args, **kwargs))
                    if waits:
                        stop(backward, "something in it waits for the GPU")
                    return result
                pool = next(iter(recorded.values())).graph.pool() if recorded else None
                found = _try(lambda: _record(plain, leaves, spec, meter, pool))
                if isinstance(found, str):  # such as that memory ran out, of which the forward itself may have enough
                    stop(backward or True in self.recorded, found)  # then others are tried again without those
                    return plain(*args, **kwargs)
                recorded[key] = found
                self.recorded.add(backward)
            return _replay(recorded[key], leaves, meter)

        try:
            with calling(self._network, forward):
                yield
        finally:
            for recorded in graphs.values():
                recorded.clear()

    def why_not(self, differentiated: bool) -> str | None:
        """Why such forwards are not replayed, once that is known."""
        return self.problem or (self.problem_of_differentiated if differentiated else None)

    def give_up(self, problem: str) -> bool:
        """Replays no more of what was recorded in the last pass: of differentiated forwards, which take most, else all.

        Returns:
            Whether there was any.
        """
        if not self.recorded:
            return False
        self._stop(True in self.recorded, problem)
        return True

    def _stop(self, differentiated: bool, problem: str) -> None:
        if differentiated:
            self.problem_of_differentiated = problem
            self.recorded.discard(True)
        else:
            self.problem = problem
            self.recorded.clear()


@contextmanager
def calling(network: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """While it lasts, that is the network's forward."""
    own = network.__dict__.get("forward")
    network.forward = forward
    try:
        yield
    finally:
        if own is not None:
            network.forward = own
        else:
            del network.forward


def kind_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hashable:
    """What arguments that can share a graph have in common; None if there can be none for them."""
    return _kind(*_pytree.tree_flatten((args, kwargs)))


def _kind(leaves: list[Any], spec: _pytree.TreeSpec) -> Hashable:
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


def watched(work: Callable[[], T]) -> tuple[T, int]:
    """What it gives, and how often it waited for the GPU; what waits cannot be recorded, and failing may cost more."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            result = work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = 0
    for warning in caught:
        words = str(warning.message)
        waits += "called a synchronizing CUDA operation" in words
        # torch warns as well that it may not see every wait
        if not words.startswith(("called a synchronizing", "Synchronization debug mode is")):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return result, waits


def _try(record: Callable[[], _Recorded]) -> _Recorded | str:
    """What is recorded, or why nothing is. Nothing of a failure is kept, which would keep memory."""
    stream = torch.cuda.current_stream() if torch.cuda.is_available() else None
    try:
        return record()
    except RuntimeError as error:
        return _words(error)
    finally:
        if stream is not None:
            torch.cuda.set_stream(stream)


def _words(error: RuntimeError) -> str:
    """The first line of what went wrong first: the end of a recording fails, too."""
    cause = error.__context__ if isinstance(error.__context__, RuntimeError) else error
    return (str(cause).strip() or type(cause).__name__).splitlines()[0]


def _record(plain: Callable[..., Any], leaves: list[Any], spec: _pytree.TreeSpec, meter: Meter, pool: Any) -> _Recorded:
    kept = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    args, kwargs = _pytree.tree_unflatten(kept, spec)
    graph = torch.cuda.CUDAGraph()
    with meter.recording() as events, torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        result = plain(*args, **kwargs)
    for leaf in _pytree.tree_leaves(result):
        if not (leaf is None or isinstance(leaf, Tensor | bool | int | float | str)):
            raise RuntimeError(f"it gives a {type(leaf).__name__}, which cannot be copied")
    return _Recorded(graph, [leaf for leaf in kept if isinstance(leaf, Tensor)], result, events)


def _replay(recorded: _Recorded, leaves: list[Any], meter: Meter) -> Any:
    given = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    for kept, new in zip(recorded.given, given, strict=True):
        kept.copy_(new)
    recorded.graph.replay()
    meter.replay(recorded.events)
    return _pytree.tree_map_only(Tensor, torch.clone, recorded.result)
