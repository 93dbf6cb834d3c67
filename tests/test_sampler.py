"""What a scheduler makes of an error of the network: by its own step against the equations in docs/obs-diff.md."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from compressor_obs_diff.sampler import Sampler, effects

from compressor.calibration import StepCounter
from compressor.errors import CompressorError
from compressor.plugin import Schedule
from tests.tiny import diffusers

STEPS = 7
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def ready(name: str, steps: int = STEPS, **settings: Any) -> Any:
    """A scheduler with its timesteps set."""
    scheduler = getattr(diffusers, f"{name}Scheduler")(**settings)
    scheduler.set_timesteps(steps)
    return scheduler


def weights(scheduler: Any) -> list[float]:
    timesteps = StepCounter(scheduler.timesteps).timesteps
    return list(Sampler().weights(Schedule(timesteps, scheduler)))


def alphas(scheduler: Any) -> torch.Tensor:
    """DDIM's cumulative alphas along the schedule and behind it, in float64."""
    along = scheduler.alphas_cumprod.double()[scheduler.timesteps]
    return torch.cat([along, scheduler.final_alpha_cumprod.double().reshape(1)])


def ddim(prediction: str) -> Any:
    return ready("DDIM", prediction_type=prediction, clip_sample=False, set_alpha_to_one=False, steps_offset=1, **BETAS)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_matching_euler_makes_the_sigma_step_of_it(shift):
    scheduler = ready("FlowMatchEulerDiscrete", shift=shift)
    steps = scheduler.sigmas.double().diff()
    torch.testing.assert_close(torch.tensor(effects(scheduler)).double(), steps, rtol=1e-6, atol=0)
    squares = steps.square()
    assert weights(scheduler) == pytest.approx((squares / squares.mean()).tolist(), rel=1e-6)
    if shift == 1.0:
        assert weights(scheduler)[1] == pytest.approx(weights(scheduler)[2], rel=1e-4)
    else:
        assert weights(scheduler)[0] < weights(scheduler)[-2]


def test_euler_of_epsilon_makes_the_sigma_step_of_it():
    scheduler = ready("EulerDiscrete", **BETAS)
    steps = scheduler.sigmas.double().diff()
    assert effects(scheduler) == pytest.approx(steps.tolist(), rel=1e-6)


def test_ddim_of_epsilon_makes_of_it_the_step_in_noise_over_signal():
    scheduler = ddim("epsilon")
    alphas_T = alphas(scheduler)
    ratio_T = ((1 - alphas_T) / alphas_T).sqrt()
    expected = alphas_T[-1].sqrt() * ratio_T.diff()
    assert effects(scheduler) == pytest.approx(expected.tolist(), rel=1e-9)


def test_ddim_of_v_turns_by_the_angle_between_signal_and_noise():
    scheduler = ddim("v_prediction")
    alphas_T = alphas(scheduler)
    turns = ((1 - alphas_T) / alphas_T).sqrt().atan().diff()
    expected = [(turns[i].sin() * turns[i + 1 :].cos().prod()).item() for i in range(STEPS)]
    assert effects(scheduler) == pytest.approx(expected, rel=1e-9)


MANY = {
    "DPMSolverMultistep": BETAS,
    "DPMSolverSinglestep": BETAS,
    "UniPCMultistep": BETAS,
    "PNDM": {"skip_prk_steps": True, **BETAS},
    "HeunDiscrete": BETAS,
    "FlowMatchHeunDiscrete": {},
    "EulerAncestralDiscrete": BETAS,
    "DDPM": {"clip_sample": False, **BETAS},
}


@pytest.mark.parametrize("name", list(MANY))
def test_other_solvers_make_of_one_error_what_running_them_with_it_shows(name):
    """Two runs with equal noise, in one of which one output is off."""
    scheduler = ready(name, **MANY[name])

    def run(wrong: int | None) -> float:
        mine = copy.deepcopy(scheduler)
        torch.manual_seed(3)
        sample = torch.full((1, 1, 1, 1), 0.01, dtype=torch.float64)
        for i, timestep in enumerate(mine.timesteps):
            if hasattr(mine, "scale_model_input"):
                mine.scale_model_input(sample, timestep)
            output = torch.full_like(sample, 1e-3 if i == wrong else 0.0)
            sample = mine.step(output, timestep, sample, return_dict=False)[0]
        return sample.item()

    right = run(None)
    found = effects(scheduler)
    assert len(found) == len(scheduler.timesteps)
    expected = [(run(i) - right) / 1e-3 for i in range(len(found))]
    assert found == pytest.approx(expected, rel=2e-3, abs=2e-3 * max(map(abs, expected)))


@pytest.mark.parametrize("settings", [{"clip_sample": True}, {"clip_sample": False, "thresholding": True}])
def test_clipping_is_taken_to_be_idle(settings):
    free = effects(ready("DDPM", clip_sample=False, **BETAS))
    assert effects(ready("DDPM", **settings, **BETAS)) == free


def test_calls_at_one_timestep_share_the_square_of_their_sum():
    scheduler = ready("HeunDiscrete", **BETAS)
    found = effects(scheduler)
    assert len(found) == 2 * STEPS - 1
    sums = [found[0], *(found[i] + found[i + 1] for i in range(1, len(found), 2))]
    shares = [sums[0] ** 2, *(total**2 / 2 for total in sums[1:])]
    mean = sum(shares) / STEPS
    assert weights(scheduler) == pytest.approx([share / mean for share in shares], rel=1e-9)


def test_the_weights_have_a_mean_of_one_and_leave_the_scheduler_as_it_was():
    scheduler = ready("DPMSolverMultistep", **BETAS)
    before = copy.deepcopy(vars(scheduler))
    state = torch.random.get_rng_state()
    found = weights(scheduler)
    assert sum(found) / len(found) == pytest.approx(1, rel=1e-12)
    assert scheduler.step_index is None
    assert torch.equal(torch.random.get_rng_state(), state)
    assert vars(scheduler).keys() == before.keys()
    assert scheduler.model_outputs == before["model_outputs"]


def test_one_step_gets_the_weight_one():
    assert weights(ready("FlowMatchEulerDiscrete", 1)) == [1.0]


class Stubborn:
    """A scheduler that wants more than others."""

    timesteps = torch.tensor([2.0, 1.0])

    def step(self, output: Any, timestep: Any, sample: Any, *, return_dict: bool = True) -> Any:
        raise RuntimeError("no image was given")


class Deaf(Stubborn):
    """A scheduler that does not listen to the network."""

    def step(self, output: Any, timestep: Any, sample: Any, *, return_dict: bool = True) -> Any:
        return (sample + 0 * output,)


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (
            Stubborn(),
            "weighting sampler: should be able to run Stubborn by itself, found RuntimeError: no image was given; "
            "choose another weighting",
        ),
        (
            Deaf(),
            "weighting sampler: should find what Deaf makes of the network's output, found effects of [0.0, 0.0]; "
            "choose another weighting",
        ),
    ],
)
def test_a_scheduler_that_tells_nothing_is_refused_by_name(scheduler, message):
    with pytest.raises(CompressorError) as caught:
        weights(scheduler)
    assert str(caught.value) == message
