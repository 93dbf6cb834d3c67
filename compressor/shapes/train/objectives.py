"""What a denoiser learns to predict: the two ways of mixing a latent with noise that the pipelines sample by."""

# Shapes: B batch, C latent channels, H W latent sides, T timesteps.

from __future__ import annotations

import torch
from torch import Tensor


def flow(latent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rectified flow (Esser et al., 2024), noise levels drawn logit-normally.

    Args:
        latent: B x C x H x W.

    Returns:
        (1 - s) latent + s noise; the levels s, B, in [0, 1]; what is to be predicted, noise - latent.
    """
    noise = torch.randn_like(latent)
    level = torch.randn(len(latent), device=latent.device).sigmoid()
    return torch.lerp(latent, noise, level[:, None, None, None]), level, noise - latent


def velocity(latent: Tensor, kept_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """V-prediction (Salimans and Ho, 2022), timesteps drawn uniformly.

    Args:
        latent: B x C x H x W.
        kept_T: The scheduler's `alphas_cumprod`, the part of the variance that is still the latent's.

    Returns:
        sqrt(a) latent + sqrt(1 - a) noise; the timesteps, B; what is to be predicted, sqrt(a) noise - sqrt(1 - a)
        latent.
    """
    noise = torch.randn_like(latent)
    step = torch.randint(len(kept_T), (len(latent),), device=latent.device)
    kept = kept_T[step][:, None, None, None]
    signal, spread = kept.sqrt(), (1 - kept).sqrt()
    return signal * latent + spread * noise, step, signal * noise - spread * latent
