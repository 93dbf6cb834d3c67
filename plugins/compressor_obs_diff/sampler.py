"""How much each inference step counts, read from the scheduler: the square of what the sampler makes of an error.

docs/obs-diff.md has the equations.
"""

from __future__ import annotations

import copy
import inspect
import math
from typing import Any

from compressor.errors import CompressorError
from compressor.plugin import Schedule, Weighting


class Sampler(Weighting):
    """Every step counts by the square of what an error of the network's output there adds to the final latent."""

    def weights(self, schedule: Schedule) -> tuple[float, ...]:
        """The squared effects, scaled to a mean of 1.

        A scheduler that calls the network several times at one timestep, as Heun and PNDM do, is given nearly equal
        inputs there, so that nearly equal errors add up: each of n calls counts (sum of their effects)^2 / n.

        Raises:
            CompressorError: if the scheduler cannot be run by itself, or makes nothing of the network's output.
        """
        calls: dict[float, list[float]] = {timestep: [] for timestep in schedule.timesteps}
        for timestep, effect in zip(schedule.scheduler.timesteps.tolist(), effects(schedule.scheduler), strict=True):
            calls[timestep].append(effect)
        squares = [sum(found) ** 2 / len(found) for found in calls.values()]
        total = math.fsum(squares)
        if not 0 < total < math.inf:
            raise CompressorError(
                f"weighting sampler: should find what {type(schedule.scheduler).__name__} makes of the network's "
                f"output, found effects of {squares}; choose another weighting"
            )
        return tuple(len(squares) * square / total for square in squares)


def effects(scheduler: Any) -> list[float]:
    """The derivative of the final sample by the network's output at every call, all other outputs held fixed.

    The scheduler's own `step` is run on a sample and on outputs of one element, all zero, and differentiated: exact for
    any solver that is linear in both, whatever the network predicts. Samples are taken not to be clipped.

    Args:
        scheduler: diffusers' own, with its timesteps set and no step taken; not changed.

    Raises:
        CompressorError: if it cannot be run so.
    """
    import torch
    from torch import Tensor

    name = type(scheduler).__name__
    scheduler = copy.deepcopy(scheduler)
    for key, value in vars(scheduler).items():
        if isinstance(value, Tensor):
            setattr(scheduler, key, value.cpu().double() if value.is_floating_point() else value.cpu())
    idle = {key: False for key in ("clip_sample", "thresholding") if key in getattr(scheduler, "config", {})}
    if idle:
        scheduler.register_to_config(**idle)  # a clipped sample answers to nothing
    timesteps = scheduler.timesteps
    noise = {}
    if "generator" in inspect.signature(scheduler.step).parameters:
        noise["generator"] = torch.Generator().manual_seed(0)
    outputs = [torch.zeros(1, 1, 1, 1, dtype=torch.float64, requires_grad=True) for _ in timesteps]
    sample = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    with torch.enable_grad(), torch.random.fork_rng(devices=[]):
        try:
            for timestep, output in zip(timesteps, outputs, strict=True):
                if hasattr(scheduler, "scale_model_input"):
                    scheduler.scale_model_input(sample, timestep)  # some warn if it was not called
                sample = scheduler.step(output, timestep, sample, **noise, return_dict=False)[0]
            found = torch.autograd.grad(sample.sum(), outputs, allow_unused=True)
        except Exception as error:  # whatever a scheduler that asks for more than others stumbles over
            raise CompressorError(
                f"weighting sampler: should be able to run {name} by itself, found {type(error).__name__}: {error}; "
                "choose another weighting"
            ) from error
    return [0.0 if grad is None else grad.item() for grad in found]
