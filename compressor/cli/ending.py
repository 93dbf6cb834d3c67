"""How a command ends that does not end well: errors in words, and what Ctrl-C does."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import click

from compressor.errors import CompressorError


def in_words(error: CompressorError) -> str:
    """One line for one mistake, a heading over several."""
    return f"error: {error}" if "\n" not in str(error) else f"errors:\n{error}"


@contextmanager
def importing() -> Iterator[None]:
    """While it lasts, Ctrl-C ends the process at once: torch, half imported, would swallow a KeyboardInterrupt.

    Nor is garbage looked for, which takes a fifth of the time that the imports do: what they make stays.
    """

    def end(_number: int, _frame: object) -> None:
        click.echo("\ninterrupted: nothing was begun", err=True)
        os._exit(130)

    before = signal.signal(signal.SIGINT, end)
    collected = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collected:
            gc.enable()
        signal.signal(signal.SIGINT, before)


@contextmanager
def noting(interrupts: list[int]) -> Iterator[None]:
    """Notes every Ctrl-C: libraries such as torch's exporter turn a KeyboardInterrupt into errors of their own."""
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler:  # ignored, or somebody else's
        yield
        return

    def note(number: int, frame: FrameType | None) -> None:
        interrupts.append(number)
        signal.default_int_handler(number, frame)

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def stamp(file: Path) -> int | None:
    """Changes when the file is replaced."""
    try:
        return file.stat().st_ino
    except OSError:
        return None
