"""The pipelines that come with the package: `builtin:NAME` in a recipe. Imports no torch."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Literal

from compressor.errors import CompressorError
from compressor.options import suggest

_SHAPES = Path(__file__).parent / "shapes"


def names() -> tuple[str, ...]:
    """The known names."""
    return tuple(_index()["pipelines"])


def path(name: str) -> Path:
    """The diffusers folder of a built-in pipeline, after holding each of its weights files against its hash.

    Raises:
        CompressorError: for an unknown name, or a file that is missing or damaged.
    """
    _check_name(name)
    folder = _SHAPES / _index()["pipelines"][name]
    for file in _index()["sha256"]:
        if file.startswith(f"{folder.name}/"):
            verified(file)
    return folder


def verified(file: str) -> Path:
    """A shipped weights file, by its path inside the `shapes` folder, after holding it against its recorded hash.

    Raises:
        CompressorError: naming the file if it is missing or damaged.
    """
    expected, full = _index()["sha256"][file], _SHAPES / file
    if not full.is_file():
        raise CompressorError(f"{full}: missing; install the package again")
    with full.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != expected:
        raise CompressorError(f"{full}: damaged: expected sha256 {expected}, found {found}; install the package again")
    return full


def prompts(name: str, use: Literal["calibration", "evaluation"]) -> list[str]:
    """The captions of a built-in pipeline: one list to calibrate with, and another, disjoint one to judge by.

    Raises:
        CompressorError: for an unknown name.
    """
    _check_name(name)
    return (_SHAPES / "data" / f"{use}.txt").read_text(encoding="utf-8").splitlines()


def _check_name(name: str) -> None:
    if name not in names():
        raise CompressorError(
            f"no built-in pipeline named '{name}'{suggest(name, names())}; known: {', '.join(names())}"
        )


def _index() -> dict[str, dict[str, str]]:
    return json.loads((_SHAPES / "hashes.json").read_text(encoding="utf-8"))
