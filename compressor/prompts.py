"""Reads prompts from a list, a text file, a column of a table, or a built-in list, and draws some of them."""

from __future__ import annotations

import csv
import random
from pathlib import Path
from typing import Literal

from compressor import builtin
from compressor.errors import CompressorError
from compressor.recipe import Prompts


def read(prompts: Prompts, use: Literal["calibration", "evaluation"]) -> tuple[str, ...]:
    """All the prompts that a recipe names, blank ones left out.

    Args:
        prompts: where they are.
        use: which of two disjoint lists to take of what is built in.

    Raises:
        CompressorError: if the file is missing, unreadable or empty, or has no such column, or nothing of that name is
            built in.
    """
    if prompts.builtin is not None:
        found = builtin.prompts(prompts.builtin, use)
        origin = f"builtin:{prompts.builtin}"
    elif prompts.file is not None:
        found = _read_file(Path(prompts.file), prompts.column)
        origin = prompts.file if prompts.column is None else f"{prompts.file} (column '{prompts.column}')"
    else:
        found = list(prompts.texts or ())
        origin = "the recipe's list"
    kept = tuple(text for text in (line.strip() for line in found) if text)
    if not kept:
        raise CompressorError(f"prompts: {origin} holds no prompts; should hold at least one")
    return kept


def draw(prompts: tuple[str, ...], samples: int, seed: int) -> tuple[str, ...]:
    """`samples` different prompts in an order that the seed decides, or all of them if there are no more."""
    return tuple(random.Random(seed).sample(prompts, min(samples, len(prompts))))


def _read_file(file: Path, column: str | None) -> list[str]:
    table = {".csv": ",", ".tsv": "\t"}.get(file.suffix.lower())
    if column is not None and table is None:
        raise CompressorError(f"prompts: column '{column}' needs a .csv or .tsv file, found {file}")
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            if table is None:
                return stream.read().splitlines()
            rows = csv.DictReader(stream, delimiter=table)
            header = list(rows.fieldnames or [])
            if not header:
                raise CompressorError(f"prompts: {file} is empty; should be a table with a line of column names")
            if column is None:
                raise CompressorError(f"prompts: {file} is a table; column should say which of {', '.join(header)}")
            if column not in header:
                raise CompressorError(f"prompts: {file} has no column '{column}'; it has {', '.join(header)}")
            return [row[column] or "" for row in rows]
    except FileNotFoundError:
        raise CompressorError(f"prompts: no such file: {file}") from None
    except OSError as error:
        raise CompressorError(f"prompts: {file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise CompressorError(f"prompts: {file} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    except csv.Error as error:
        raise CompressorError(f"prompts: {file} is no table that can be read: {error}") from None
