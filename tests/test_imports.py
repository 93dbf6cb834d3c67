"""Who imports whom: one direction, from the command line down to the errors."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = (
    ("errors", "units"),
    ("options", "located_yaml"),
    ("plugin", "builtin"),
    ("registry", "shapes"),
    ("recipe",),
    ("meta", "prompts", "progress", "structure", "sparsity", "output", "ranks"),
    ("shrunk", "two_four"),
    ("weights", "rehearsal", "offload"),
    ("pipeline",),
    ("calibration", "checkpoint", "onnx_files", "report"),
    ("pictures", "measure", "entries"),
    ("twin",),
    ("prepare", "exported"),
    ("pruning", "plan"),
    ("run", "compare", "plan_table", "doctor", "quiet", "bench"),
    ("cli", "__init__"),
    ("__main__",),
)
"""Modules and packages of `compressor`, lowest first: each may import those of the floors below it, and itself."""

FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}
FOR_PLUGINS = {
    *("plugin", "errors", "options", "registry", "calibration", "structure", "sparsity", "onnx_files"),
    "two_four",
}
FOR_LIBRARIES = {"structure": {"errors"}, "sparsity": set(), "errors": set(), "units": set()}
FILES = sorted(file for root in ("compressor", "plugins", "exporters") for file in (ROOT / root).rglob("*.py"))


def imported(file: Path) -> Iterator[tuple[str, int]]:
    """Dotted names that a file imports when it runs, in functions too, with their lines; not those for types alone."""
    waiting: list[ast.AST] = [ast.parse(file.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            waiting += node.orelse
        elif isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: a relative import"
            for alias in node.names:
                deeper = node.module == "compressor" and alias.name in FLOOR
                yield f"{node.module}.{alias.name}" if deeper else str(node.module), node.lineno
        else:
            waiting += ast.iter_child_nodes(node)


def part_of(file: Path) -> str:
    """The module or package directly below `compressor` that a file belongs to."""
    return file.relative_to(ROOT / "compressor").parts[0].removesuffix(".py")


def test_every_module_has_its_floor():
    parts = {part_of(file) for file in FILES if file.is_relative_to(ROOT / "compressor")}
    assert parts == set(FLOOR)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_a_file_imports_only_what_lies_below_it(file):
    below = []
    for name, line in imported(file):
        package, _, rest = name.partition(".")
        if not package.startswith("compressor"):
            continue
        where = f"{file.relative_to(ROOT)}:{line}: imports {name}"
        target = rest.partition(".")[0] or "errors"  # `from compressor import CompressorError` is as good
        if not file.is_relative_to(ROOT / "compressor"):
            own = file.relative_to(ROOT).parts[1]
            if package != own and not (package == "compressor" and target in FOR_PLUGINS):
                below.append(where)
        elif package != "compressor":
            below.append(where)  # only the registry reaches plugins and exporters, by entry point
        elif target != part_of(file):
            allowed = FOR_LIBRARIES.get(part_of(file))
            if FLOOR[target] >= FLOOR[part_of(file)] or (allowed is not None and target not in allowed):
                below.append(where)
    assert not below, "\n".join(below)


def test_only_folders_stand_in_the_source_roots_and_each_package_is_typed():
    for root in ("plugins", "exporters"):
        found = [path for path in (ROOT / root).iterdir() if path.name != "__pycache__"]
        assert all(path.is_dir() and path.name.startswith("compressor_") for path in found), found
        assert all((path / "py.typed").is_file() for path in found), found
    assert (ROOT / "compressor" / "py.typed").is_file()
