"""The U-Nets of Stable Diffusion 1 and 2 and of SDXL: self-attention, cross-attention and a GEGLU in every block.

Architectures: Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models" (CVPR 2022);
Podell et al., "SDXL" (ICLR 2024). The feed-forward's up projection yields two halves, value and gate.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from compressor.structure.family import BlockTable, Family, Heads, Layer, Neurons, Prompting, config, like

_LAYERS = (
    Layer("attn1.to_q", "attention", "query", "image", 0),
    Layer("attn1.to_k", "attention", "key", "image", 0),
    Layer("attn1.to_v", "attention", "value", "image", 0),
    Layer("attn1.to_out.0", "attention", "output", "image", 1),
    Layer("attn2.to_q", "attention", "query", "image", 2),
    Layer("attn2.to_k", "attention", "key", "text", 2),
    Layer("attn2.to_v", "attention", "value", "text", 2),
    Layer("attn2.to_out.0", "attention", "output", "image", 3),
    Layer("ff.net.0.proj", "feed_forward", "up", "image", 4),
    Layer("ff.net.2", "feed_forward", "down", "image", 5),
)
_GROUPS = (
    *(
        Heads(
            attention,
            rows=(f"{attention}.to_q", f"{attention}.to_k", f"{attention}.to_v"),
            columns=(f"{attention}.to_out.0",),
            counts=(f"{attention}.heads", f"{attention}.sliceable_head_dim"),
            widths=(f"{attention}.inner_dim", f"{attention}.inner_kv_dim"),
        )
        for attention in ("attn1", "attn2")
    ),
    Neurons("ff", up="ff.net.0.proj", down="ff.net.2", gated=True),
)


def example_inputs(
    module: nn.Module, *, batch: int, height: int, width: int, sequence: int
) -> Mapping[str, Tensor | Mapping[str, Tensor]]:
    """Inputs of `UNet2DConditionModel.forward`, with SDXL's additional embeddings where the config asks for them."""
    settings, (device, dtype) = config(module), like(module)
    inputs: dict[str, Tensor | Mapping[str, Tensor]] = {
        "sample": torch.randn(batch, settings.in_channels, height, width, device=device, dtype=dtype),
        "timestep": torch.tensor(500.0, device=device, dtype=dtype),
        "encoder_hidden_states": torch.randn(batch, sequence, settings.cross_attention_dim, device=device, dtype=dtype),
    }
    if settings.addition_embed_type == "text_time":
        pooled = settings.projection_class_embeddings_input_dim - 6 * settings.addition_time_embed_dim
        inputs["added_cond_kwargs"] = {
            "text_embeds": torch.randn(batch, pooled, device=device, dtype=dtype),
            "time_ids": torch.tensor([[8.0 * height, 8.0 * width, 0, 0, 8.0 * height, 8.0 * width]] * batch).to(
                device, dtype
            ),
        }
    return inputs


FAMILY = Family(
    name="unet",
    component_class="UNet2DConditionModel",
    blocks=(
        BlockTable(r"down_blocks\.\d+\.attentions\.\d+\.transformer_blocks\.\d+", _LAYERS, _GROUPS),
        BlockTable(r"mid_block\.attentions\.\d+\.transformer_blocks\.\d+", _LAYERS, _GROUPS),
        BlockTable(r"up_blocks\.\d+\.attentions\.\d+\.transformer_blocks\.\d+", _LAYERS, _GROUPS),
    ),
    inputs=example_inputs,
    prompting=(
        Prompting("StableDiffusionPipeline", results=("prompt_embeds", "negative_prompt_embeds")),
        Prompting(
            "StableDiffusionXLPipeline",
            results=(
                "prompt_embeds",
                "negative_prompt_embeds",
                "pooled_prompt_embeds",
                "negative_pooled_prompt_embeds",
            ),
            arguments={"prompt_2": None},
        ),
    ),
    patch=1,
    pixels=8,
)
