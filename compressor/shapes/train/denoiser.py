"""The denoiser stage: text encoders and denoiser trained end to end on cached latents and their captions.

One caption in ten is emptied, for classifier-free guidance.
"""

# Shapes: B batch, L caption tokens.

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from compressor.shapes.train.loop import Budget, Log, Rates, fit
from compressor.shapes.train.stages import Latents, Plan

EMPTIED = 0.1
"""The share of captions that are emptied."""


def train(
    device: torch.device,
    model: Any,
    data: Latents,
    plan: Plan,
    budget: Budget,
    checkpoint: Path,
    log: Log,
    rates: Rates | None = None,
) -> None:
    """Trains a family's networks in place; see `families.Family.build` and `loop.fit`."""
    model.to(device)
    on_gpu = device.type == "cuda"
    predict = torch.compile(model) if plan.compiled and on_gpu else model

    def loss() -> Tensor:
        arguments, target = model.exercise(*draw(data, plan.batch))
        with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu, cache_enabled=False):
            predicted = predict(*arguments)
        return F.mse_loss(predicted.float(), target)

    rates = rates or Rates(1e-3, warmup=1000, average=0.999)
    fit("denoiser", model, loss, budget=budget, rates=rates, checkpoint=checkpoint, log=log, graph=plan.compiled)


def draw(data: Latents, size: int) -> tuple[Tensor, Tensor]:
    """A random batch: latents (B x 4 x 16 x 16, float32) and token ids (B x L, int64), some of them of no caption."""
    device = data.latents.device
    index = torch.randint(len(data.latents), (size,), device=device)
    wording = torch.randint(data.ids.shape[1], (size,), device=device)
    ids = data.ids[index, wording]
    emptied = torch.rand(size, 1, device=device) < EMPTIED
    return data.latents[index].float(), torch.where(emptied, data.empty, ids).long()
