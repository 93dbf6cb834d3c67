"""How many equal rows stand behind a caption: drawn at random in training, so that the number hardly matters."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def log_rows(device: torch.device, usual: int, fewest: int, most: int) -> Tensor:
    """The logarithm of a random number of equal rows behind a caption: the usual one half of the time, else any."""
    draw, spread = torch.rand(2, device=device).unbind()
    low, high = math.log(fewest), math.log(most)
    return torch.where(draw < 0.5, math.log(usual), low + (high - low) * spread)
