"""Flux: double blocks (an image and a text stream, joint attention), then single blocks over one joint sequence.

Architecture: Black Forest Labs, FLUX.1. In a single block, attention and feed-forward run side by side on the same
input, and one output projection reads both.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from compressor.structure.family import BlockTable, Family, Heads, Layer, Neurons, Prompting, config, like


def example_inputs(
    module: nn.Module, *, batch: int, height: int, width: int, sequence: int
) -> Mapping[str, Tensor | Mapping[str, Tensor]]:
    """Inputs of `FluxTransformer2DModel.forward`: latents packed two by two, with the position of every token."""
    settings, (device, dtype) = config(module), like(module)
    rows, columns = height // 2, width // 2
    positions = torch.zeros(rows, columns, 3)
    positions[..., 1] += torch.arange(rows)[:, None]
    positions[..., 2] += torch.arange(columns)[None, :]
    inputs: dict[str, Tensor | Mapping[str, Tensor]] = {
        "hidden_states": torch.randn(batch, rows * columns, settings.in_channels, device=device, dtype=dtype),
        "encoder_hidden_states": torch.randn(batch, sequence, settings.joint_attention_dim, device=device, dtype=dtype),
        "pooled_projections": torch.randn(batch, settings.pooled_projection_dim, device=device, dtype=dtype),
        "timestep": torch.full((batch,), 0.5, device=device, dtype=dtype),
        "img_ids": positions.reshape(rows * columns, 3).to(device, dtype),
        "txt_ids": torch.zeros(sequence, 3, device=device, dtype=dtype),
    }
    if settings.guidance_embeds:
        inputs["guidance"] = torch.full((batch,), 3.5, device=device, dtype=dtype)
    return inputs


_OFFSET = "the graph loses the place of the neurons behind the heads in what proj_out reads"

FAMILY = Family(
    name="flux",
    component_class="FluxTransformer2DModel",
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
                Layer("attn.to_out.0", "attention", "output", "image", 2),
                Layer("attn.to_add_out", "attention", "output", "text", 2),
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
                    counts=("attn.heads",),
                    widths=("attn.inner_dim",),
                    each=("attn.head_dim",),
                    overrides="the graph takes the split of the tokens into text and image for a split of the channels",
                ),
                Neurons("ff", up="ff.net.0.proj", down="ff.net.2"),
                Neurons("ff_context", up="ff_context.net.0.proj", down="ff_context.net.2"),
            ),
        ),
        BlockTable(
            r"single_transformer_blocks\.\d+",
            (
                Layer("norm.linear", "adaln", "modulation", "joint", 0),
                Layer("attn.to_q", "attention", "query", "joint", 1),
                Layer("attn.to_k", "attention", "key", "joint", 1),
                Layer("attn.to_v", "attention", "value", "joint", 1),
                Layer("proj_mlp", "feed_forward", "up", "joint", 1),
                Layer("proj_out", "feed_forward", "down", "joint", 2),
            ),
            (
                Heads(
                    "attn",
                    rows=("attn.to_q", "attn.to_k", "attn.to_v"),
                    columns=("proj_out",),
                    counts=("attn.heads",),
                    widths=("attn.inner_dim", "attn.out_dim", "proj_out._tp_packed_row_blocks.0"),
                    each=("attn.head_dim",),
                    overrides=_OFFSET,
                ),
                Neurons(
                    "proj_mlp",
                    up="proj_mlp",
                    down="proj_out",
                    behind="attn.to_q",
                    counts=("mlp_hidden_dim", "proj_out._tp_packed_row_blocks.1"),
                    overrides=_OFFSET,
                ),
            ),
        ),
    ),
    behind=(BlockTable("norm_out", (Layer("linear", "adaln", "modulation", "image", 0),)),),
    inputs=example_inputs,
    prompting=(
        Prompting(
            "FluxPipeline",
            results=("prompt_embeds", "pooled_prompt_embeds"),
            arguments={"prompt_2": None},
            guided=False,  # the network is told the scale instead
            clip=False,
            t5=512,
        ),
    ),
)
