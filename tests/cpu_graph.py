"""CUDA graphs on a CPU: operations are done again with the same tensors and the same numbers, as Python had them."""

# Shapes: T tokens, I inputs.

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from compressor.calibration import kernels, replay

REFUSED = ("aten::_local_scalar_dense", "aten::rand", "aten::randn", "aten::normal_", "aten::uniform_")


class CPUGraph(TorchDispatchMode):
    """In place of `torch.cuda.CUDAGraph`, and of the context in which one is recorded.

    What is recorded is not done: whatever it writes to has its values again when the recording ends.
    """

    def __init__(self) -> None:
        super().__init__()
        self._steps: list[tuple[Any, Any, Any, Any]] = []
        self._before: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Does and records one operation."""
        kwargs = kwargs or {}
        if func._schema.name in REFUSED:
            raise RuntimeError(f"{func._schema.name}: not permitted when stream is capturing")
        if torch.Tag.inplace_view in func.tags:  # of a tensor's shape, which stays
            return func(*args, **kwargs)
        named = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
        for argument in func._schema.arguments:
            if argument.alias_info is not None and argument.alias_info.is_write:
                written = named[argument.name]
                self._before.append((written, written.clone()))
        found = func(*args, **kwargs)
        self._steps.append((func, args, kwargs, found))
        return found

    def __exit__(self, *error: Any) -> None:
        """Takes back what was written."""
        super().__exit__(*error)
        with torch.no_grad():
            for written, before in reversed(self._before):
                written.copy_(before.reshape(written.shape))
        self._before.clear()

    def did(self, name: str) -> bool:
        """Whether an operation of that name was recorded."""
        return any(func._schema.name == name for func, *_ in self._steps)

    def pool(self) -> None:
        """None on a CPU."""

    @torch.no_grad()
    def replay(self) -> None:
        """Does all of it."""
        for func, args, kwargs, found in self._steps:
            again = func(*args, **kwargs)
            if all(each.alias_info is None for each in func._schema.returns):
                for old, new in zip(_pytree.tree_leaves(found), _pytree.tree_leaves(again), strict=True):
                    if isinstance(old, Tensor):
                        old.copy_(new.reshape(old.shape))


class _Sums(NamedTuple):
    tokens: Tensor
    skipped: Tensor
    weight: Tensor | None = None
    total_I: Tensor | None = None
    squares_I: Tensor | None = None


class Kernels:
    """In place of `product_kernel`: PyTorch's operations, without numbers that Python would have to know."""

    Sums = _Sums

    @staticmethod
    def read(x_TI: Tensor, total: bool, squares: bool, root_T: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Tokens times their roots, and these."""
        del total, squares
        root_T = torch.ones(len(x_TI)) if root_T is None else root_T
        return x_TI * root_T[:, None], root_T

    @staticmethod
    def settle(found: tuple[Tensor, Tensor], sums: _Sums, weight: float, live: Tensor | None = None) -> None:
        """Sums of tokens, and how many there were."""
        (x_TI, root_T), factor = found, Kernels._factor(weight, live)
        sums.tokens.add_(len(x_TI))
        if sums.weight is not None and sums.total_I is not None:
            sums.weight.add_(factor * root_T.square().sum())
            sums.total_I.add_(factor * (root_T @ x_TI))

    @staticmethod
    def multiply(
        second_II: Tensor,
        found: tuple[Tensor, Tensor],
        weight: float,
        sums: _Sums | None = None,
        live: Tensor | None = None,
        first: int = 0,
    ) -> None:
        """Sums of products."""
        x_TI = found[0][:, first : first + len(second_II)]
        second_II.add_(Kernels._factor(weight, live) * (x_TI.T @ x_TI))
        if sums is not None:
            Kernels.settle(found, sums, weight, live)

    @staticmethod
    def _factor(weight: float, live: Tensor | None) -> Tensor:
        factor = torch.full((), weight, dtype=torch.float64)
        return factor if live is None else factor * live


def use(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """From now on forwards on the CPU are replayed; each leaves in the list whether it was differentiated."""
    replayed: list[bool] = []
    again = replay._replay

    def counted(recorded: replay._Recorded, *rest: Any) -> Any:
        graph: Any = recorded.graph
        replayed.append(graph.did("aten::nan_to_num"))  # of the squares of gradients
        return again(recorded, *rest)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", CPUGraph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **_: graph)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    monkeypatch.setattr(replay, "obstacle", lambda *_: None)
    monkeypatch.setattr(replay, "watched", lambda work: (work(), 0))
    monkeypatch.setattr(replay, "_on_current_gpu", lambda x: x.device.type == "cpu")
    monkeypatch.setattr(replay, "_replay", counted)
    monkeypatch.setattr(kernels, "of", lambda _: Kernels)
    return replayed
