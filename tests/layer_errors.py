"""What a layer's outputs lose, from the second moment of its inputs."""

# Shapes: O outputs, I inputs.

from __future__ import annotations

from compressor_obs_diff.solver import energy
from torch import Tensor


def relative_error(old_OI: Tensor, new_OI: Tensor, second_II: Tensor) -> float:
    """||W X - W' X||^2 / ||W X||^2; 0 where the dense outputs are zero."""
    lost, total = energy(new_OI - old_OI, second_II).sum(), energy(old_OI, second_II).sum()
    return (lost / total).item() if total > 0 else 0.0
