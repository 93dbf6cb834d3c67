"""Magnitude pruning against its definition, written out with a sort."""

from __future__ import annotations

import pytest
import torch
from compressor_magnitude import Magnitude
from pydantic import ValidationError

from compressor.errors import CompressorError
from compressor.plugin import Pruner
from tests import tiny


def prune(kind: str, options: dict, dtype: torch.dtype = torch.float32):
    """Prunes a tiny pipeline; gives (dense weight, pruned weight, result) by layer."""
    pipeline = tiny.load(kind)
    pipeline.module.to(dtype)
    dense = {target.name: target.module.weight.clone() for target in pipeline.targets}
    pruner: Pruner = Magnitude.model_validate(options)
    results = list(pruner.prune(tiny.component(pipeline), None))
    assert [result.name for result in results] == [target.name for target in pipeline.targets]
    return [
        (dense[t.name], t.module.weight, result, pruner.zeros(t))
        for t, result in zip(pipeline.targets, results, strict=True)
    ]


@pytest.mark.parametrize("kind", list(tiny.KINDS))
@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.77])
def test_the_smallest_weights_of_each_layer_go_and_the_others_stay(kind, sparsity):
    for old, new, result, promised in prune(kind, {"sparsity": sparsity}):
        asked = round(sparsity * old.numel())
        assert promised == asked
        order = sorted((abs(value), i) for i, value in enumerate(old.flatten().tolist()))
        expected = old.flatten().clone()
        expected[[i for _, i in order[:asked]]] = 0
        assert torch.equal(new.flatten(), expected)
        assert result.error is None
        assert result.damping is None


@pytest.mark.parametrize(("keep", "of"), [(2, 4), (1, 4), (1, 2), (4, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_largest_n_of_every_m_stay(keep, of, dtype):
    for old, new, _, promised in prune("sd3", {"granularity": {"n_m": {"keep": keep, "of": of}}}, dtype):
        assert new.dtype == dtype
        assert promised == old.numel() * (of - keep) // of
        for before, after in zip(old.reshape(-1, of).tolist(), new.reshape(-1, of).tolist(), strict=True):
            largest = sorted(range(of), key=lambda i, row=before: (-abs(row[i]), -i))[:keep]
            assert after == [before[i] if i in largest else 0 for i in range(of)]


def test_layers_that_do_not_fit_are_refused_by_name():
    pruner = Magnitude.model_validate({"granularity": {"n_m": {"keep": 2, "of": 5}}})
    with pytest.raises(CompressorError, match=r"^transformer_blocks\.0\.attn\.to_q: keep 2 of 5 needs a multiple of 5"):
        pruner.check(tiny.load("sd3").targets)


@pytest.mark.parametrize("sparsity", [0, 1, 50, -0.1, "half"])
def test_a_sparsity_that_is_no_share_is_refused(sparsity):
    with pytest.raises(ValidationError):
        Magnitude.model_validate({"sparsity": sparsity})
