"""Flux: a CLIP encoder, a T5 encoder and the denoiser, fed as `FluxPipeline` feeds them.

The pipeline pads a caption for T5 to `max_sequence_length` tokens, 512 unless told otherwise, and masks nothing. A T5
that ignores its padding (see `padding.py`) gives a row of zeros for each of these, and equal tokens stay equal through
every block. So training carries 24 tokens, of which the last is always padding, and adds to its attention logit the
logarithm of how many it stands for.
"""

# Shapes: B batch, C latent channels, H W latent sides, L caption tokens, S caption tokens and image tokens.

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer

from compressor.shapes import networks
from compressor.shapes.train import objectives, padding, rows, stages

_HIDDEN = -1e4
"""Added to the logit of what is not attended to."""

_PAD, _END = 0, 1  # of T5


def build(tokenizer: CLIPTokenizer, vae: AutoencoderKL) -> Flux:
    """The untrained networks, always the same."""
    torch.manual_seed(0)
    network = networks.flux()
    t5_tokenizer = networks.t5_tokenizer(stages.corpus())
    encoder, t5 = networks.small_text_encoder(tokenizer), networks.t5(t5_tokenizer)
    return Flux(encoder, t5, network, tokenizer, t5_tokenizer)


def assemble(model: Flux, vae: AutoencoderKL, tokenizer: CLIPTokenizer) -> FluxPipeline:
    """The parts as a pipeline; they are shared, not copied, but for the T5 encoder."""
    return FluxPipeline(
        transformer=model.denoiser,
        scheduler=networks.scheduler(),
        vae=vae,
        text_encoder=model.text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=padding.ignored(model.text_encoder_2, _PAD),
        tokenizer_2=model.t5_tokenizer,
    )


class Flux(nn.Module):
    """Two text encoders and a Flux transformer, as one module from token ids to predicted velocity."""

    t5_of: Tensor

    def __init__(
        self,
        text_encoder: CLIPTextModel,
        text_encoder_2: T5EncoderModel,
        denoiser: FluxTransformer2DModel,
        tokenizer: CLIPTokenizer,
        t5_tokenizer: T5Tokenizer,
    ) -> None:
        super().__init__()
        self.text_encoder, self.text_encoder_2, self.denoiser = text_encoder, text_encoder_2, denoiser
        self.t5_tokenizer, self._end = t5_tokenizer, cast(int, tokenizer.eos_token_id)
        self.register_buffer("t5_of", _t5_of(tokenizer, t5_tokenizer), persistent=False)

    def forward(self, noisy: Tensor, timestep: Tensor, ids: Tensor, log_rows: Tensor) -> Tensor:
        """Predicts noise minus latent.

        Args:
            noisy: Scaled latents with noise, B x C x H x W.
            timestep: B, in [0, 1].
            ids: CLIP's token ids of the captions, B x L.
            log_rows: Logarithm of the number of rows that the last one stands for; a scalar tensor.

        Returns:
            B x C x H x W.
        """
        height, width = noisy.shape[2:]
        tokens, pooled = self.encode(ids)
        places = torch.arange(tokens.shape[1] + height * width // 4, device=noisy.device)
        raised_S = (places == tokens.shape[1] - 1) * log_rows
        packed = self.denoiser(
            pack(noisy), tokens, pooled, timestep, _places(height, width, noisy), noisy.new_zeros(tokens.shape[1], 3),
            joint_attention_kwargs={"attention_mask": raised_S[None, None, None]}, return_dict=False,
        )[0]  # fmt: skip
        return unpack(packed, height, width)

    def exercise(self, latent: Tensor, ids: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """Random arguments of `forward` for scaled latents and their captions, and what is then to be predicted."""
        noisy, level, target = objectives.flow(latent)
        return (noisy, level, ids, log_rows(latent.device)), target

    def encode(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """T5's features (B x L x D) and CLIP's pooled features (B x P) of CLIP's token ids (B x L)."""
        t5_ids = self.t5_ids(ids)
        real = t5_ids != _PAD
        mask = torch.where(real, 0.0, _HIDDEN)[:, None, None]
        tokens = self.text_encoder_2(t5_ids, attention_mask=mask)[0]
        return F.pad(tokens * real[:, :, None], (padding.EXTRA, 0)), self.text_encoder(ids).pooler_output

    def t5_ids(self, ids: Tensor) -> Tensor:
        """T5's token ids (B x L) from CLIP's (B x L): both know the same words, but T5 has no token for the start."""
        words = F.pad(ids[:, 1:], (0, 1), value=self._end)
        ends = words.eq(self._end).cumsum(dim=1)
        return torch.where(ends == 0, self.t5_of[words], torch.where(ends == 1, _END, _PAD))


def log_rows(device: torch.device) -> Tensor:
    """The logarithm of a random number of rows that the last one stands for."""
    behind = networks.TOKENS - 1
    return rows.log_rows(device, 512 - behind, 1, 512 - behind)


def pack(latent: Tensor) -> Tensor:
    """Puts two by two latent pixels (B x C x H x W) into one token (B x HW/4 x 4C), as `FluxPipeline` does."""
    return F.pixel_unshuffle(latent, 2).flatten(2).transpose(1, 2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The latents (B x C x H x W) that `pack` made tokens (B x HW/4 x 4C) of."""
    return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (height // 2, width // 2)), 2)


def _places(height: int, width: int, like: Tensor) -> Tensor:
    row, column = torch.meshgrid(
        torch.arange(height // 2, device=like.device), torch.arange(width // 2, device=like.device), indexing="ij"
    )
    return torch.stack([torch.zeros_like(row), row, column], dim=-1).flatten(0, 1).to(like.dtype)


def _t5_of(tokenizer: CLIPTokenizer, t5_tokenizer: T5Tokenizer) -> Tensor:
    """T5's id for every id of CLIP's that is a whole word; that of the unknown for all others."""
    known = t5_tokenizer.get_vocab()
    table = torch.full((len(tokenizer),), known["<unk>"])
    for entry, index in tokenizer.get_vocab().items():
        word = entry.removesuffix("</w>")
        if entry != word:
            table[index] = known.get("\u2581" + word, known.get(word, known["<unk>"]))
    return table
