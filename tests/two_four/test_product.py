"""The products' recording, with a GPU that is only played."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from compressor.two_four import product


def test_a_call_is_recorded_and_replayed_on_its_own_gpu(monkeypatch: pytest.MonkeyPatch):
    now = [torch.device("cuda:0")]
    done: list[tuple[str, torch.device]] = []

    @contextmanager
    def device(index: torch.device) -> Iterator[None]:
        now.append(index)
        yield
        now.pop()

    @contextmanager
    def graph(_graph: object) -> Iterator[None]:
        done.append(("record", now[-1]))
        yield

    @contextmanager
    def stream(_stream: object) -> Iterator[None]:
        yield

    class Stream:
        def __init__(self) -> None:
            done.append(("stream", now[-1]))

        def wait_stream(self, _other: object) -> None:
            pass

    class Graph:
        def replay(self) -> None:
            done.append(("replay", now[-1]))

    for name, fake in {
        "device": device,
        "graph": graph,
        "stream": stream,
        "Stream": Stream,
        "CUDAGraph": Graph,
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    given = torch.device("cuda:1")

    def call() -> str:
        done.append(("call", now[-1]))
        return "a result"

    replay = product.record(call, given)
    assert replay() == "a result"
    assert {where for _, where in done} == {given}
    assert [what for what, _ in done if what != "stream"] == ["call", "call", "record", "call", "replay"]
    assert now == [torch.device("cuda:0")]
