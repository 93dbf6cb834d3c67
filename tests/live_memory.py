"""The most memory that tensors take while something runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode


class _Live(TorchDispatchMode):
    """Looks at what every operator gives; what an operator takes for itself meanwhile is not seen."""

    def __init__(self, before: Iterable[Tensor]) -> None:
        super().__init__()
        self._before = {x.untyped_storage()._cdata for x in before}
        self._found: dict[int, tuple[StorageWeakRef, int]] = {}
        self._total = 0  # of those, some of which may be gone
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in _pytree.tree_leaves(result):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in self._before:
                storage = x.untyped_storage()
                _, before = self._found.pop(storage._cdata, (None, 0))
                self._found[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
                self._total += storage.nbytes() - before
        if self._total > self.most:
            self._found = {key: each for key, each in self._found.items() if not each[0].expired()}
            self._total = sum(size for _, size in self._found.values())
            self.most = max(self.most, self._total)
        return result


def most_taken(work: Callable[[], object], before: Iterable[Tensor], device: torch.device) -> int:
    """The most bytes of tensors that were not there before.

    Args:
        work: done once.
        before: the tensors that are there, which `work` may free.
        device: where it works; on a GPU torch's own count is taken.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        allocated = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device) - allocated
    with _Live(before) as live:
        work()
    return live.most
