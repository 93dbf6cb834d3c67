"""What a network's meta-device twin tells, found out once for equal networks: most of what a tiny run takes."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import pytest
from torch import nn

from compressor import plan, prepare, twin


def once(patch: pytest.MonkeyPatch) -> None:
    """From now on plans and runs look once at networks of equal shapes, at equal sizes.

    Args:
        patch: undoes it.
    """
    found: dict[Hashable, Any] = {}

    def key(name: str, network: nn.Module, recipe: Any, folder: Any) -> Hashable:
        shapes = tuple((label, tuple(parameter.shape)) for label, parameter in network.named_parameters())
        return name, type(network), folder.family.name, shapes, *twin._dimensions(recipe, folder).values()

    def remember(at: Hashable, find: Callable[[], Any]) -> Any:
        if at not in found:
            found[at] = find()
        return found[at]

    def trace_at(network: nn.Module, recipe: Any, folder: Any) -> Any:
        return remember(key("trace", network, recipe, folder), lambda: twin.trace_at(network, recipe, folder))

    def check_table(entries: Any, recipe: Any, folder: Any) -> Any:
        removing = [entry.component.module for entry in entries if entry.removals]
        if not removing:
            return twin.check_table(entries, recipe, folder)
        return remember(key("table", removing[0], recipe, folder), lambda: twin.check_table(entries, recipe, folder))

    for module in (plan, prepare):
        patch.setattr(module, "trace_at", trace_at)
        patch.setattr(module, "check_table", check_table)
