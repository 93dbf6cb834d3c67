"""Tells whether a scheduler adds noise: an output that is held for a later step knows nothing of it."""

from __future__ import annotations

import copy
import inspect
import warnings
from typing import Any

import torch
from torch import Tensor

from compressor.calibration.strides import stride_of
from compressor.recipe import Calibration as Options


def adds_noise(scheduler: Any, steps: int) -> bool | None:
    """Whether a sampling depends on random numbers; None if that could not be found out.

    Args:
        scheduler: diffusers' own, not changed; None for that of a folder without one, which is taken to add none.
        steps: inference steps.
    """
    if scheduler is None:
        return False
    try:
        first, second = (_sampled(copy.deepcopy(scheduler), steps, seed) for seed in (0, 1))
    except Exception:  # whatever one that its pipeline alone sets up stumbles over: then it is not known
        return None
    if not (first.isfinite().all() and second.isfinite().all()):
        return None
    return not torch.equal(first, second)


def explain_stride(options: Options, prompts: int, scheduler: Any, noisy: bool | None) -> str | None:
    """A warning if the network runs at more steps than it would, or at fewer than it should, or None."""
    stride, name = options.stride, type(scheduler).__name__
    if noisy is False or stride == 1:
        return None
    if noisy and stride is not None:
        return (
            f"calibration.stride: {name} adds noise at every step, of which an output that is held knows nothing: what "
            "layers are fed then may differ much from what they are fed in use; 1 would be right"
        )
    if stride is None and stride_of(options, prompts, False) > 1:
        reason = f"{name} adds noise" if noisy else f"whether {name} adds noise could not be found out"
        return f"calibration takes twice as long as it might, as the network runs at every step: {reason}"
    return None


def _sampled(scheduler: Any, steps: int, seed: int) -> Tensor:
    """What a sampling makes of ones, where the network gives zeros, with no noise that pipelines can leave out."""
    scheduler.set_timesteps(steps, **({"mu": 1.0} if scheduler.config.get("use_dynamic_shifting") else {}))
    generator = torch.Generator().manual_seed(seed)
    known = inspect.signature(scheduler.step).parameters
    given = {name: value for name, value in {"generator": generator, "eta": 0.0}.items() if name in known}
    sample = torch.ones(1, 4, 8, 8)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(action="ignore"):
        torch.default_generator.manual_seed(seed)
        for timestep in scheduler.timesteps:
            sample = scheduler.step(torch.zeros_like(sample), timestep, sample, **given, return_dict=False)[0]
    return sample
