"""Tells the inference step of a call of the network."""

from __future__ import annotations

from torch import Tensor


class StepCounter:
    """Tells the inference step from the network's own `timestep` input.

    Calls are not counted, as a scheduler may call the network several times at one timestep (Heun, PNDM). The step is
    the place in the schedule of the nearest timestep: half precision may have rounded it, some pipelines divide it, and
    some, as Lumina 2 and Z-Image, turn it round: 1 - t / T, or T - t.

    Args:
        schedule: the scheduler's timesteps, in sampling order, with or without repetitions.
        training: T, how many timesteps the scheduler was trained with.
    """

    def __init__(self, schedule: Tensor, training: float = 1000.0) -> None:
        self.timesteps: tuple[float, ...] = tuple(dict.fromkeys(schedule.tolist()))
        self._training = float(training)
        self._scale: float | None = None
        self._turned: tuple[float, ...] = ()

    @property
    def steps(self) -> int:
        """How many there are."""
        return len(self.timesteps)

    def step(self, timestep: Tensor | float) -> int:
        """The step, from 0, of a network call with this timestep (a number, or one for each sample).

        The first call must be that of the first step.
        """
        value = float(timestep.reshape(-1)[0]) if isinstance(timestep, Tensor) else float(timestep)
        if self._scale is None and not self._turned:
            self._recognise(value)
        if self._turned and self._scale is None:
            if value == 0:
                return 0  # T - t where t is T: the same in every unit
            self._scale = min(1.0, 1 / self._training, key=lambda unit: abs(self._turned[1] * unit - value))
        known = self._turned or self.timesteps
        distances = [abs(number * (self._scale or 1.0) - value) for number in known]
        return distances.index(min(distances))

    def _recognise(self, value: float) -> None:
        """Decides by the first call whether the timesteps are turned round, and in which unit they are.

        Where both would fit, as 0.999 is t / T of 999 and, rounded, T - t, they are not.
        bfloat16 rounds timesteps near 1000 by up to 2.
        """
        first, units = self.timesteps[0], (1.0, 1 / self._training)
        straight = any(abs(first * unit - value) <= 0.01 * first * unit for unit in units)
        turned = tuple(self._training - t for t in self.timesteps)
        unit = min(units, key=lambda unit: abs(turned[0] * unit - value))
        if not straight and self.steps > 1 and abs(turned[0] * unit - value) <= 0.0025 * self._training * unit:
            self._turned = turned
            self._scale = None if value == 0 else unit
        else:
            self._scale = value / first if first else 1.0
