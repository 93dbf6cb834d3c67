"""Which calls of a calibration the network runs, and what stands for the others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compressor.calibration import gradients
from compressor.calibration.foretold import foretell
from compressor.calibration.strides import Strides, all_runs, first_runs, holding, mean_runs
from compressor.plugin import MomentKind
from compressor.recipe import Calibration as Options
from tests import tiny
from tests.test_moments import Growing, Recorder, assert_near, explicit


def begun(strides: Strides, prompt: int, steps: list[int], width: int = 1) -> list[int]:
    """What the calls of a batch count; every output is the step's number."""
    strides.next_batch(prompt)
    found = []
    for step in steps:
        found.append(strides.begin(step, (), {"x": torch.zeros(width)}))
        assert strides.held == (found[-1] == 0)
        if found[-1]:
            strides.keep((torch.tensor(step),))
    return found


def test_the_network_runs_at_the_first_step_and_at_one_of_every_stride_that_moves_on_with_the_batch():
    strides, steps = Strides(4, 2), list(range(10))
    assert begun(strides, 0, steps) == [1, 0, 0, 0, 4, 0, 0, 0, 4, 0]
    assert begun(strides, 2, steps) == [1, 4, 0, 0, 0, 4, 0, 0, 0, 4]
    assert begun(strides, 6, steps) == [1, 0, 0, 4, 0, 0, 0, 4, 0, 0]
    assert begun(strides, 8, steps) == begun(strides, 0, steps)  # whatever was sampled before
    assert (strides.ran, strides.stood) == (16, 34)


@pytest.mark.parametrize(("steps", "stride"), [(25, 1), (25, 2), (20, 3), (7, 7), (1, 2), (4, 9)])
def test_in_as_many_batches_as_a_stride_has_steps_every_step_counts_the_same(steps, stride):
    strides = Strides(stride, 4)
    found = [begun(strides, 4 * batch, list(range(steps))) for batch in range(stride)]
    assert [sum(of_step) for of_step in zip(*found, strict=True)] == [stride] * steps
    assert strides.ran == all_runs(steps, stride, stride) == pytest.approx(stride * mean_runs(steps, stride))
    assert sum(map(bool, found[0])) == first_runs(steps, stride)


def test_calls_of_a_step_are_told_apart_by_order_and_shapes():
    """Such as one with the prompt and one without, of equal lengths or not."""
    strides = Strides(2, 1)
    strides.next_batch(0)
    seen: list[tuple[int, int, float]] = []
    for step in range(3):
        for call, width in enumerate((1, 1, 5)):
            counts = strides.begin(step, (torch.zeros(width),), {"guidance": 1.0})
            if counts:
                strides.keep([torch.tensor(10.0 * step + call)])
            else:
                seen.append((step, call, strides.output()[0].item()))
    assert seen == [(1, 0, 0.0), (1, 1, 1.0), (1, 2, 2.0)]


def test_a_call_of_which_there_is_nothing_yet_runs_and_counts_for_itself():
    strides = Strides(4, 1)
    assert begun(strides, 0, [0, 1]) == [1, 0]
    assert strides.begin(2, (torch.zeros(7),), {}) == 1  # as where a pipeline ends its guidance: in every batch
    strides.keep(torch.ones(7))
    assert strides.begin(3, (torch.zeros(7),), {}) == 0
    assert strides.output().sum() == 7


def test_a_second_call_at_a_step_where_the_first_step_had_one_is_held_by_that():
    """Heun's calls: one at the first step, then two."""
    strides = Strides(2, 1)
    assert begun(strides, 0, [0, 1, 1, 2, 2, 3, 3]) == [1, 0, 0, 2, 2, 0, 0]
    assert strides.output()[0] == 2


def test_what_stands_for_calls_is_not_what_the_pipeline_changed():
    strides = Strides(3, 1)
    network = nn.Linear(2, 2)
    calls: list[Tensor] = []
    network.register_forward_pre_hook(
        lambda _m, args, kwargs: calls.append(torch.tensor(strides.begin(len(calls), args, kwargs))), with_kwargs=True
    )
    own = network.forward
    with torch.no_grad(), holding(network, strides):
        first = network(torch.ones(2))
        expected = first.clone()
        for _ in range(2):
            first.zero_()
            first = network(torch.zeros(2))
            assert torch.equal(first, expected)
        assert torch.equal(network(torch.zeros(2)), network.bias)
    assert network.forward == own


def collect(kind: MomentKind, packages: int = 1, record: bool = False, **options: Any) -> tuple[dict, Any, Any]:
    loaded = tiny.load("sd3")
    calibration = tiny.calibrate(loaded, packages=packages, **options)
    recorder = Recorder(loaded) if record else None
    found = {}
    for package in calibration.packages(loaded.targets, kind):
        found |= calibration.collect(package, kind, Growing())
    return found, calibration, recorder


@pytest.mark.parametrize("kind", ["second", "norms"])
def test_moments_are_of_the_calls_that_ran_each_times_what_it_stands_for(kind: MomentKind):
    """Two batches, of two prompts and of one, of 6 steps: 0, 3 and 0, 1, 4."""
    found, calibration, recorder = collect(kind, record=True, steps=6, stride=3)
    assert (calibration.facts.forwards, calibration.facts.stood) == (5, 7)
    weights = [1.0, 3 * 4.0, 1.0, 3 * 2.0, 3 * 5.0]
    for name, moments in found.items():
        second_II, total_I, squares_I = explicit(recorder.inputs[name], weights)
        assert_near(moments.total_I, total_I)
        assert_near(moments.squares_I, squares_I)
        if moments.second_II is not None:
            assert_near(moments.second_II, second_II)


def test_a_share_of_the_tokens_is_one_of_the_forwards_that_run():
    found, calibration, recorder = collect("second", record=True, steps=7, stride=2, tokens=0.5)
    assert calibration.facts.forwards == 8
    for name, moments in found.items():
        assert 2 * int(moments.tokens) == sum(x.numel() // x.shape[-1] for x in recorder.inputs[name])


def test_gradients_are_of_calls_that_run_and_all_packages_take_the_same(monkeypatch):
    monkeypatch.setattr(gradients, "share_of", lambda *_: 0.5)
    together, calibration, _ = collect("gradients", steps=9, stride=2)
    facts = calibration.facts
    assert (facts.forwards, facts.stood) == (10, 8)
    assert 1 <= facts.differentiated < 10
    apart, again, _ = collect("gradients", steps=9, stride=2, packages=3)
    assert again.facts.differentiated == 3 * facts.differentiated
    for name, moments in together.items():
        assert int(apart[name].tokens) == int(moments.tokens) > 0


def test_latents_move_on_as_in_longer_steps():
    """A rectified flow by Euler's method, with the network's output of every other of six steps."""
    loaded = tiny.load("sd3")
    calibration = tiny.calibrate(loaded, steps=6, stride=2, batch=3, packages=1)
    (package,) = calibration.packages(loaded.targets, "norms")
    given: list[dict[str, Any]] = []
    handle = loaded.module.register_forward_pre_hook(lambda _m, _a, kwargs: given.append(kwargs), with_kwargs=True)
    calibration.collect(package, "norms", Growing())
    handle.remove()
    assert (len(given), calibration.facts.forwards) == (6, 3)
    sigmas = loaded.pipe.scheduler.sigmas
    latents = given[0]["hidden_states"].chunk(2)[0]
    velocity = torch.zeros_like(latents)
    for step, kwargs in enumerate(given):
        torch.testing.assert_close(kwargs["hidden_states"].chunk(2)[0], latents, rtol=1e-4, atol=1e-5)
        if step % 2 == 0:
            with torch.no_grad():
                empty, guided = loaded.module(**kwargs)[0].chunk(2)
            velocity = empty + 3.0 * (guided - empty)
        latents = latents + (sigmas[step + 1] - sigmas[step]) * velocity


def test_a_warning_of_too_few_tokens_counts_the_steps_that_run():
    loaded = tiny.load("sd3")
    notes = {}
    for stride in (1, 4):
        options = Options.model_validate({"prompts": ["a"], "steps": 5, "stride": stride})
        notes[stride] = list(foretell(loaded.targets, tiny.traced(loaded), "second", 1, False, options))
    assert not notes[1]
    (found,) = notes[4]
    assert "transformer_blocks.0.ff.net.2 sees 32 for 64 inputs; about 2 prompts would do" in found


def test_a_stride_beyond_the_steps_is_refused_where_it_was_asked_for():
    with pytest.raises(ValueError, match="stride should be at most steps, 1, found 2"):
        Options.model_validate({"prompts": ["a"], "steps": 1, "stride": 2})
    assert Options.model_validate({"prompts": ["a"], "steps": 1}).stride == 2  # which changes nothing
