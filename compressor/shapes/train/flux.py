"""Flux: a CLIP encoder, a T5 encoder and the denoiser, fed as `FluxPipeline` feeds them.

The pipeline pads a caption for T5 to `max_sequence_length` tokens, 512 unless told otherwise, and masks nothing. A T5
that ignores its padding (see `padding.py`) gives a row of zeros for each of these, and equal tokens stay equal through
every block. So training carries 24 tokens, the last of which is always padding and stands for any number (see
`rows.py`).
"""

# Shapes: B batch, C latent channels, H W latent sides, L caption tokens, S caption tokens and image tokens.

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor, FluxTransformer2DModel
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
    model.denoiser.set_attn_processor(FluxAttnProcessor())  # type: ignore[arg-type]
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
        denoiser.set_attn_processor(_RaisedAttention())  # type: ignore[arg-type]
        text_encoder_2.set_attn_implementation("eager")  # the others would be given a mask that needs a gradient
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
        packed = self.denoiser(
            pack(noisy), tokens, pooled, timestep, _places(height, width, noisy), noisy.new_zeros(tokens.shape[1], 3),
            joint_attention_kwargs={"place": tokens.shape[1] - 1, "log_rows": log_rows}, return_dict=False,
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


class _RaisedAttention:
    """Flux's attention, in which the token at `place` stands for as many equal ones as `log_rows` says."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
        *,
        place: int,
        log_rows: Tensor,
    ) -> Tensor | tuple[Tensor, Tensor]:
        assert attention_mask is None

        def heads(x: Tensor, norm: nn.Module | None = None) -> Tensor:
            x = x.unflatten(-1, (attn.heads, -1))
            return x if norm is None else norm(x)

        query, key = heads(attn.to_q(hidden_states), attn.norm_q), heads(attn.to_k(hidden_states), attn.norm_k)
        value, context = heads(attn.to_v(hidden_states)), encoder_hidden_states
        if context is not None:
            query = torch.cat([heads(attn.add_q_proj(context), attn.norm_added_q), query], dim=1)
            key = torch.cat([heads(attn.add_k_proj(context), attn.norm_added_k), key], dim=1)
            value = torch.cat([heads(attn.add_v_proj(context)), value], dim=1)
        query, key = (cast(Tensor, apply_rotary_emb(x, image_rotary_emb, sequence_dim=1)) for x in (query, key))
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        mixed = rows.attend(query, key, value, place, log_rows).transpose(1, 2).flatten(2)
        if context is None:
            return mixed
        text, image = mixed[:, : context.shape[1]], mixed[:, context.shape[1] :]
        return attn.to_out[0](image), attn.to_add_out(text)


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
