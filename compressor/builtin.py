"""The pipelines that ship with the package: finds their folders by name, and sees that no weights file is damaged.

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


def names() -> tuple[str, ...]:
    """The built-in pipelines, as they are written after `builtin:`."""
    return tuple(sorted(_index(_SHAPES)["pipelines"]))


def path(name: str) -> Path:
    """The diffusers folder of a built-in pipeline, after every weights file in it was checked against its hash.

    Args:
        name: One of `names()`.

    Raises:
        CompressorError: There is no such pipeline, or one of its weights files is damaged or missing.
    """
    _known(name)
    folder = _index(_SHAPES)["pipelines"][name]
    verify(_SHAPES, folder)
    return _SHAPES / folder


def prompts(name: str, use: Literal["calibration", "evaluation"]) -> list[str]:
    """The captions that ship with a built-in pipeline: two lists without a caption in common.

    Args:
        name: One of `names()`.
        use: Which list.

    Raises:
        CompressorError: There is no such pipeline.
    """
    _known(name)
    return (_SHAPES / "data" / f"{use}.txt").read_text(encoding="utf-8").splitlines()


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


def _known(name: str) -> None:
    known = names()
    if name not in known:
        hint = suggest(name, known) or ";"
        raise CompressorError(f"no built-in pipeline named '{name}'{hint} known: {', '.join(known)}")


def _index(root: Path) -> dict[str, dict[str, str]]:
    file = root / "hashes.json"
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CompressorError(f"{file}: missing or damaged: {error}; install the package anew") from None
