"""Progress bars with the time left, on a terminal; plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from compressor.units import duration

EVERY = 30.0
"""Seconds between two lines about the same task, where there is no terminal."""


class Progress:
    """Shows what is being done on a console.

    Attributes:
        console: where lines are printed.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self._bars: Bars | None = None
        self._lines: list[_Lines] = []

    def say(self, text: str) -> None:
        """Prints one line."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    @contextmanager
    def task(self, title: str, total: int) -> Iterator[Callable[[int], None]]:
        """Shows a bar while the block runs; call what it gives with how much was done.

        Args:
            title: what is being done.
            total: how much there is to do.
        """
        if not self.console.is_terminal:
            for outer in self._lines:
                outer.quiet = True  # the time left of a task with others inside would mislead
            self._lines.append(_Lines(self, title, total))
            try:
                yield self._lines[-1].advance
            finally:
                self._lines.pop()
            return
        with self._shown() as bars:
            task = bars.add_task(title, total=total)
            try:
                yield lambda done: bars.advance(task, done)
            finally:
                bars.stop_task(task)

    @contextmanager
    def _shown(self) -> Iterator[Bars]:
        """The bars on the screen; a task inside another one adds a bar to the same display."""
        if self._bars is not None:
            yield self._bars
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Bars(*columns, console=self.console) as bars:
            self._bars = bars
            try:
                yield bars
            finally:
                self._bars = None


class _Lines:
    """A task told in lines: at its start, every half minute with the time left, and at its end."""

    def __init__(self, progress: Progress, title: str, total: int) -> None:
        self._progress, self._title, self._total = progress, title, total
        self._done = 0
        self.quiet = False
        self._start = self._told = time.monotonic()
        progress.say(f"{title} ...")

    def advance(self, done: int) -> None:
        self._done += done
        now = time.monotonic()
        passed = now - self._start
        if self._done >= self._total:
            self._progress.say(f"{self._title}: {self._total} in {duration(passed)}")
        elif now - self._told >= EVERY and not self.quiet:
            self._told = now
            left = duration(passed * (self._total - self._done) / self._done)
            self._progress.say(f"{self._title}: {self._done} of {self._total}, about {left} left")
