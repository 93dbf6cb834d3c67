"""The kinds of pipeline that can be trained: how each is built, what it learns, how it becomes a diffusers folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor, nn
from transformers import CLIPTokenizer

from compressor.shapes import evaluate
from compressor.shapes.train import flux, sd3, unet

Exercise = Callable[[Tensor, Tensor], tuple[tuple[Tensor, ...], Tensor]]
"""Gives for scaled latents (B x 4 x 16 x 16) and token ids (B x L) arguments of a forward and what it should give."""


@dataclass(frozen=True)
class Family:
    """One kind of pipeline.

    Attributes:
        suffix: of its folder, its quality table and its name.
        build: makes the untrained networks from the tokenizer and the autoencoder; the module has a method `exercise`,
            an `Exercise`.
        assemble: puts the trained networks, the autoencoder and the tokenizer together.
        guidance: the scale at which the quality table is made; 1 is none.
    """

    suffix: str
    build: Callable[[CLIPTokenizer, AutoencoderKL], nn.Module]
    assemble: Callable[[Any, AutoencoderKL, CLIPTokenizer], DiffusionPipeline]
    guidance: float = evaluate.GUIDANCE


FAMILIES = {
    "sd3": Family("", sd3.build, sd3.assemble),
    "unet": Family("-unet", unet.build, unet.assemble),
    "flux": Family("-flux", flux.build, flux.assemble, guidance=1.0),
}
