"""What ships with the package under `builtin:NAME`: pipelines, whose weights are checked for damage, and prompts.

Imports neither torch nor diffusers, so that a recipe can be checked at once.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Literal

from compressor.errors import CompressorError
from compressor.options import suggest

_SHAPES = Path(__file__).parent / "shapes"
_CAPTIONS = Path(__file__).parent / "captions"


def names() -> tuple[str, ...]:
    """The built-in pipelines, as they are written after `builtin:`."""
    return tuple(sorted(_index(_SHAPES)["pipelines"]))


def prompt_names() -> tuple[str, ...]:
    """The built-in prompts: `captions` for models of the world, and each built-in pipeline's own."""
    return ("captions", *names())


def path(name: str) -> Path:
    """The diffusers folder of a built-in pipeline, after every weights file in it was checked against its hash.

    Args:
        name: One of `names()`.

    Raises:
        CompressorError: There is no such pipeline, or one of its weights files is damaged or missing.
    """
    _known("pipeline", name, names())
    folder = _index(_SHAPES)["pipelines"][name]
    verify(_SHAPES, folder)
    return _SHAPES / folder


def prompts(name: str, use: Literal["calibration", "evaluation"]) -> list[str]:
    """The prompts that ship under a name: two lists without a caption in common.

    Args:
        name: One of `prompt_names()`.
        use: Which list.

    Raises:
        CompressorError: There are no such prompts.
    """
    _known("prompts", name, prompt_names())
    folder = _CAPTIONS if name == "captions" else _SHAPES / "data"
    return (folder / f"{use}.txt").read_text(encoding="utf-8").splitlines()


def verify(root: Path, within: str) -> None:
    """Checks weights against the hashes shipped beside them.

    Args:
        root: A folder with `hashes.json`, which lists files by their path from there.
        within: The folder or file under `root` that is to be checked.

    Raises:
        CompressorError: A listed file is damaged or missing.
    """
    for relative, expected in _index(root)["sha256"].items():
        if relative != within and not relative.startswith(within + "/"):
            continue
        file = root / relative
        if not file.is_file():
            raise CompressorError(f"{file}: weights file is missing; expected one with sha256 {expected}")
        found = hashlib.sha256(file.read_bytes()).hexdigest()
        if found != expected:
            raise CompressorError(
                f"{file}: weights file is damaged; found sha256 {found}, expected {expected}; install the package anew"
            )


def _known(what: str, name: str, known: tuple[str, ...]) -> None:
    if name not in known:
        hint = suggest(name, known) or ";"
        raise CompressorError(f"no built-in {what} named '{name}'{hint} known: {', '.join(known)}")


def _index(root: Path) -> dict[str, dict[str, str]]:
    file = root / "hashes.json"
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CompressorError(f"{file}: missing or damaged: {error}; install the package anew") from None
