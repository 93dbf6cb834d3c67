"""Makes a T5 encoder that was trained with its padding masked ignore the padding by itself, whatever its length.

`FluxPipeline` gives T5 no mask. So the encoder gets eight more features, of which two are used: P, huge in the
embedding of the padding and zero in that of any other token, and C, small in that of any other token. No layer writes
to them. Every head gets eight more features too, of which one is used: its query reads C and its key reads P, with such
weights that padding gets a logit far below all others. The last norm divides padding by its huge P: zeros are left.

All else stays as it was: T5 does not scale its logits by the width of a head, and its norms only need
sqrt(width / new width) in their weights, and C's share of the mean square in place of their epsilon.
"""

# Shapes: V vocabulary, D features, N new features, H heads, K features of a head, O outputs, I inputs.

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import T5Config, T5EncoderModel

EXTRA = 8
"""How many features are added, before the others."""

_P, _C = 0, 1  # the places of the two features
_HUGE = 2.0**15  # of P; half precision ends at 65504
_STRENGTH = 32.0  # of query and key
_EPSILON = 1e-6


@torch.no_grad()
def ignored(encoder: T5EncoderModel, pad: int) -> T5EncoderModel:
    """A wider encoder that gives for any text, padded to any length, what the given one gives with its padding masked.

    Args:
        encoder: Not changed.
        pad: The padding's token id; its rows come out as good as zero.
    """
    old: T5Config = encoder.config
    new = T5Config.from_dict(
        old.to_dict() | {"d_model": old.d_model + EXTRA, "d_kv": old.d_kv + EXTRA, "layer_norm_epsilon": _EPSILON}
    )
    wider = T5EncoderModel(new).eval()
    wider.to(encoder.device, encoder.dtype)  # type: ignore[arg-type]
    weights = {}
    for name, weight in encoder.state_dict().items():
        weights[name] = _widened(name, weight, new, old)
    constant = (old.d_model * old.layer_norm_epsilon - new.d_model * _EPSILON) ** 0.5
    for name in ("shared.weight", "encoder.embed_tokens.weight"):
        if name in weights:
            weights[name][:, _C] = constant
            weights[name][pad] = 0
            weights[name][pad, _P] = _HUGE
    wider.load_state_dict(weights)
    return wider


def _widened(name: str, weight: Tensor, new: T5Config, old: T5Config) -> Tensor:
    """One weight of the wider encoder, but for the two features of the embedding."""
    if name.endswith("layer_norm.weight"):
        extra = weight.new_zeros(EXTRA)
        extra[[_P, _C]] = float(".layer.0." in name)  # only attention reads P and C
        return torch.cat([extra, weight * (old.d_model / new.d_model) ** 0.5])
    if name.endswith(("SelfAttention.q.weight", "SelfAttention.k.weight", "SelfAttention.v.weight")):
        heads_HKD = F.pad(weight.unflatten(0, (old.num_heads, old.d_kv)), (EXTRA, 0, EXTRA, 0))
        if ".q." in name:
            heads_HKD[:, 0, _C] = _STRENGTH
        elif ".k." in name:
            heads_HKD[:, 0, _P] = -_STRENGTH
        return heads_HKD.flatten(0, 1)
    if name.endswith("SelfAttention.o.weight"):
        heads_DHK = F.pad(weight.unflatten(1, (old.num_heads, old.d_kv)), (EXTRA, 0, 0, 0, EXTRA, 0))
        return heads_DHK.flatten(1, 2)
    if ".wi" in name or "embed_tokens" in name or "shared" in name:
        return F.pad(weight, (EXTRA, 0))
    if name.endswith("DenseReluDense.wo.weight"):
        return F.pad(weight, (0, 0, EXTRA, 0))
    assert name.endswith("relative_attention_bias.weight"), name
    return weight
