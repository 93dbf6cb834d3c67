"""How much each inference step counts in the Hessian: the five strategies of OBS-Diff (arXiv 2510.06751, section 3).

With steps t = 1..T in sampling order, so that t = 1 is the noisiest.
"""

from __future__ import annotations

import math
from typing import Any

from pydantic import Field, model_validator

from compressor.plugin import Schedule, Weighting


class Uniform(Weighting):
    """Every step counts the same: SparseGPT's Hessian."""

    def weights(self, schedule: Schedule) -> tuple[float, ...]:
        """1 for every step."""
        return (1.0,) * schedule.steps


class Between(Weighting):
    """A weighting that runs between two values."""

    low: float = Field(default=0.8, gt=0, description="the smallest weight")
    high: float = Field(default=1.2, gt=0, description="the largest weight")

    @model_validator(mode="after")
    def _check_order(self) -> Any:
        if self.low > self.high:
            raise ValueError(f"low should be at most high, found {self.low} and {self.high}")
        return self


class LinearIncrease(Between):
    """The last steps, which draw details, count most; in between linearly."""

    def weights(self, schedule: Schedule) -> tuple[float, ...]:
        """From `low` at the first step to `high` at the last, linearly."""
        return LinearDecrease(low=self.low, high=self.high).weights(schedule)[::-1]


class LinearDecrease(Between):
    """The first steps, whose errors travel furthest, count most; in between linearly."""

    def weights(self, schedule: Schedule) -> tuple[float, ...]:
        """From `high` at the first step to `low` at the last, linearly."""
        steps = schedule.steps
        if steps == 1:
            return (self.high,)
        return tuple(self.high - (self.high - self.low) * i / (steps - 1) for i in range(steps))


class LogIncrease(Between):
    """As `log_decrease`, in the opposite order."""

    def weights(self, schedule: Schedule) -> tuple[float, ...]:
        """From `low` at the first step to `high` at the last: `a_t = low + (high - low) ln t / ln T`."""
        return LogDecrease(low=self.low, high=self.high).weights(schedule)[::-1]


class LogDecrease(Between):
    """The paper's choice: the first steps count most, and the weight falls fastest at the end."""

    def weights(self, schedule: Schedule) -> tuple[float, ...]:
        """From `high` at the first step to `low` at the last: `a_t = low + (high - low) ln(T - t + 1) / ln T`."""
        steps = schedule.steps
        if steps == 1:
            return (self.high,)
        span = (self.high - self.low) / math.log(steps)
        return tuple(self.low + span * math.log(steps - i) for i in range(steps))
