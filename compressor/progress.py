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

    def __init__(self, console: Console | None = None):
        self.console = console or Console(stderr=True)

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
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Bars(*columns, console=self.console) as bars:
            task = bars.add_task(title, total=total)
            yield lambda done: bars.advance(task, done)
