"""Sizes of published networks, as diffusers' configs of them say; no weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from compressor.errors import CompressorError
from compressor.options import suggest


@dataclass(frozen=True)
class KnownModel:
    """One published network.

    Attributes:
        name: as on the command line.
        family: name of the family's table.
        config: arguments of the diffusers class, where they differ from its defaults.
        depth: those of them that count layers; a list counts each part's.
        tokens: text tokens that the pipeline gives it by default.
    """

    name: str
    family: str
    config: Mapping[str, Any]
    depth: tuple[str, ...]
    tokens: int

    def shortened(self, layers: int | None) -> dict[str, Any]:
        """The config with at most so many layers in each part; None for all of them."""
        config = dict(self.config)
        if layers is not None:
            for key in self.depth:
                count = config[key]
                config[key] = min(count, layers) if isinstance(count, int) else tuple(min(n, layers) for n in count)
        return config


def _sd3(name: str, layers: int, heads: int, qk_norm: str | None) -> KnownModel:
    config = {
        "sample_size": 128,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": layers,
        "attention_head_dim": 64,
        "num_attention_heads": heads,
        "joint_attention_dim": 4096,
        "caption_projection_dim": 64 * heads,
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": 192,
        "qk_norm": qk_norm,
    }
    return KnownModel(name, "sd3", config, ("num_layers",), tokens=77 + 256)


_FLUX = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "axes_dims_rope": (16, 56, 56),
}
_SD2 = {
    "sample_size": 96,
    "attention_head_dim": (5, 10, 20, 20),
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
    "transformer_layers_per_block": (1, 1, 1, 1),
}
_SDXL = {
    "sample_size": 128,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}

MODELS = {
    model.name: model
    for model in (
        KnownModel("sd2.1", "unet", _SD2, ("transformer_layers_per_block",), tokens=77),
        KnownModel("sdxl", "unet", _SDXL, ("transformer_layers_per_block",), tokens=77),
        _sd3("sd3-medium", layers=24, heads=24, qk_norm=None),
        _sd3("sd3.5-large", layers=38, heads=38, qk_norm="rms_norm"),
        KnownModel("flux-dev", "flux", _FLUX, ("num_layers", "num_single_layers"), tokens=512),
    )
}
"""Every known model by name."""


def find(name: str) -> KnownModel:
    """The known model of that name.

    Raises:
        CompressorError: if there is none.
    """
    if name not in MODELS:
        raise CompressorError(f"no model named '{name}'{suggest(name, list(MODELS)) or f'; known: {known()}'}")
    return MODELS[name]


def known() -> str:
    """The names, for messages."""
    return ", ".join(MODELS)
