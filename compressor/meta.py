"""Networks on the meta device: every shape, no memory, and no time for random weights that nobody reads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers.models.modeling_utils import no_init_weights


@contextmanager
def on_meta() -> Iterator[None]:
    """What is made within lies on the meta device, and its weights are given no values."""
    with torch.device("meta"), no_init_weights():
        yield
