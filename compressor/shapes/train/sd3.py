"""Stable Diffusion 3: both text encoders and the denoiser, fed exactly as `StableDiffusion3Pipeline` feeds them.

Without a T5 encoder the pipeline puts zero rows (256 of them by default) behind the caption's tokens. Equal tokens stay
equal through every block. So training carries a single zero row that stands for all (89 tokens instead of 344, see
`rows.py`), and draws their number at random, so that it hardly matters.
"""

# Shapes: B batch, C latent channels, H W latent sides, L caption tokens, D text features, P pooled features.

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import JointAttnProcessor2_0
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from compressor.shapes import networks
from compressor.shapes.train import objectives, rows

_USUAL_ROWS, _FEWEST_ROWS, _MOST_ROWS = 256, 16, 512  # zero rows; diffusers' own default is the usual number


def build(tokenizer: CLIPTokenizer, vae: AutoencoderKL) -> SD3:
    """The untrained networks, always the same."""
    torch.manual_seed(0)
    network = networks.sd3()
    return SD3(networks.text_encoder(tokenizer, 3), networks.text_encoder(tokenizer, 3), network)


def assemble(model: SD3, vae: AutoencoderKL, tokenizer: CLIPTokenizer) -> StableDiffusion3Pipeline:
    """The parts as a pipeline; they are shared, not copied."""
    model.denoiser.set_attn_processor(JointAttnProcessor2_0())
    return StableDiffusion3Pipeline(
        transformer=model.denoiser,
        scheduler=networks.scheduler(),
        vae=vae,
        text_encoder=model.text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=model.text_encoder_2,
        tokenizer_2=tokenizer,
        text_encoder_3=None,  # type: ignore[arg-type]
        tokenizer_3=None,  # type: ignore[arg-type]
    )


class SD3(nn.Module):
    """Two text encoders and an SD3 transformer, as one module from token ids to predicted velocity."""

    def __init__(
        self,
        text_encoder: CLIPTextModelWithProjection,
        text_encoder_2: CLIPTextModelWithProjection,
        denoiser: SD3Transformer2DModel,
    ) -> None:
        super().__init__()
        self.text_encoder, self.text_encoder_2, self.denoiser = text_encoder, text_encoder_2, denoiser
        denoiser.set_attn_processor(_RaisedAttention())  # type: ignore[arg-type]

    def forward(self, noisy: Tensor, timestep: Tensor, ids: Tensor, log_rows: Tensor) -> Tensor:
        """Predicts noise minus latent.

        Args:
            noisy: Scaled latents with noise, B x C x H x W.
            timestep: B, in [0, 1000].
            ids: Token ids of the captions, B x L.
            log_rows: Logarithm of the number of zero rows behind the captions; a scalar tensor.

        Returns:
            B x C x H x W.
        """
        tokens, pooled = self.encode(ids)
        return self.denoiser(
            noisy, F.pad(tokens, (0, 0, 0, 1)), pooled, timestep,
            joint_attention_kwargs={"log_rows": log_rows}, return_dict=False,
        )[0]  # fmt: skip

    def exercise(self, latent: Tensor, ids: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """Random arguments of `forward` for scaled latents and their captions, and what is then to be predicted."""
        noisy, level, target = objectives.flow(latent)
        return (noisy, level * 1000, ids, log_rows(latent.device)), target

    def encode(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The caption features (B x L x D, without zero rows) and pooled features (B x P) of token ids (B x L)."""
        outputs = [encoder(ids, output_hidden_states=True) for encoder in (self.text_encoder, self.text_encoder_2)]
        tokens = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        return tokens, torch.cat([output.text_embeds for output in outputs], dim=-1)


def log_rows(device: torch.device) -> Tensor:
    """The logarithm of a random number of zero rows."""
    return rows.log_rows(device, _USUAL_ROWS, _FEWEST_ROWS, _MOST_ROWS)


class _RaisedAttention:
    """Joint attention in which the last caption token stands for as many equal ones as `log_rows` says."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        log_rows: Tensor,
    ) -> tuple[Tensor, Tensor]:
        assert attention_mask is None

        def heads(x: Tensor, norm: nn.Module | None = None) -> Tensor:
            x = x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            return x if norm is None else norm(x)

        context = encoder_hidden_states
        query = torch.cat([heads(attn.to_q(hidden_states), attn.norm_q),
                           heads(attn.add_q_proj(context), attn.norm_added_q)], dim=2)  # fmt: skip
        key = torch.cat([heads(attn.to_k(hidden_states), attn.norm_k),
                         heads(attn.add_k_proj(context), attn.norm_added_k)], dim=2)  # fmt: skip
        value = torch.cat([heads(attn.to_v(hidden_states)), heads(attn.add_v_proj(context))], dim=2)

        mixed = rows.attend(query, key, value, key.shape[-2] - 1, log_rows)
        mixed = mixed.transpose(1, 2).flatten(2)
        image, text = mixed[:, : hidden_states.shape[1]], mixed[:, hidden_states.shape[1] :]
        text = text if attn.context_pre_only else attn.to_add_out(text)
        return attn.to_out[0](image), text
