"""Stable Diffusion 2: one text encoder and a U-Net, fed exactly as `StableDiffusionPipeline` feeds them."""

# Shapes: B batch, C latent channels, H W latent sides, L caption tokens, T timesteps.

from __future__ import annotations

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from compressor.shapes import networks
from compressor.shapes.train import objectives


def build(tokenizer: CLIPTokenizer, vae: AutoencoderKL) -> UNet:
    """The untrained networks, always the same."""
    torch.manual_seed(0)
    network = networks.unet()
    offset = vae.config["shift_factor"] * vae.config["scaling_factor"]
    return UNet(networks.small_text_encoder(tokenizer), network, offset)


def assemble(model: UNet, vae: AutoencoderKL, tokenizer: CLIPTokenizer) -> StableDiffusionPipeline:
    """The parts as a pipeline; they are shared, not copied."""
    return StableDiffusionPipeline(
        unet=model.denoiser,
        scheduler=networks.ddim(),  # type: ignore[arg-type]
        vae=vae,
        text_encoder=model.text_encoder,
        tokenizer=tokenizer,
        safety_checker=None,  # type: ignore[arg-type]
        feature_extractor=None,  # type: ignore[arg-type]
        requires_safety_checker=False,
    )


class UNet(nn.Module):
    """A text encoder and a U-Net, as one module from token ids to predicted velocity.

    Args:
        text_encoder: Its last hidden states are what the U-Net attends to.
        denoiser: The U-Net.
        offset: What has to be added to latents that were scaled and shifted: this pipeline only scales them.
    """

    kept_T: Tensor

    def __init__(self, text_encoder: CLIPTextModel, denoiser: UNet2DConditionModel, offset: float) -> None:
        super().__init__()
        self.text_encoder, self.denoiser, self._offset = text_encoder, denoiser, offset
        self.register_buffer("kept_T", networks.ddim().alphas_cumprod, persistent=False)

    def forward(self, noisy: Tensor, timestep: Tensor, ids: Tensor) -> Tensor:
        """Predicts the velocity (B x C x H x W) of noisy latents (B x C x H x W) at timesteps (B) for ids (B x L)."""
        return self.denoiser(noisy, timestep, self.text_encoder(ids)[0], return_dict=False)[0]

    def exercise(self, latent: Tensor, ids: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """Random arguments of `forward` for scaled latents and their captions, and what is then to be predicted."""
        noisy, step, target = objectives.velocity(latent + self._offset, self.kept_T)
        return (noisy, step, ids), target
