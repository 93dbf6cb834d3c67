import warnings
from typing import Any

import pytest
from pydantic import Field

from compressor.errors import CompressorError
from compressor.plugin import Metric, Samples
from compressor.report import measure


class Says(Metric):
    """Returns what it was told to, and warns."""

    figures: dict[str, Any] = Field(default_factory=dict)
    warning: str | None = None
    refusal: str | None = None

    def applies(self, source: str) -> bool:
        return True

    def measure(self, samples: Samples) -> dict[str, float]:
        if self.warning:
            warnings.warn(self.warning, stacklevel=2)
        if self.refusal:
            raise CompressorError(self.refusal)
        return self.figures


def test_figures_are_kept_by_metric(samples: Samples):
    assert measure({"a": Says(figures={"x": 1.0}), "b": Says(figures={"x": 2.0})}, samples) == (
        {"a": {"x": 1.0}, "b": {"x": 2.0}},
        (),
    )


def test_a_metrics_warnings_become_sentences_of_the_report(samples: Samples):
    assert measure({"a": Says(figures={"x": 1.0}, warning="few images")}, samples) == (
        {"a": {"x": 1.0}},
        ("a: few images",),
    )


def test_a_figure_that_is_not_finite_is_left_out_and_told(samples: Samples):
    assert measure({"a": Says(figures={"x": float("nan"), "y": 1.0})}, samples) == (
        {"a": {"y": 1.0}},
        ("a: x is nan; left out",),
    )


def test_a_metric_that_refuses_is_left_out_and_told(samples: Samples):
    figures, said = measure({"a": Says(refusal="no such caption"), "b": Says(figures={"x": 1.0})}, samples)
    assert figures == {"b": {"x": 1.0}}
    assert said == ("a: left out: no such caption",)


def test_warnings_of_other_kinds_are_passed_on(samples: Samples):
    class Old(Says):
        """Uses something deprecated."""

        def measure(self, samples: Samples) -> dict[str, float]:
            warnings.warn("soon gone", DeprecationWarning, stacklevel=2)
            return {"x": 1.0}

    with pytest.warns(DeprecationWarning, match="soon gone"):
        assert measure({"a": Old()}, samples) == ({"a": {"x": 1.0}}, ())
