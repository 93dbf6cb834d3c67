"""Dense products in place of cuSPARSELt's, and calls in place of their recordings, so that the logic runs on a CPU."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from compressor.two_four import product


@pytest.fixture
def dense_products(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, product.Algorithm]]:
    """Lists tokens and kernel of every product that would have been sparse."""
    calls: list[tuple[int, product.Algorithm]] = []

    def multiply(x, packed, bias, outputs, algorithm):
        assert packed.shape[0] == outputs
        calls.append((x.numel() // x.shape[-1], tuple(algorithm)))
        return functional.linear(x, packed, bias)

    def record(call, device):
        assert device.type == "cpu"
        call()
        return call

    monkeypatch.setattr(product, "pack", torch.clone)
    monkeypatch.setattr(product, "multiply", multiply)
    monkeypatch.setattr(product, "record", record)
    return calls
