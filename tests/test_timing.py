"""Where the time of a run went: moments told apart from forwards, and phases that add up."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from compressor_obs_diff.weightings import Uniform

from compressor.calibration import timing
from compressor.measure import Stopwatch
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


def test_every_addition_to_the_moments_is_timed_and_nothing_else(monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(next(ticks)))  # one second a reading
    loaded = tiny.load("sd3")
    calibration = tiny.calibrate(loaded, packages=1)
    (package,) = calibration.packages(loaded.targets, "norms")
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


@pytest.mark.parametrize("pruner", ["obs_diff", "magnitude"])
def test_the_report_of_a_run_says_where_the_time_went(pruner, tmp_path):
    run(recipe(tmp_path / "out", {pruner: {"sparsity": 0.5}}), tiny.quiet())
    times = json.loads((tmp_path / "out" / "report.json").read_text())["times"]
    calibrating = ["forwards", "moments"] if pruner == "obs_diff" else []
    assert list(times) == ["load", "encode", "measure", "draw", *calibrating, "solves", "check", "save"]
    assert all(seconds >= 0 for seconds in times.values())
    assert sum(times.values()) > 0


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
