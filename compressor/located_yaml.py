"""Reads YAML and remembers on which line every key and item stood."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from compressor.errors import CompressorError

Place = tuple[str | int, ...]


class Located:
    """Plain data read from a file, with the place each part came from.

    Attributes:
        data: dicts, lists and scalars.
        file: the path as the user gave it.
    """

    def __init__(self, data: Any, file: str, lines: dict[Place, str]) -> None:
        self.data = data
        self.file = file
        self._lines = lines

    def where(self, place: Place) -> str:
        """`file:line` of a place, or of the nearest enclosing one that the file mentions."""
        while place and place not in self._lines:
            place = place[:-1]
        return self._lines.get(place, f"{self.file}:1")

    def set(self, assignment: str) -> None:
        """Applies an override such as `prune.0.obs_diff.sparsity=0.6`; the value is read as YAML.

        Raises:
            CompressorError: if it is not of the form KEY.KEY=VALUE, or passes through a place that does not exist.
        """
        path, equals, text = assignment.partition("=")
        if not equals or not path:
            raise CompressorError(f"--set {assignment}: should be KEY.KEY=VALUE, as in prune.0.obs_diff.sparsity=0.6")
        try:
            value = yaml.load(text, _Loader)
        except yaml.YAMLError as error:
            raise CompressorError(f"--set {assignment}: the value is not YAML: {_problem(error)}") from None
        *parents, last = path.split(".")
        node, place = self.data, ()
        for key in parents:
            place += (_key(node, key, assignment, must_exist=False),)
            if isinstance(node, dict) and node.get(place[-1]) is None:
                node[place[-1]] = {}
            node = node[place[-1]]
        place += (_key(node, last, assignment, must_exist=False),)
        node[place[-1]] = value
        for inner in [p for p in self._lines if p[: len(place)] == place]:
            del self._lines[inner]
        self._lines[place] = f"--set {path}"


def read(file: str | Path) -> Located:
    """Reads one YAML document.

    Raises:
        CompressorError: if the file is missing, not text, not YAML, not a mapping, or repeats a key.
    """
    name = str(file)
    try:
        text = Path(file).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise CompressorError(f"{name}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise CompressorError(f"{name}: cannot be read: {error}") from None
    try:
        root = yaml.compose(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise CompressorError(f"{name}{line}: not YAML: {_problem(error)}") from None
    if not isinstance(root, yaml.MappingNode):
        raise CompressorError(f"{name}: should be a mapping with the keys of a recipe, found {_kind(root)}")
    lines: dict[Place, str] = {}
    data = _build(root, (), name, lines)
    return Located(data, name, lines)


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2: `no` and `2:4` are strings, `1e-3` is a number."""


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, regexp) for tag, regexp in resolvers if tag.rsplit(":", 1)[1] not in ("bool", "int", "float", "timestamp")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(true|false|True|False|TRUE|FALSE)$"), list("tfTF")
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9]+$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"
    ),
    list("-+.0123456789"),
)


def _construct_int(loader: yaml.SafeLoader, node: yaml.Node) -> int:
    return int(loader.construct_scalar(node))  # pyright: ignore[reportArgumentType]  # decimal, not octal, behind a 0


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)


def _build(node: yaml.Node, place: Place, file: str, lines: dict[Place, str]) -> Any:
    lines.setdefault(place, f"{file}:{node.start_mark.line + 1}")
    if isinstance(node, yaml.MappingNode):
        result: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            key = _scalar(key_node)
            line = f"{file}:{key_node.start_mark.line + 1}"
            if key in result:
                raise CompressorError(
                    f"{line}: {_dotted((*place, key))}: this key stands twice, first at {lines[(*place, key)]}"
                )
            lines[(*place, key)] = line
            result[key] = _build(value_node, (*place, key), file, lines)
        return result
    if isinstance(node, yaml.SequenceNode):
        return [_build(item, (*place, i), file, lines) for i, item in enumerate(node.value)]
    return _scalar(node)


def _scalar(node: yaml.Node) -> Any:
    loader = _Loader("")
    try:
        return loader.construct_object(node, deep=True)
    finally:
        loader.dispose()


def _key(node: Any, key: str, assignment: str, must_exist: bool) -> str | int:
    if isinstance(node, dict):
        return key
    if isinstance(node, list):
        if key.isdigit() and int(key) < len(node):
            return int(key)
        raise CompressorError(f"--set {assignment}: '{key}' should be an index from 0 to {len(node) - 1}")
    raise CompressorError(f"--set {assignment}: nothing to set inside {node!r} with '{key}'")


def _problem(error: yaml.YAMLError) -> str:
    return getattr(error, "problem", None) or str(error)


def _kind(node: yaml.Node | None) -> str:
    return "nothing" if node is None else "a list" if isinstance(node, yaml.SequenceNode) else f"{node.value!r}"


def _dotted(place: Place) -> str:
    return dotted(place)


def dotted(place: Place) -> str:
    """`prune[0].obs_diff.sparsity`."""
    text = ""
    for part in place:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text
