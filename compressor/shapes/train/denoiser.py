"""The denoiser stage: text encoders and denoiser trained end to end with the flow-matching loss on cached latents.

Rectified flow (Esser et al., 2024): with noise level s, the network sees (1 - s) latent + s noise and predicts noise
minus latent; s is drawn logit-normally. One caption in ten is emptied, for classifier-free guidance.
"""

# Shapes: B batch.

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPTokenizer

from compressor.shapes import networks
from compressor.shapes.train.conditioned import Conditioned
from compressor.shapes.train.loop import Budget, Log, Rates, fit
from compressor.shapes.train.stages import Latents, Plan

EMPTIED = 0.1
"""The share of captions that are emptied."""

_USUAL_ROWS, _FEWEST_ROWS, _MOST_ROWS = 256, 16, 512  # zero rows; diffusers' own default is the usual number


def build(tokenizer: CLIPTokenizer) -> Conditioned:
    """The untrained networks of this stage, always the same."""
    torch.manual_seed(0)
    network = networks.sd3()
    return Conditioned(networks.text_encoder(tokenizer, 3), networks.text_encoder(tokenizer, 3), network)


def train(
    device: torch.device,
    model: Conditioned,
    data: Latents,
    plan: Plan,
    budget: Budget,
    checkpoint: Path,
    log: Log,
    rates: Rates | None = None,
) -> None:
    """Trains the model in place; see `loop.fit`."""
    model.to(device)
    on_gpu = device.type == "cuda"
    predict = torch.compile(model) if on_gpu else model

    def loss() -> Tensor:
        latent, ids = draw(data, plan.batch)
        noise = torch.randn_like(latent)
        level = torch.randn(len(latent), device=device).sigmoid()
        noisy = torch.lerp(latent, noise, level[:, None, None, None])
        with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu, cache_enabled=False):
            velocity = predict(noisy, level * 1000, ids, log_rows(device))
        return F.mse_loss(velocity.float(), noise - latent)

    rates = rates or Rates(1e-3, warmup=1000, average=0.999)
    fit("denoiser", model, loss, budget=budget, rates=rates, checkpoint=checkpoint, log=log, graph=True)


def draw(data: Latents, size: int) -> tuple[Tensor, Tensor]:
    """A random batch: latents (B x 4 x 16 x 16, float32) and token ids (B x L, int64), some of them of no caption."""
    device = data.latents.device
    index = torch.randint(len(data.latents), (size,), device=device)
    wording = torch.randint(data.ids.shape[1], (size,), device=device)
    ids = data.ids[index, wording]
    emptied = torch.rand(size, 1, device=device) < EMPTIED
    return data.latents[index].float(), torch.where(emptied, data.empty, ids).long()


def log_rows(device: torch.device) -> Tensor:
    """The logarithm of a random number of zero rows: the usual one half of the time, else anything near it."""
    usual, spread = torch.rand(2, device=device).unbind()
    low, high = math.log(_FEWEST_ROWS), math.log(_MOST_ROWS)
    return torch.where(usual < 0.5, math.log(_USUAL_ROWS), low + (high - low) * spread)
