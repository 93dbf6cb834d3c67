"""Stable Diffusion 3 and 3.5 (MMDiT): joint attention over an image and a text stream.

Architecture: Esser et al., "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis" (ICML 2024).
SD3.5-medium's first blocks have a second attention, `attn2`, over the image stream alone; the last block of every
model has no text output (`context_pre_only`), so some rows are absent there.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from compressor.structure.family import BlockTable, Family, Heads, Layer, Neurons, Prompting, config, like


def example_inputs(
    module: nn.Module, *, batch: int, height: int, width: int, sequence: int
) -> Mapping[str, Tensor | Mapping[str, Tensor]]:
    """Inputs of `SD3Transformer2DModel.forward`."""
    settings, (device, dtype) = config(module), like(module)
    return {
        "hidden_states": torch.randn(batch, settings.in_channels, height, width, device=device, dtype=dtype),
        "encoder_hidden_states": torch.randn(batch, sequence, settings.joint_attention_dim, device=device, dtype=dtype),
        "pooled_projections": torch.randn(batch, settings.pooled_projection_dim, device=device, dtype=dtype),
        "timestep": torch.full((batch,), 500.0, device=device, dtype=dtype),
    }


FAMILY = Family(
    name="sd3",
    component_class="SD3Transformer2DModel",
    blocks=(
        BlockTable(
            r"transformer_blocks\.\d+",
            (
                Layer("norm1.linear", "adaln", "modulation", "image", 0),
                Layer("norm1_context.linear", "adaln", "modulation", "text", 0),
                Layer("attn.to_q", "attention", "query", "image", 1),
                Layer("attn.to_k", "attention", "key", "image", 1),
                Layer("attn.to_v", "attention", "value", "image", 1),
                Layer("attn.add_q_proj", "attention", "query", "text", 1),
                Layer("attn.add_k_proj", "attention", "key", "text", 1),
                Layer("attn.add_v_proj", "attention", "value", "text", 1),
                Layer("attn2.to_q", "attention", "query", "image", 1),
                Layer("attn2.to_k", "attention", "key", "image", 1),
                Layer("attn2.to_v", "attention", "value", "image", 1),
                Layer("attn.to_out.0", "attention", "output", "image", 2),
                Layer("attn.to_add_out", "attention", "output", "text", 2),
                Layer("attn2.to_out.0", "attention", "output", "image", 2),
                Layer("ff.net.0.proj", "feed_forward", "up", "image", 3),
                Layer("ff_context.net.0.proj", "feed_forward", "up", "text", 3),
                Layer("ff.net.2", "feed_forward", "down", "image", 4),
                Layer("ff_context.net.2", "feed_forward", "down", "text", 4),
            ),
            (
                Heads(
                    "attn",
                    rows=(
                        "attn.to_q",
                        "attn.to_k",
                        "attn.to_v",
                        "attn.add_q_proj",
                        "attn.add_k_proj",
                        "attn.add_v_proj",
                    ),
                    columns=("attn.to_out.0", "attn.to_add_out"),
                    optional=("attn.to_add_out",),
                    counts=("attn.heads", "attn.sliceable_head_dim"),
                    widths=("attn.inner_dim", "attn.inner_kv_dim"),
                ),
                Heads(
                    "attn2",
                    rows=("attn2.to_q", "attn2.to_k", "attn2.to_v"),
                    columns=("attn2.to_out.0",),
                    counts=("attn2.heads", "attn2.sliceable_head_dim"),
                    widths=("attn2.inner_dim", "attn2.inner_kv_dim"),
                ),
                Neurons("ff", up="ff.net.0.proj", down="ff.net.2"),
                Neurons("ff_context", up="ff_context.net.0.proj", down="ff_context.net.2"),
            ),
        ),
    ),
    behind=(BlockTable("norm_out", (Layer("linear", "adaln", "modulation", "image", 0),)),),
    inputs=example_inputs,
    prompting=(
        Prompting(
            "StableDiffusion3Pipeline",
            results=(
                "prompt_embeds",
                "negative_prompt_embeds",
                "pooled_prompt_embeds",
                "negative_pooled_prompt_embeds",
            ),
            arguments={"prompt_2": None, "prompt_3": None},
            t5=256,  # zeros where there is no T5
        ),
    ),
    most_patches="pos_embed_max_size",
)
