"""Takes metrics of sampled images; a metric that cannot be taken costs its figures, not the run."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping

from compressor.errors import CompressorError
from compressor.plugin import Metric, Samples


def measure(metrics: Mapping[str, Metric], samples: Samples) -> tuple[dict[str, dict[str, float]], tuple[str, ...]]:
    """Takes every metric.

    Args:
        metrics: by plugin name.
        samples: one pair or more.

    Returns:
        Figures by metric and name, all finite, and what the user should know: the metrics' own `UserWarning`s, a metric
        that raised a `CompressorError` and is left out, a figure that was not finite and is left out.

    """
    figures: dict[str, dict[str, float]] = {}
    said: list[str] = []
    for name, metric in metrics.items():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            try:
                found = metric.measure(samples)
            except CompressorError as error:
                said.append(f"{name}: left out: {error}")
                found = {}
        for warning in caught:
            if issubclass(warning.category, UserWarning):
                said.append(f"{name}: {warning.message}")
            else:
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
        said += [f"{name}: {key} is {value}; left out" for key, value in found.items() if not math.isfinite(value)]
        if kept := {key: value for key, value in found.items() if math.isfinite(value)}:
            figures[name] = kept
    return figures, tuple(dict.fromkeys(said))
