"""The networks of the pipelines before training, and the tokenizers.

Small on purpose: in half precision everything that holds weights fits 16 MB in `shapes` and 8 MB in the others, and
nothing is so roomy that half of its weights could be dropped without being missed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import cast

from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from tokenizers import Tokenizer, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from compressor.shapes.scenes import SIDE

TOKENS = 24
"""Length of a tokenized caption, start and end included."""

LATENT_CHANNELS = 4
LATENT_SIDE = SIDE // 4
_TEXT_WIDTH = 96  # of either text encoder of SD3, and of T5 as shipped
_SMALL_WIDTH = 64  # of the CLIP encoder of the U-Net and of Flux
_HEAD = 32


def tokenizer(corpus: Iterable[str]) -> CLIPTokenizer:
    """Trains a byte-level BPE tokenizer with an end-of-word suffix, as CLIP's.

    Args:
        corpus: Captions; every word in them becomes one token, any other text is spelt.
    """
    blank = CLIPTokenizer().backend_tokenizer
    learner = Tokenizer(BPE(end_of_word_suffix="</w>"))
    learner.normalizer, learner.pre_tokenizer = blank.normalizer, blank.pre_tokenizer  # type: ignore[assignment]
    learner.train_from_iterator(corpus, trainers.BpeTrainer(end_of_word_suffix="</w>", show_progress=False))
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    entries = [*letters, *(letter + "</w>" for letter in letters), *dict.fromkeys(a + b for a, b in merges)]
    vocabulary = {entry: index for index, entry in enumerate([*entries, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=TOKENS)  # type: ignore[arg-type]


def t5_tokenizer(corpus: Iterable[str]) -> T5Tokenizer:
    """Makes a unigram tokenizer, as T5's, that puts the same words into one token each as `tokenizer` does.

    Args:
        corpus: Captions; every word and comma in them becomes one token, any other text is spelt.
    """
    words = sorted({word for caption in corpus for word in caption.replace(",", " ").split()})
    letters = [chr(code) for code in range(33, 127)]
    special = [(name, 0.0) for name in ("<pad>", "</s>", "<unk>")]
    pieces = [("\u2581" + word, -2.0) for word in words if len(word) > 1]
    spelling = [("\u2581", -10.0), ("\u2581a", -2.0), *((letter, -10.0) for letter in letters)]
    return T5Tokenizer(vocab=[*special, *pieces, *spelling], extra_ids=0, model_max_length=512)


def text_encoder(tokenizer: CLIPTokenizer, layers: int) -> CLIPTextModelWithProjection:
    """An untrained CLIP text encoder for a tokenizer, as SD3 has two."""
    return CLIPTextModelWithProjection(_clip(tokenizer, _TEXT_WIDTH, layers))


def small_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """An untrained CLIP text encoder without projection, as the U-Net and Flux have one."""
    return CLIPTextModel(_clip(tokenizer, _SMALL_WIDTH, 2))


def t5(tokenizer: T5Tokenizer) -> T5EncoderModel:
    """An untrained T5 encoder; eight features narrower than shipped (see `train/padding.py`), in width and in heads."""
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=_TEXT_WIDTH - 8,
        d_kv=_HEAD - 8,
        num_heads=3,
        d_ff=2 * _TEXT_WIDTH,
        num_layers=2,
        feed_forward_proj="gated-gelu",
        relative_attention_num_buckets=32,
        relative_attention_max_distance=TOKENS,
        layer_norm_epsilon=1e-3,
        dropout_rate=0.0,
    )
    return T5EncoderModel(config)


def vae() -> AutoencoderKL:
    """An untrained autoencoder from 3 x 64 x 64 to 4 x 16 x 16."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,  # type: ignore[arg-type]
        up_block_types=("UpDecoderBlock2D",) * 3,  # type: ignore[arg-type]
        block_out_channels=(32, 48, 64),  # type: ignore[arg-type]
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=16,
        sample_size=SIDE,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def sd3() -> SD3Transformer2DModel:
    """An untrained transformer of Stable Diffusion 3's kind: joint attention over 64 patches and the caption."""
    return SD3Transformer2DModel(
        sample_size=LATENT_SIDE,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=5,
        attention_head_dim=32,
        num_attention_heads=6,
        joint_attention_dim=2 * _TEXT_WIDTH,
        caption_projection_dim=6 * 32,
        pooled_projection_dim=2 * _TEXT_WIDTH,
        pos_embed_max_size=LATENT_SIDE // 2,
        qk_norm="rms_norm",
    )


def unet() -> UNet2DConditionModel:
    """An untrained U-Net of Stable Diffusion 2's kind: convolutions at 16 x 16, transformer blocks at 8 x 8.

    There is no middle block: its convolutions would hold as many weights as two transformer blocks.
    """
    return UNet2DConditionModel(
        sample_size=LATENT_SIDE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(32, 4 * _HEAD),  # type: ignore[arg-type]
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),  # type: ignore[arg-type]
        mid_block_type=None,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),  # type: ignore[arg-type]
        transformer_layers_per_block=(1, 2),  # type: ignore[arg-type]
        reverse_transformer_layers_per_block=((2, 1), 1),  # type: ignore[arg-type]
        attention_head_dim=(1, 4),  # type: ignore[arg-type]  # diffusers means the number of heads
        cross_attention_dim=_SMALL_WIDTH,
        norm_num_groups=8,
        use_linear_projection=True,
        time_embedding_dim=64,
    )


def flux() -> FluxTransformer2DModel:
    """An untrained transformer of Flux's kind: double, then single blocks over 64 packed latents and the caption."""
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * LATENT_CHANNELS,
        num_layers=2,
        num_single_layers=6,
        attention_head_dim=_HEAD,
        num_attention_heads=4,
        joint_attention_dim=_TEXT_WIDTH,
        pooled_projection_dim=_SMALL_WIDTH,
        guidance_embeds=False,
        axes_dims_rope=(8, 12, 12),  # type: ignore[arg-type]
    )


def scheduler() -> FlowMatchEulerDiscreteScheduler:
    """The sampler: Euler steps along straight lines from noise to latent, evenly spaced."""
    return FlowMatchEulerDiscreteScheduler(shift=1.0)


def ddim() -> DDIMScheduler:
    """Stable Diffusion 2.1's noise schedule and v-prediction, with the last step made pure noise.

    What is left of the latent at the last of SD's own steps would tell the network the mean colour, which sampling
    from pure noise does not (Lin et al., "Common Diffusion Noise Schedules and Sample Steps are Flawed", 2024).
    """
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        steps_offset=1,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )


def _clip(tokenizer: CLIPTokenizer, width: int, layers: int) -> CLIPTextConfig:
    start, end, padding = (
        cast(int, index) for index in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    )
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 16,
        max_position_embeddings=TOKENS,
        bos_token_id=start,
        eos_token_id=end,
        pad_token_id=padding,
    )
