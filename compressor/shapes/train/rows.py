"""One token in place of many equal ones: R equal keys weigh as much as one key whose logit is raised by log R."""

# Shapes: B batch, H heads, S tokens, K features of a head.

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def attend(query_BHSK: Tensor, key_BHSK: Tensor, value_BHSK: Tensor, place: int, log_rows: Tensor) -> Tensor:
    """Attention in which the token at `place` stands for as many equal ones as `log_rows` says.

    The raise travels as one more feature of queries (1) and keys (log R for that token), which leaves the fast
    attention kernels usable; a mask would not, and its backward pass failed on an H200 (torch 2.11). Features come in
    eights for the same reason.

    Returns:
        B x H x S x K.
    """
    width, length = query_BHSK.shape[-1], key_BHSK.shape[-2]
    scale = width**-0.5
    ones = F.pad(query_BHSK.new_ones(1), (0, 7)).expand(*query_BHSK.shape[:-1], 8)
    raised_S = (torch.arange(length, device=key_BHSK.device) == place) * log_rows / scale
    raised = F.pad(raised_S.to(key_BHSK.dtype)[:, None], (0, 7)).expand(*key_BHSK.shape[:-1], 8)
    return F.scaled_dot_product_attention(
        torch.cat([query_BHSK, ones], dim=-1),
        torch.cat([key_BHSK, raised], dim=-1),
        F.pad(value_BHSK, (0, 8)),
        scale=scale,
    )[..., :width]


def log_rows(device: torch.device, usual: int, fewest: int, most: int) -> Tensor:
    """The logarithm of a random number of equal rows behind a caption: the usual one half of the time, else any."""
    draw, spread = torch.rand(2, device=device).unbind()
    low, high = math.log(fewest), math.log(most)
    return torch.where(draw < 0.5, math.log(usual), low + (high - low) * spread)
