"""Runtime `torch-sparse`: a 2:4 network under torch.compile and CUDA graphs, sparse where that is faster."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from compressor.errors import CompressorError
from compressor.structure import Family, compile_blocks, many_shapes
from compressor.two_four import layers, product
from compressor.two_four.layers import Decide, TwoFourLinear
from compressor.units import several


def install(network: nn.Module, family: Family, decide: Decide, say: Callable[[str], None]) -> Forward:
    """Makes a network run its 2:4 layers sparse where that is faster, its forward in a CUDA graph for each shape.

    Args:
        network: a pruned one, on the GPU; its forward is replaced, and the linears with 2:4 weights are.
        family: its table, which says what its blocks are; each is compiled.
        decide: chooses the kernels for the shapes that the first forward of every kind shows.
        say: told what was converted.

    Returns:
        The new forward.

    Raises:
        CompressorError: if no layer is 2:4.
    """
    found = layers.find(network, family)
    if not found:
        raise CompressorError(
            "should have layers with 2:4 weights, found none; prune with `granularity: n_m` (keep 2 of 4), or draw "
            "with --runtime torch"
        )
    placed = layers.replace(network, found)
    forward = Forward(network.forward, placed, decide, say)
    compile_blocks(network, family, fullgraph=False)
    network.forward = forward
    return forward


class Forward:
    """A network's forward that is recorded once for every kind of arguments, and replayed from then on.

    Attributes:
        sparse: for every kind of arguments in order, the shapes of the layers that run sparse, by name.
    """

    def __init__(
        self,
        forward: Callable[..., Any],
        placed: dict[str, TwoFourLinear],
        decide: Decide,
        say: Callable[[str], None],
    ) -> None:
        self.sparse: list[dict[str, str]] = []
        self._forward, self._layers, self._decide, self._say = forward, placed, decide, say
        self._recorded: dict[object, tuple[list[Tensor], Callable[[], object]]] = {}

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves, form = pytree.tree_flatten((args, kwargs))
        key = (str(form), *map(_kind, leaves))
        if key not in self._recorded:
            self._recorded[key] = self._record(leaves, form)
        inputs, replay = self._recorded[key]
        for static, given in zip(inputs, (leaf for leaf in leaves if isinstance(leaf, Tensor)), strict=True):
            static.copy_(given)
        return pytree.tree_map_only(Tensor, Tensor.clone, replay())

    def _record(self, leaves: list[Any], form: Any) -> tuple[list[Tensor], Callable[[], object]]:
        """Chooses the kernels for these arguments and records a forward of them; they are copied first."""
        device = next(iter(self._layers.values())).weight.device
        static = [leaf.to(device, copy=True) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        args, kwargs = pytree.tree_unflatten(static, form)
        with many_shapes():
            with torch.compiler.set_stance("force_eager"):
                seen = layers.observe(self._layers, lambda: self._forward(*args, **kwargs))
            self.sparse.append(layers.decide_all(self._layers, seen, self._decide))
            for line in explain(self.sparse[-1], len(self._layers)):
                self._say(line)
            replay = product.record(lambda: self._forward(*args, **kwargs), device)
        return [leaf for leaf in static if isinstance(leaf, Tensor)], replay


def explain(sparse: Mapping[str, str], total: int) -> list[str]:
    """Which layers run sparse, in words."""
    lines = [f"{len(sparse)} of {several(total, '2:4 layer')} run sparse; the others are as fast or faster dense"]
    for shape, count in Counter(sparse.values()).items():
        names = [name for name in sparse if sparse[name] == shape]
        lines.append(f"  {several(count, 'layer')} of {shape}: {names[0]}" + (", ..." if count > 1 else ""))
    return lines


def _kind(leaf: Any) -> object:
    """What a recording depends on: shape and dtype of a tensor, and any other value itself."""
    return (tuple(leaf.shape), leaf.dtype) if isinstance(leaf, Tensor) else repr(leaf)
