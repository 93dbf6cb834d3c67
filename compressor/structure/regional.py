"""Compiles a network block by block, so that alike blocks are compiled once."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from torch import nn

from compressor.structure.family import Family


def compile_blocks(
    network: nn.Module, family: Family, *, fullgraph: bool, backend: str = "inductor"
) -> tuple[nn.Module, ...]:
    """Lets every block that the family's table names be compiled when it first runs; what lies outside stays eager.

    Args:
        network: is changed: calls of its blocks go through torch.compile, with static shapes.
        family: its table.
        fullgraph: whether a block that is not one graph is an error.
        backend: of torch.compile.

    Returns:
        The blocks.
    """
    found = tuple(
        module
        for name, module in network.named_modules()
        if any(re.fullmatch(table.pattern, name) for table in family.blocks)
    )
    for block in found:
        block.compile(dynamic=False, fullgraph=fullgraph, backend=backend)
    return found


@contextmanager
def many_shapes() -> Iterator[None]:
    """While it lasts, torch compiles as many versions of one block as there are shapes of it.

    Blocks whose widths differ need a version each; torch gives up after eight, and then runs eagerly or fails.
    """
    config: Any = import_module("torch._dynamo.config")
    with config.patch(recompile_limit=256, accumulated_recompile_limit=1024):
        yield
