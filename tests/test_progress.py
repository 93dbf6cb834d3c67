"""What is told of long work, with and without a terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from compressor import progress


def test_without_a_terminal_a_task_is_told_in_lines_with_the_time_left(monkeypatch: pytest.MonkeyPatch):
    clock = iter([0.0, 10.0, 40.0, 50.0, 80.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    written = io.StringIO()
    with progress.Progress(Console(file=written)).task("drawing", total=8) as advance:
        for _ in range(4):
            advance(2)
    assert written.getvalue().splitlines() == [
        "drawing ...",
        "drawing: 4 of 8, about 40.0 s left",
        "drawing: 8 in 1 min 20 s",
    ]


def test_on_a_terminal_a_task_inside_another_adds_a_bar():
    written = io.StringIO()
    shown = progress.Progress(Console(file=written, force_terminal=True, width=120))
    with shown.task("pruning", total=1) as outer, shown.task("calibrating", total=2) as inner:
        inner(2)
        outer(1)
    assert "pruning" in written.getvalue()
    assert "calibrating" in written.getvalue()
    assert "2/2" in written.getvalue()


def test_the_time_left_of_a_task_with_others_inside_is_not_guessed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(progress, "EVERY", 0.0)
    written = io.StringIO()
    shown = progress.Progress(Console(file=written))
    with shown.task("pruning", total=3) as outer:
        with shown.task("calibrating", total=1) as inner:
            inner(1)
        outer(1)
    assert [line.partition(":")[0] for line in written.getvalue().splitlines()] == [
        "pruning ...",
        "calibrating ...",
        "calibrating",
    ]
