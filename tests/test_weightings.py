"""The five timestep weightings against the paper's formulas, written out here in its own letters."""

import math

import pytest
from compressor_obs_diff.weightings import LinearDecrease, LinearIncrease, LogDecrease, LogIncrease, Uniform
from pydantic import ValidationError

from compressor import registry
from tests import tiny

# t = 1..T in sampling order; a_min = 0.8 and a_max = 1.2 unless given.
FORMULAS = {
    "uniform": lambda t, T, low, high: 1.0,
    "linear_increase": lambda t, T, low, high: low + (high - low) * (t - 1) / (T - 1),
    "linear_decrease": lambda t, T, low, high: low + (high - low) * (T - t) / (T - 1),
    "log_increase": lambda t, T, low, high: low + (high - low) / math.log(T) * math.log(t),
    "log_decrease": lambda t, T, low, high: low + (high - low) / math.log(T) * math.log(T - t + 1),
}
CLASSES = {
    "uniform": Uniform,
    "linear_increase": LinearIncrease,
    "linear_decrease": LinearDecrease,
    "log_increase": LogIncrease,
    "log_decrease": LogDecrease,
}
NAMES = pytest.mark.parametrize("name", list(FORMULAS))


@NAMES
@pytest.mark.parametrize("steps", [2, 3, 25, 50])
def test_weights_follow_the_formula(name, steps):
    expected = [FORMULAS[name](t, steps, 0.8, 1.2) for t in range(1, steps + 1)]
    assert CLASSES[name]().weights(tiny.schedule(steps)) == pytest.approx(expected, abs=1e-12)


@NAMES
def test_weights_follow_the_formula_between_other_bounds(name):
    if name == "uniform":
        assert Uniform().weights(tiny.schedule(25)) == (1.0,) * 25
        return
    expected = [FORMULAS[name](t, 25, 0.1, 3) for t in range(1, 26)]
    assert CLASSES[name](low=0.1, high=3).weights(tiny.schedule(25)) == pytest.approx(expected, abs=1e-12)


@NAMES
def test_one_step_gets_one_positive_weight(name):
    (weight,) = CLASSES[name]().weights(tiny.schedule(1))
    assert weight > 0


def test_log_decrease_has_the_papers_values_at_25_steps():
    weights = LogDecrease().weights(tiny.schedule(25))
    assert weights[0] == pytest.approx(1.2)
    assert weights[-1] == pytest.approx(0.8)
    assert weights[12] == pytest.approx(0.8 + 0.4 * math.log(13) / math.log(25))
    assert sum(weights) / 25 == pytest.approx(1.0883, abs=1e-4)  # by hand: 0.8 + 0.4 ln(25!) / (25 ln 25)


@NAMES
def test_the_registry_knows_the_name(name):
    assert registry.load("weighting", name) is CLASSES[name]


def test_the_registry_knows_no_other_names_of_this_plugin():
    assert set(registry.find("weighting")) == {*FORMULAS, "sampler"}


def test_low_above_high_is_refused():
    with pytest.raises(ValidationError, match=r"low should be at most high, found 2\.0 and 1\.0"):
        LogDecrease(low=2.0, high=1.0)
