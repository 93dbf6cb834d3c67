"""Finds plugins by entry point. Listing names imports nothing; loading one imports that one."""

from __future__ import annotations

import functools
import sys
from importlib import metadata
from typing import Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler, ValidationError
from pydantic_core import PydanticCustomError, core_schema

from compressor.errors import CompressorError
from compressor.options import Options, rebuild, suggest
from compressor.plugin import Exporter, Granularity, Metric, Pruner, Weighting

KINDS = {
    "pruner": "compressor.pruners",
    "exporter": "compressor.exporters",
    "family": "compressor.families",
    "metric": "compressor.metrics",
    "weighting": "compressor.weightings",
    "granularity": "compressor.granularities",
}
_BASES = {"pruner": Pruner, "exporter": Exporter, "metric": Metric, "weighting": Weighting, "granularity": Granularity}


def find(kind: str) -> dict[str, metadata.EntryPoint]:
    """Lists the installed plugins of a kind (a key of `KINDS`) by name, sorted, without importing any.

    Raises:
        CompressorError: if two distributions register the same name.
    """
    found: dict[str, metadata.EntryPoint] = {}
    for entry in _entries(KINDS[kind], tuple(sys.path)):
        other = found.setdefault(entry.name, entry)
        if other.value != entry.value:
            raise CompressorError(
                f"two plugins register the {kind} '{entry.name}': {_origin(other)} and {_origin(entry)}; "
                "uninstall one or rename it"
            )
    return found


@functools.cache
def _entries(group: str, _path: tuple[str, ...]) -> tuple[metadata.EntryPoint, ...]:
    """Read once for as long as modules are looked for in the same places: a recipe asks for every name in it."""
    return tuple(sorted(metadata.entry_points(group=group)))


def load(kind: str, name: str) -> Any:
    """Imports the plugin `name` and returns what its entry point names (a class, or a family table).

    Raises:
        CompressorError: if there is none of that name, importing it fails for any reason, or it is no such plugin.
    """
    found = find(kind)
    if name not in found:
        raise CompressorError(_unknown(kind, name, list(found)))
    entry = found[name]
    try:
        plugin = entry.load()
    except Exception as error:  # whatever a broken third-party module raises becomes one named error
        raise CompressorError(
            f"{kind} '{name}' ({_origin(entry)}) cannot be loaded: {type(error).__name__}: {error}"
        ) from error
    if (base := _BASES.get(kind)) is not None:
        if not (isinstance(plugin, type) and issubclass(plugin, base)):
            raise CompressorError(
                f"{kind} '{name}' ({_origin(entry)}) should be a subclass of compressor.plugin.{base.__name__}, "
                f"found {plugin!r}"
            )
        if missing := sorted(plugin.__abstractmethods__):
            raise CompressorError(f"{kind} '{name}' ({_origin(entry)}) does not define {', '.join(missing)}")
    return plugin


class Choice:
    """Annotates a field that names a plugin: `name`, or `{name: {option: value}}`.

    `granularity: Annotated[Granularity, Choice("granularity")]` reads `granularity: unstructured` as well as
    `granularity: {n_m: {keep: 2, of: 4}}` into an instance of the class that the entry point names.
    Every mistake inside the options is reported under its own path. With a `base`, only its subclasses will do.
    """

    def __init__(self, kind: str, base: type[Options] | None = None) -> None:
        self.kind = kind
        self.base = base

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(
            self.read,
            serialization=core_schema.plain_serializer_function_ser_schema(self.write),
        )

    def __get_pydantic_json_schema__(self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler) -> dict:
        definitions: list[dict[str, Any]] = []
        for name in self._fitting():
            cls = load(self.kind, name)
            options = handler.resolve_ref_schema(handler(cls.__pydantic_core_schema__))
            if not options.get("required"):
                definitions.append({"const": name, "description": _first_line(cls)})
            definitions.append(
                {
                    "type": "object",
                    "properties": {name: options},
                    "required": [name],
                    "additionalProperties": False,
                    "description": _first_line(cls),
                }
            )
        return {"oneOf": definitions}

    def read(self, value: Any) -> Any:
        """Turns a name, or a name with options, into an instance of the plugin."""
        names = find(self.kind)
        if isinstance(value, str):
            name, options = value, {}
        elif isinstance(value, dict) and len(value) == 1:
            name, options = next(iter(value.items()))
        elif isinstance(value, Options) and self._fits(type(value)):
            return value
        else:
            raise PydanticCustomError(
                "plugin",
                "should name one {kind} ({names}), as `name` or `name: options`, found {found}",
                {"kind": self.kind, "names": ", ".join(names), "found": _describe(value)},
            )
        try:
            cls = load(self.kind, str(name))
        except CompressorError as error:
            raise PydanticCustomError("plugin", "{message}", {"message": str(error)}) from error
        if not self._fits(cls):
            raise PydanticCustomError(
                "plugin",
                "this pruner cannot take {kind} '{name}'; should be one of {names}",
                {"kind": self.kind, "name": str(name), "names": ", ".join(self._fitting())},
            )
        try:
            return cls.model_validate(options)
        except ValidationError as error:
            raise rebuild(error, str(name), prefix=(str(name),)) from None

    def _fits(self, cls: Any) -> bool:
        return self.base is None or issubclass(cls, self.base)

    def _fitting(self) -> tuple[str, ...]:
        return tuple(name for name in find(self.kind) if self._fits(load(self.kind, name)))

    def write(self, value: Any) -> Any:
        """The inverse of `read`, with every option spelled out."""
        return {self.name(value): value.model_dump(mode="json")}

    def name(self, value: Any) -> str:
        """The name under which a plugin's class is registered."""
        loaded = (name for name, entry in find(self.kind).items() if entry.module in sys.modules)
        return next(name for name in loaded if load(self.kind, name) is type(value))


def _unknown(kind: str, name: str, known: list[str]) -> str:
    clause = suggest(name, known) or (
        f"; installed: {', '.join(known) or 'none'} "
        "(a plugin just added to a project shows up after `pip install -e .` is run again)"
    )
    return f"no {kind} named '{name}'{clause}"


def _origin(entry: metadata.EntryPoint) -> str:
    return f"{entry.value} of {entry.dist.name}" if entry.dist else entry.value


def _first_line(cls: Any) -> str:
    return (cls.__doc__ or "").strip().splitlines()[0] if cls.__doc__ else ""


def _describe(value: Any) -> str:
    if isinstance(value, dict):
        return f"{len(value)} keys ({', '.join(map(str, value))})" if value else "an empty mapping"
    return f"{value!r}"
