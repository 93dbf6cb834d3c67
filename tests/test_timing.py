"""Where the time of a run went: moments told apart from forwards, and phases that add up."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from compressor_obs_diff.weightings import Uniform
from compressor_onnx import ONNX

from compressor import measure
from compressor.calibration import timing
from compressor.measure import Stopwatch
from compressor.plugin import Export
from compressor.recipe import Recipe
from compressor.run import run
from tests import tiny


def recipe(output: Path, pruner: dict) -> Recipe:
    return Recipe.model_validate(
        {
            "model": str(tiny.folder("sd3")),
            "device": "cpu",
            "calibration": {"prompts": ["a cat"], "steps": 1, "height": tiny.SIDE, "width": tiny.SIDE},
            "prune": [pruner],
            "report": {"images": 0, "prompts": ["a cat"]},
            "output": str(output),
        }
    )


def test_blocks_add_up_and_what_lies_between_them_does_not_count(monkeypatch):
    clock = iter([1.0, 3.0, 10.0, 10.5])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    meter = timing.Meter(torch.device("cpu"))
    for _ in range(2):
        with meter.block():
            pass
    meter.settle()
    assert meter.seconds == 2.5


def test_blocks_that_are_rare_stand_for_no_others(monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(next(clock)))
    meter = timing.Meter(torch.device("cpu"))
    for forward in range(60):
        meter.next_forward()
        if forward % 6 == 0:
            with meter.block(rare=True):
                pass
    assert meter.seconds == 10


def test_on_a_gpu_one_forward_in_eight_stands_for_all_but_the_first(monkeypatch):
    made, taken = 0, 0.0

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            nonlocal made
            made += enable_timing

        def record(self, stream: object) -> None:
            pass

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, _end: object) -> float:
            return 1000 * taken

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: None)
    meter = timing.Meter(torch.device("cuda"))
    for forward in range(20):
        taken = 1.0 if forward else 60.0
        meter.next_forward()
        for _ in range(3):
            with meter.block():
                pass
        meter.settle()
    assert meter.seconds == 3 * 60 + 19 * 3
    assert made == 2 * 3  # events are used again


def test_forwards_that_are_settled_together_stand_for_all_as_well(monkeypatch):
    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: object) -> None:
            pass

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, _end: object) -> float:
            return 1000.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: None)
    meter = timing.Meter(torch.device("cuda"))
    for _ in range(20):  # of which the first, the second, the tenth and the eighteenth are timed
        meter.next_forward()
        with meter.block():
            pass
        meter.replay(timing.Events())  # one that adds to no moments
    meter.settle()
    assert meter.seconds == 20


@pytest.mark.parametrize("blocks", [1, 3, 12])
def test_of_forwards_that_are_replayed_the_last_and_some_of_its_blocks_stand_for_all(monkeypatch, blocks):
    made = 0

    class Event:
        def __init__(self, *, enable_timing: bool, external: bool = False) -> None:
            nonlocal made
            made += enable_timing and external

        def record(self, stream: object) -> None:
            pass

        def elapsed_time(self, _end: object) -> float:
            return 1000.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    meter = timing.Meter(torch.device("cuda"))
    meter.next_forward()
    with meter.recording() as events:
        for _ in range(blocks):
            with meter.block():
                pass
    for _ in range(2):
        meter.replay(events)
    meter.settle()
    meter.settle()
    assert meter.seconds == 2 * blocks
    assert made == 2 * -(-blocks // timing.SAMPLED)


@pytest.mark.parametrize("period", [5, 7, 8, 10])
def test_blocks_of_which_one_in_a_few_is_long_are_timed_in_their_share(monkeypatch, period):
    """Such as inputs of a block of layers: as many come again and again, and one of them is much wider."""
    taken = 1.0

    class Event:
        def __init__(self, *, enable_timing: bool, external: bool) -> None:
            self.seconds = taken

        def record(self, stream: object) -> None:
            pass

        def elapsed_time(self, _end: object) -> float:
            return 1000 * self.seconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: None)
    for long in range(period):
        meter = timing.Meter(torch.device("cuda"))
        with meter.recording() as events:
            for i in range(24 * period):
                taken = 16.0 if i % period == long else 1.0
                with meter.block(taken):
                    pass
        assert events.seconds() == 24 * (period - 1 + 16)


def test_every_addition_to_the_moments_is_timed_and_nothing_else(monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(next(ticks)))  # one second a reading
    loaded = tiny.load("sd3")
    calibration = tiny.calibrate(loaded, packages=1)
    (package,) = calibration.packages(loaded.targets, "norms", tiny.no_workspace)
    calibration.collect(package, "norms", Uniform())
    assert calibration.facts.moment_seconds == calibration.facts.forwards * len(package.groups) > 0


def test_a_part_of_a_phase_that_is_told_apart_stands_before_it():
    watch = Stopwatch()
    watch.seconds.update({"load": 1.0, "check": 10.0, "save": 2.0})
    watch.move("check", "forwards", 4.0)
    watch.move("check", "solves", 5.0)
    watch.move("check", "forwards", 0.5)
    assert watch.seconds == {"load": 1.0, "solves": 5.0, "forwards": 4.5, "check": 0.5, "save": 2.0}
    assert list(watch.seconds) == ["load", "solves", "forwards", "check", "save"]
    assert sum(watch.seconds.values()) == 13.0


def test_a_block_in_which_memory_runs_out_does_not_count(monkeypatch):
    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            self.recorded = not enable_timing

        def record(self, stream: object) -> None:
            self.recorded = True

        def synchronize(self) -> None:
            assert self.recorded

        def elapsed_time(self, end: Event) -> float:
            assert end.recorded
            return 1000.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: None)
    meter = timing.Meter(torch.device("cuda"))
    meter.next_forward()
    with pytest.raises(torch.OutOfMemoryError), meter.block():
        raise torch.OutOfMemoryError
    with meter.block():
        pass
    meter.settle()
    assert meter.seconds == 1


@pytest.mark.parametrize("pruner", ["obs_diff", "magnitude"])
def test_the_report_of_a_run_says_where_the_time_went(pruner, tmp_path):
    run(recipe(tmp_path / "out", {pruner: {"sparsity": 0.5}}), tiny.quiet())
    times = json.loads((tmp_path / "out" / "report.json").read_text())["times"]
    calibrating = ["forwards", "moments"] if pruner == "obs_diff" else []
    assert list(times) == ["load", "encode", "measure", "draw", *calibrating, "solves", "check", "save"]
    assert all(seconds >= 0 for seconds in times.values())
    assert sum(times.values()) > 0


def test_the_end_of_a_phase_waits_for_the_gpu_of_the_job_and_for_no_other(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    watch = Stopwatch()
    for device in (None, torch.device("cpu"), torch.device("cuda:1")):
        watch.device = device
        with watch.phase("load"):
            pass
    assert waited == [torch.device("cuda:1")]


def test_the_peak_is_that_of_the_gpu_of_the_job(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda *device: {"cuda:1": 7}[str(*device)])
    assert measure.peak_memory(torch.device("cuda:1"))["gpu_allocated"] == 7
    assert measure.peak_memory(torch.device("cpu")).keys() == {"cpu_resident"}


def test_blocks_on_a_gpu_are_timed_on_its_own_stream(monkeypatch):
    recorded = []

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: object = "the current GPU's") -> None:
            recorded.append(stream)

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, _end: object) -> float:
            return 1500.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *device: f"stream of {device[0]}")
    meter = timing.Meter(torch.device("cuda:1"))
    with meter.block():
        pass
    meter.settle()
    assert recorded == ["stream of cuda:1"] * 2
    assert meter.seconds == 1.5


def test_a_run_waits_for_its_device_and_exports_with_it_as_the_current_one(monkeypatch, tmp_path):
    made_current, watches, exported_on = [], [], []

    @contextmanager
    def current(device: torch.device) -> Iterator[None]:
        made_current.append(device)
        yield
        made_current.clear()

    class Watch(Stopwatch):
        def __init__(self) -> None:
            super().__init__()
            watches.append(self)

    def export(_self: ONNX, _pipeline: object, _folder: Path) -> Export:
        exported_on.extend(made_current)
        return Export((), {})

    monkeypatch.setattr("compressor.pipeline.current", current)
    monkeypatch.setattr("compressor.run.Stopwatch", Watch)
    monkeypatch.setattr(ONNX, "export", export)
    given = recipe(tmp_path / "out", {"magnitude": {"sparsity": 0.5}})
    run(given.model_copy(update={"export": (ONNX(),)}), tiny.quiet())
    assert exported_on == [torch.device("cpu")]
    assert [watch.device for watch in watches] == [torch.device("cpu")] * 2


@pytest.mark.gpu
def test_on_a_gpu_the_blocks_are_timed_between_events():
    device = torch.device("cuda")
    meter = timing.Meter(device)
    a_II = torch.randn(4096, 4096, device=device)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(8):
        with meter.block():
            torch.mm(a_II, a_II)
    end.record()
    meter.settle()
    whole = begin.elapsed_time(end) / 1000
    assert 0.5 * whole < meter.seconds <= whole
