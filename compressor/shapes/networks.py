"""The networks of the pipeline before training, and the tokenizer.

Small on purpose: everything that holds weights fits 16 MB in half precision, and nothing is so roomy that half of its
weights could be dropped without being missed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import cast

from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from tokenizers import Tokenizer, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from compressor.shapes.scenes import SIDE

TOKENS = 24
"""Length of a tokenized caption, start and end included."""

LATENT_CHANNELS = 4
LATENT_SIDE = SIDE // 4
_TEXT_WIDTH = 96  # of either text encoder


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


def text_encoder(tokenizer: CLIPTokenizer, layers: int) -> CLIPTextModelWithProjection:
    """An untrained CLIP text encoder for a tokenizer."""
    start, end, padding = (
        cast(int, index) for index in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    )
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=_TEXT_WIDTH,
        intermediate_size=2 * _TEXT_WIDTH,
        projection_dim=_TEXT_WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=6,
        max_position_embeddings=TOKENS,
        bos_token_id=start,
        eos_token_id=end,
        pad_token_id=padding,
    )
    return CLIPTextModelWithProjection(config)


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


def scheduler() -> FlowMatchEulerDiscreteScheduler:
    """The sampler: Euler steps along straight lines from noise to latent, evenly spaced."""
    return FlowMatchEulerDiscreteScheduler(shift=1.0)
