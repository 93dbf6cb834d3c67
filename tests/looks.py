"""What a network's meta-device twin tells, found out once for equal networks: much of what a tiny run takes."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import pytest
from torch import nn

from compressor import pipeline, plan, prepare, twin
from tests import tiny

_FOUND: dict[Hashable, Any] = {}


def once(patch: pytest.MonkeyPatch) -> None:
    """From now on plans and runs look once at networks of equal shapes, at equal sizes, and discover tiny ones once.

    Args:
        patch: undoes it.
    """
    discover = pipeline._discover

    def key(name: str, network: nn.Module, recipe: Any, folder: Any) -> Hashable:
        shapes = tuple((label, tuple(parameter.shape)) for label, parameter in network.named_parameters())
        return name, type(network), folder.family.name, shapes, *twin._dimensions(recipe, folder).values()

    def remember(at: Hashable, find: Callable[[], Any]) -> Any:
        if at not in _FOUND:
            _FOUND[at] = find()
        return _FOUND[at]

    def trace_at(network: nn.Module, recipe: Any, folder: Any) -> Any:
        return remember(key("trace", network, recipe, folder), lambda: twin.trace_at(network, recipe, folder))

    def check_table(entries: Any, recipe: Any, folder: Any) -> Any:
        removing = [entry.component.module for entry in entries if entry.removals]
        if not removing:
            return twin.check_table(entries, recipe, folder)
        return remember(key("table", removing[0], recipe, folder), lambda: twin.check_table(entries, recipe, folder))

    def discover_in(path: Any, *rest: Any) -> Any:
        return (
            remember(("folder", path), lambda: discover(path, *rest)) if path in tiny.FOLDERS else discover(path, *rest)
        )

    patch.setattr(pipeline, "_discover", discover_in)
    for module in (plan, prepare):
        patch.setattr(module, "trace_at", trace_at)
        patch.setattr(module, "check_table", check_table)
