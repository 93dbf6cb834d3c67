"""Triton's interpreter finds the same out for every kernel and every value; from here on once. A plugin for pytest."""

import functools
import inspect
import math
from typing import Any

from triton import language
from triton.runtime import interpreter

runs: Any = interpreter  # what is replaced below is not public
tensor: Any = language.tensor


@functools.cache
def _builtins(place: Any) -> tuple[str, ...]:
    """Names of the operators in a module or class that the interpreter replaces while a kernel runs."""
    return tuple(name for name, member in inspect.getmembers(place) if language.core.is_builtin(member))


def _replace(place: Any, builder: Any, scope: Any) -> None:
    """As `_patch_builtin`, which looks through every member each time; what is replaced already stays."""
    for name in _builtins(place):
        if language.core.is_builtin(member := getattr(place, name)):
            runs._patch_attr(place, name, member, builder, scope)


_find_dtype = runs._get_np_dtype
_of_scalar = functools.cache(_find_dtype)  # pointers and blocks have no hash


def _dtype(given: Any) -> Any:
    scalar = given.scalar
    return _find_dtype(scalar) if scalar.is_ptr() else _of_scalar(scalar)


@functools.cache
def _sizes(shape: tuple[int, ...]) -> tuple[Any, Any]:
    return language.constexpr(math.prod(shape)), language.tuple([language.constexpr(size) for size in shape])


def _make(value: Any, handle: Any, kind: Any) -> None:
    """As `tensor.__init__`; equal shapes are one tuple."""
    value.handle, value.type, value.dtype = handle, kind, kind.scalar
    value.numel, value.shape = _sizes(kind.shape if kind.is_block() else ())


runs._patch_builtin = _replace
runs._get_np_dtype = _dtype
tensor.__init__ = _make
