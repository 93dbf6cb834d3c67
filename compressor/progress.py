"""Progress bars with the time left, on a terminal; plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars


class Progress:
    """Shows what is being done on a console.

    Attributes:
        console: where lines are printed.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self._bars: Bars | None = None

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
            start = time.monotonic()
            self.say(f"{title} ...")
            yield lambda done: None
            self.say(f"{title}: {total} in {time.monotonic() - start:.1f} s")
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
