"""Which calls of a calibration the network runs, and what stands for the others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compressor.calibration.strides import Strides, all_runs, first_runs, holding, mean_runs
from compressor.errors import CompressorError
from compressor.plugin import MomentKind, Schedule
from compressor.recipe import Calibration as Options
from tests import tiny
from tests.test_calibration import Recorder, assert_near, explicit


def begun(strides: Strides, prompt: int, steps: list[int], shape: tuple[int, ...] = (1,)) -> list[int]:
    """What the calls of a batch count; every output is the step's number."""
    strides.next_batch(prompt)
    counts = []
    for step in steps:
        counts.append(strides.begin(step, (), {"x": torch.zeros(shape)}))
        if counts[-1]:
            strides.keep(torch.tensor(step))
    return counts
