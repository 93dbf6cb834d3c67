"""Which calls of a calibration the network runs, and what stands for the others."""

from __future__ import annotations

import dataclasses
import json
import shutil
from importlib import import_module
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_lcm import LCMScheduler
from torch import Tensor, nn

from compressor.calibration import gradients
from compressor.calibration.calls import Calls
from compressor.calibration.coupled import Coupled
from compressor.calibration.foretold import foretell, foretell_sampling
from compressor.calibration.noise import adds_noise
from compressor.calibration.strides import Strides, all_runs, first_runs, holding, mean_runs, stride_of
from compressor.plan import Plan, plan
from compressor.plugin import MomentKind
from compressor.recipe import Calibration as Options
from compressor.recipe import Recipe
from tests import tiny
from tests.test_calls import collect, drawn
from tests.test_moments import Growing, assert_near, explicit


def begun(strides: Strides, prompt: int, steps: list[int], width: int = 1) -> list[int]:
    """What the calls of a batch count; every output is the step's number."""
    strides.next_batch(prompt)
    found = []
    for step in steps:
        found.append(strides.begin(step, (), {"x": torch.zeros(width)}))
        assert strides.runs == (found[-1] > 0)
        if found[-1]:
            strides.keep((torch.tensor(step),))
    return found


def test_the_network_runs_at_the_first_step_and_at_one_of_every_stride_that_moves_on_with_the_batch():
    strides, steps = Strides(4, 2), list(range(10))
    assert begun(strides, 0, steps) == [1, 0, 0, 0, 4, 0, 0, 0, 4, 0]
    assert begun(strides, 2, steps) == [1, 4, 0, 0, 0, 4, 0, 0, 0, 4]
    assert begun(strides, 6, steps) == [1, 0, 0, 4, 0, 0, 0, 4, 0, 0]
    assert begun(strides, 8, steps) == begun(strides, 0, steps)  # whatever was sampled before
    assert (strides.ran, strides.held) == (16, 34)


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


def test_a_second_call_that_begins_later_runs_where_it_begins():
    """Heun's calls, one at the first timestep and then two; or guidance that begins late."""
    strides = Strides(2, 1)
    assert begun(strides, 0, [0, 1, 1, 2, 2, 3, 3]) == [1, 0, 1, 2, 2, 0, 0]
    assert begun(strides, 1, [0, 1, 1, 2, 2, 3, 3]) == [1, 2, 1, 0, 0, 2, 2]
    assert strides.output()[0] == 3


def test_what_is_held_is_not_what_the_pipeline_changed():
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


@pytest.mark.parametrize("kind", ["second", "norms"])
def test_moments_are_of_the_calls_that_ran_each_times_what_it_stands_for(kind: MomentKind):
    """Two batches, of two prompts and of one, of 6 steps: 0, 3 and 0, 1, 4."""
    found, calibration, recorder = collect(kind, record=True, steps=6, stride=3)
    assert (calibration.facts.forwards, calibration.facts.held) == (5, 7)
    weights = [1.0, 3 * 4.0, 1.0, 3 * 2.0, 3 * 5.0]
    for name, moments in found.items():
        second_II, total_I, squares_I = explicit(recorder.inputs[name], weights)
        assert_near(moments.total_I, total_I)
        assert_near(moments.squares_I, squares_I)
        if moments.second_II is not None:
            assert_near(moments.second_II, second_II)


def test_a_share_of_the_tokens_is_one_of_the_forwards_that_run():
    found, calibration, recorder = collect("second", record=True, steps=7, stride=2, tokens=0.5)
    steps = [0, 2, 4, 6, 0, 1, 3, 5]
    assert calibration.facts.forwards == len(steps)
    calls = Calls(0.5, 0, 4, 2, 2)
    times = [of for batch in (0, 2) for of in drawn(calls, batch, 4)]
    assert 0 in times
    weights = [(step + 1) * (2 if step else 1) * each for step, each in zip(steps, times, strict=True)]
    for name, moments in found.items():
        assert_near(moments.second_II, explicit(recorder.inputs[name], weights)[0])


@pytest.mark.parametrize(
    ("stride", "share"), [(2, 0.5), (2, 0.25), (4, 0.25), (3, 0.25), (4, 0.125), (1, 0.5), (2, 0.2)]
)
def test_with_a_share_of_the_tokens_too_every_step_counts_the_same_over_enough_batches(stride, share):
    steps, batches = 24, round(stride / share)
    strides, calls = Strides(stride, 4), Calls(share, 0, 10**6, 4, stride)
    sums = [0.0] * steps
    for prompt in range(4 * stride, 4 * stride + 4 * batches, 4):  # all but the first round, which calls see to
        counts = begun(strides, prompt, list(range(steps)))
        calls.next_batch(prompt)
        for step, count in enumerate(counts):
            sums[step] += count * calls.next_call() if count else 0
    assert sums == pytest.approx([batches] * steps)


def test_of_few_runs_and_a_small_share_one_is_summed_in_the_first_batch():
    found, *_ = collect("second", batch=3, steps=8, stride=4, tokens=0.1)
    whole, *_ = collect("second", batch=3, steps=1)
    assert all(int(moments.tokens) == int(whole[name].tokens) for name, moments in found.items())


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_gradients_count_as_many_steps_as_their_call_stands_for(share, monkeypatch):
    monkeypatch.setattr(gradients, "share_of", lambda *_: share)
    weights: list[tuple[int, float]] = []
    add = Coupled.add

    def watched(self, found, squares, scale, weight):
        weights.append((calibration_steps[-1], float(weight)))
        add(self, found, squares, scale, weight)

    monkeypatch.setattr(Coupled, "add", watched)
    calibration_steps: list[int] = []
    begin = Strides.begin

    def stepped(self, step, args, kwargs):
        calibration_steps.append(step)
        return begin(self, step, args, kwargs)

    monkeypatch.setattr(Strides, "begin", stepped)
    _, calibration, _ = collect("gradients", steps=9, stride=3)
    assert len(weights) == calibration.facts.differentiated > 2
    assert all(weight == (step + 1) * (3 if step else 1) for step, weight in weights)
    if share == 1:
        assert [step for step, _ in weights] == [0, 3, 6, 0, 1, 4, 7]


def test_gradients_are_of_enough_of_the_calls_that_run():
    """Of 3 prompts and 90 steps a sixth would be too few: 200 of the 3 x 30.67 that run are more than all of them."""
    loaded = tiny.load("sd3")
    assert tiny.calibrate(loaded, steps=90, stride=3)._differentiated._share == 1
    assert tiny.calibrate(loaded, steps=90, stride=1)._differentiated._share == pytest.approx(200 / 270)
    options = {"prompts": ["a"], "steps": 90, "tokens": 0.9, "batch": 1}
    notes = {
        stride: list(foretell(loaded.targets, tiny.traced(loaded), "gradients", 3, True, Options(**options), stride))
        for stride in (1, 3)
    }
    assert len(notes[1]) == 1
    assert notes[1][0].startswith("calibration.tokens has no effect: gradients are gathered, for which 74.1 % ")
    assert notes[3] == []  # there it has one


def test_gradients_are_of_calls_that_run_and_all_packages_take_the_same(monkeypatch):
    monkeypatch.setattr(gradients, "share_of", lambda *_: 0.5)
    together, calibration, _ = collect("gradients", steps=9, stride=2)
    facts = calibration.facts
    assert (facts.forwards, facts.held) == (10, 8)
    assert 1 <= facts.differentiated < 10
    apart, again, _ = collect("gradients", steps=9, stride=2, packages=3)
    assert again.facts.differentiated == 3 * facts.differentiated
    for name, moments in together.items():
        assert int(apart[name].tokens) == int(moments.tokens) > 0


def test_latents_move_on_as_in_longer_steps():
    """A rectified flow by Euler's method, with the network's output of every other of six steps."""
    loaded = tiny.load("sd3")
    calibration = tiny.calibrate(loaded, steps=6, stride=2, batch=3, packages=1)
    (package,) = calibration.packages(loaded.targets, "norms", tiny.no_workspace)
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
        options = Options.model_validate({"prompts": ["a"], "steps": 5})
        notes[stride] = list(foretell(loaded.targets, tiny.traced(loaded), "second", 1, False, options, stride))
    assert not notes[1]
    (found,) = notes[4]
    assert "transformer_blocks.0.ff.net.2 sees 32 for 64 inputs; about 2 prompts would do" in found


def test_a_stride_beyond_the_steps_is_refused():
    with pytest.raises(ValueError, match="stride should be at most steps, 1, found 2"):
        Options.model_validate({"prompts": ["a"], "steps": 1, "stride": 2})


@pytest.mark.parametrize(
    ("given", "prompts", "noisy", "stride"),
    [
        ({}, 5, False, 2),
        ({}, 5, True, 1),
        ({}, 5, None, 1),
        ({"steps": 9}, 5, False, 1),  # fewer than were measured
        ({}, 4, False, 1),  # a single batch
        ({"stride": 3}, 4, True, 3),
        ({"stride": 1}, 5, False, 1),
    ],
)
def test_a_recipe_decides_or_how_it_samples(given, prompts, noisy, stride):
    assert stride_of(Options.model_validate({"prompts": ["a"], "steps": 10, **given}), prompts, noisy) == stride


SETTINGS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # diffusers hands tensors to numpy
@pytest.mark.parametrize(
    ("name", "settings", "noisy"),
    [
        ("DDIMScheduler", SETTINGS, False),
        ("DPMSolverMultistepScheduler", SETTINGS, False),
        ("DPMSolverMultistepScheduler", {**SETTINGS, "algorithm_type": "sde-dpmsolver++"}, True),
        ("DDPMScheduler", SETTINGS, True),
        ("EulerAncestralDiscreteScheduler", SETTINGS, True),
        ("EulerDiscreteScheduler", SETTINGS, False),
        ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}, False),
        ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, False),
        ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}, True),
        ("HeunDiscreteScheduler", SETTINGS, False),
        ("KDPM2AncestralDiscreteScheduler", SETTINGS, True),
        ("LCMScheduler", SETTINGS, True),
        ("PNDMScheduler", {**SETTINGS, "skip_prk_steps": True}, False),
        ("SASolverScheduler", SETTINGS, True),  # between its first and its last steps
        ("TCDScheduler", SETTINGS, False),  # as pipelines ask for none
        ("UniPCMultistepScheduler", SETTINGS, False),
    ],
)
def test_schedulers_that_add_noise_are_found_out(name, settings, noisy):
    scheduler = getattr(import_module("diffusers"), name)(**settings)
    torch.manual_seed(1234)
    before = torch.get_rng_state()
    assert adds_noise(scheduler, 25) is noisy
    assert torch.equal(torch.get_rng_state(), before)
    assert getattr(scheduler, "_step_index", None) is None


def test_of_a_scheduler_that_cannot_be_tried_it_is_not_known():
    assert adds_noise(object(), 10) is None
    lcm = LCMScheduler(rescale_betas_zero_snr=True)  # what it makes of a network that predicts noise is not finite
    assert adds_noise(lcm, 10) is None
    assert adds_noise(None, 10) is False  # a plan's, of a folder without one


NOISY = "LCMScheduler adds noise"


@pytest.mark.parametrize(
    ("given", "prompts", "scheduler", "message"),
    [
        ({}, 8, DDIMScheduler(), None),
        (
            {},
            8,
            LCMScheduler(),
            f"calibration takes twice as long as it might, as the network runs at every step: {NOISY}",
        ),
        (
            {},
            8,
            object(),
            "calibration takes twice as long as it might, as the network runs at every step: whether object adds noise "
            "could not be found out",
        ),
        ({}, 4, LCMScheduler(), None),
        ({"stride": 1}, 8, LCMScheduler(), None),
        (
            {"stride": 2},
            8,
            LCMScheduler(),
            f"calibration.stride: {NOISY} at every step, of which an output that is held knows nothing: what layers "
            "are fed then may differ much from what they are fed in use; 1 would be right",
        ),
        ({"stride": 2}, 8, object(), None),
        (
            {"stride": 4},
            8,
            DDIMScheduler(),
            "calibration.stride: with 2 batches of prompts the network runs at 6 of 10 steps and never at the others; "
            "a smaller calibration.batch would make more",
        ),
        (
            {"stride": 10},
            4,
            DDIMScheduler(),
            "calibration.stride: with a single batch of prompts the network runs at 1 of 10 steps and never at the "
            "others; a smaller calibration.batch would make more",
        ),
    ],
)
def test_what_a_user_should_know_of_the_steps_is_told(given, prompts, scheduler, message):
    options = Options.model_validate({"prompts": ["a"], "steps": 10, **given})
    assert list(foretell_sampling(prompts, options, scheduler, adds_noise(scheduler, 10))) == (
        [] if message is None else [message]
    )


def test_the_scheduler_is_the_one_that_the_index_names(tmp_path):
    folder = shutil.copytree(tiny.folder("sd2"), tmp_path / "m")
    index = json.loads((folder / "model_index.json").read_text())
    for entry, name in (
        (["diffusers", "LCMScheduler"], "LCMScheduler"),
        (["mine", "Mine"], "Mine"),
        ([None, None], "NoneType"),
    ):
        (folder / "model_index.json").write_text(json.dumps(index | {"scheduler": entry}))
        found = dataclasses.replace(tiny.load("sd2").folder, path=folder)
        assert type(found.scheduler()).__name__ == name


def test_scales_of_gradients_are_known_again_by_prompt_step_and_order_whatever_the_batch():
    _, calibration, _ = collect("gradients", steps=6, stride=2)
    assert set(calibration._differentiated.scales) == {(0, (step, 1)) for step in (0, 2, 4)} | {
        (2, (step, 1)) for step in (0, 1, 3, 5)
    }


def test_a_run_and_a_plan_go_by_the_scheduler():
    loaded = tiny.load("sd3")
    options = {"steps": 10, "stride": None, "batch": 2, "packages": 1}
    assert planned("sd3", options).entries[0].forwards == 5 + 6
    calibration = tiny.calibrate(loaded, **options)
    (package,) = calibration.packages(loaded.targets, "norms", tiny.no_workspace)
    calibration.collect(package, "norms", Growing())
    assert (calibration.facts.forwards, calibration.facts.held, calibration.facts.warnings) == (11, 9, [])
    noisy = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    loaded.pipe.scheduler = noisy
    calibration = tiny.calibrate(loaded, **options)
    (package,) = calibration.packages(loaded.targets, "norms", tiny.no_workspace)
    calibration.collect(package, "norms", Growing())
    assert (calibration.facts.forwards, calibration.facts.held) == (20, 0)
    assert len(calibration.facts.warnings) == 1
    found = planned("hunyuan", options)  # whose scheduler is DDPM's
    assert found.entries[0].forwards == 20
    assert (
        "calibration takes twice as long as it might, as the network runs at every step: DDPMScheduler adds noise"
        in found.warnings
    )


def planned(kind: str, options: dict[str, Any]) -> Plan:
    calibration = {"prompts": ["a", "b", "c"], "guidance": 3.0, "height": tiny.SIDE, "width": tiny.SIDE, **options}
    pruners = [{"obs_diff": {"sparsity": 0.5}}]
    data = {"model": str(tiny.folder(kind)), "calibration": calibration, "prune": pruners, "output": "o"}
    return plan(Recipe.model_validate(data))
