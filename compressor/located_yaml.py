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
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise CompressorError(f"--set {assignment}: the value is not YAML: {_problem(error)}") from None
        *parents, last = path.split(".")
        node, place = self.data, ()
        for key in parents:
            place += (_key(node, key, assignment, place),)
            if isinstance(node, dict) and node.get(place[-1]) is None:
                node[place[-1]] = {}
                self._lines[place] = f"--set {path}"
            node = node[place[-1]]
        place += (_key(node, last, assignment, place),)
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
    except OSError as error:
        raise CompressorError(f"{name}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise CompressorError(f"{name}: is not UTF-8 text: {error.reason} at byte {error.start}") from None
    try:
        root = yaml.compose(text, _Loader)
    except RecursionError:
        raise CompressorError(f"{name}: not YAML that can be read: nested too deep") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise CompressorError(f"{name}{line}: not YAML: {_problem(error)}") from None
    if not isinstance(root, yaml.MappingNode):
        raise CompressorError(f"{name}: should be a mapping with the keys of a recipe, found {_kind(root)}")
    lines: dict[Place, str] = {}
    data = _build(root, (), name, lines, ())
    return Located(data, name, lines)


_KINDS = {"str": "text", "null": "nothing", "bool": "true or false", "int": "a whole number", "float": "a number"}
_KINDS |= {"map": "a mapping", "seq": "a list"}
_MOST_PLACES = 100_000
"""Enough for any recipe, and soon reached by aliases of aliases."""


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


def _build(node: yaml.Node, place: Place, file: str, lines: dict[Place, str], inside: tuple[yaml.Node, ...]) -> Any:
    lines.setdefault(place, f"{file}:{node.start_mark.line + 1}")
    if any(node is outer for outer in inside):
        raise CompressorError(f"{lines[place]}: {dotted(place)}: an alias here stands for something that holds it")
    if (kind := node.tag.rpartition(":")[2]) not in _KINDS:
        raise CompressorError(f"{lines[place]}: {dotted(place)}: a recipe has no use for the tag '{node.tag}'")
    if len(lines) > _MOST_PLACES:
        raise CompressorError(f"{lines[place]}: {dotted(place)}: more than {_MOST_PLACES:,} values, aliases included")
    inside = (*inside, node)
    if isinstance(node, yaml.MappingNode):
        result: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            line = f"{file}:{key_node.start_mark.line + 1}"
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) and key_node.tag.endswith(":str") else None
            if key is None:
                raise CompressorError(f"{line}: a key should be a word, found {_kind(key_node)}")
            if key in result:
                raise CompressorError(
                    f"{line}: {dotted((*place, key))}: this key stands twice, first at {lines[(*place, key)]}"
                )
            lines[(*place, key)] = line
            result[key] = _build(value_node, (*place, key), file, lines, inside)
        return result
    if isinstance(node, yaml.SequenceNode):
        return [_build(item, (*place, i), file, lines, inside) for i, item in enumerate(node.value)]
    try:
        return _scalar(node)
    except (ValueError, KeyError):
        raise CompressorError(f"{lines[place]}: {dotted(place)}: cannot be read as {_KINDS[kind]}") from None


def _scalar(node: yaml.Node) -> Any:
    loader = _Loader("")
    try:
        return loader.construct_object(node, deep=True)
    finally:
        loader.dispose()


def _key(node: Any, key: str, assignment: str, place: Place) -> str | int:
    if isinstance(node, dict):
        return key
    if not isinstance(node, list):
        raise CompressorError(f"--set {assignment}: {dotted(place)} should be a mapping, found {describe(node)}")
    if key in map(str, range(len(node))):
        return int(key)
    known = f"should be from 0 to {len(node) - 1}" if node else "it is empty"
    raise CompressorError(f"--set {assignment}: {dotted(place)} has no item '{key}'; {known}")


def _problem(error: Exception) -> str:
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    return f"{getattr(error, 'context', '')} {problem}" if problem.startswith("but ") else problem


def _kind(node: yaml.Node | None) -> str:
    if isinstance(node, yaml.CollectionNode):
        return "a list" if isinstance(node, yaml.SequenceNode) else "a mapping"
    return "nothing" if node is None else repr(node.value)


def describe(value: Any) -> str:
    """A value as it stands in YAML, for an error message."""
    if isinstance(value, (dict, list, tuple)):
        return "a mapping" if isinstance(value, dict) else "a list"
    if value is None or isinstance(value, bool):
        return "nothing" if value is None else str(value).lower()
    return repr(value)


def dotted(place: Place) -> str:
    """`prune[0].obs_diff.sparsity`."""
    text = ""
    for part in place:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text
