"""Small random networks of each family, and pipelines around them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from compressor.pipeline import Folder, Pipeline
from compressor.sparsity import lowest_of_groups
from compressor.structure import find_targets, flux, sd3, unet


def sd35_medium() -> Any:
    """SD3.5-medium's kind: RMS norm of queries and keys, a second attention in the first block."""
    return _sd3(num_layers=2, qk_norm="rms_norm", dual_attention_layers=(0,))


def sd3_medium() -> Any:
    """SD3-medium's kind, and a single block: neither."""
    return _sd3(num_layers=1, qk_norm=None, dual_attention_layers=())


def _sd3(**options: Any) -> Any:
    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        caption_projection_dim=32,
        pooled_projection_dim=40,
        pos_embed_max_size=8,
        **options,
    ).eval()


def flux_dev() -> Any:
    """Flux with guidance: a double block and a single block."""
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=40,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    ).eval()


def sd2_flat() -> Any:
    """Stable Diffusion 2's kind with one level, for text as wide as the tiny pipelines'."""
    return _unet(
        block_out_channels=(32,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        attention_head_dim=2,
        cross_attention_dim=32,
        sample_size=8,
    )


def sd2() -> Any:
    """Stable Diffusion 2's kind."""
    return _unet(
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=2,
    )


def sdxl() -> Any:
    """SDXL's kind: times and text embeddings added to the timestep; attention in the inner block on the way down."""
    return _unet(
        layers_per_block=(0, 1),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 40,
    )


def _unet(**options: Any) -> Any:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "sample_size": 16,
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "mid_block_type": None,
        "cross_attention_dim": 24,
        "norm_num_groups": 8,
        "use_linear_projection": True,
    }
    return UNet2DConditionModel(**settings | options).eval()


def pipeline_of(network: Any) -> Pipeline:
    """A pipeline that holds nothing but the network."""
    classes = [cls.__name__ for cls in type(network).__mro__]
    family = next(f.FAMILY for f in (flux, sd3, unet) if f.FAMILY.component_class in classes)
    component = "unet" if family.name == "unet" else "transformer"
    folder = Folder(Path(), "test", "", (component,), (), component, family)
    return Pipeline(None, folder, network, find_targets(network, family), {}, network.dtype)


def prune(pipeline: Pipeline, keep: int = 2, of: int = 4) -> Pipeline:
    """The same pipeline, every target left with its largest `keep` of `of` weights."""
    for target in pipeline.targets:
        weight = target.module.weight.data
        weight[lowest_of_groups(weight.abs(), keep, of)] = 0
    return pipeline
