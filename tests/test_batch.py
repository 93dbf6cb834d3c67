"""Problems solved at once: their factors against those of each alone, and how many there may be."""

# Shapes: T tokens, I inputs.

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from compressor_obs_diff import batch
from compressor_obs_diff.batch import factorise_batch
from compressor_obs_diff.granularities import NM, Unstructured
from compressor_obs_diff.solver import factorise
from torch import Tensor

from compressor.errors import CompressorError


def hessian(seed: int, negative: float = 0.0) -> Tensor:
    """Of mean diagonal near 1, with one eigenvalue of `-negative`, as rounding may leave it."""
    x_TI = torch.randn(64, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    values_I, vectors_II = torch.linalg.eigh(x_TI.T @ x_TI / 64)
    if negative:
        values_I[0] = -negative
    return ((vectors_II * values_I) @ vectors_II.T).float()


def test_several_hessians_are_factorised_as_each_alone():
    hessians = [hessian(seed) * 10.0**seed for seed in range(4)]
    before = [hessian_II.clone() for hessian_II in hessians]
    upper_NII, factors = factorise_batch(hessians, 0.01, list("abcd"))
    assert upper_NII.is_contiguous()
    for upper_II, factor, hessian_II, same_II in zip(upper_NII, factors, hessians, before, strict=True):
        alone = factorise(hessian_II, 0.01, "a")
        torch.testing.assert_close(upper_II, alone.upper_II, rtol=1e-5, atol=1e-6 * alone.upper_II.max().item())
        assert factor.upper_II.data_ptr() == upper_II.data_ptr()
        assert (factor.damping, factor.dtype) == (0.01, torch.float32)
        assert torch.equal(hessian_II, same_II)


def test_only_those_that_need_it_are_given_more_damping():
    hessians = [hessian(0), hessian(1, negative=0.05), hessian(2), hessian(3, negative=0.5)]
    upper_NII, factors = factorise_batch(hessians, 0.01, list("abcd"))
    assert [factor.damping for factor in factors] == pytest.approx([0.01, 0.1, 0.01, 1.0])
    for upper_II, factor, hessian_II in zip(upper_NII, factors, hessians, strict=True):
        expected_II = factorise(hessian_II, 0.01, "a").upper_II
        torch.testing.assert_close(upper_II, expected_II, rtol=1e-4, atol=1e-5)
        assert torch.equal(factor.upper_II, upper_II)


@pytest.mark.parametrize("fill", [0.0, float("nan"), float("inf")])
def test_one_that_is_nothing_or_not_finite_is_named(fill):
    hessians = [hessian(0), torch.full((16, 16), fill), hessian(2)]
    with pytest.raises(CompressorError, match=r"^b: the mean of the squared inputs should be positive and finite"):
        factorise_batch(hessians, 0.01, list("abc"))


def test_one_that_cannot_be_factorised_is_named():
    broken_II = torch.eye(16)
    broken_II[0, 3] = broken_II[3, 0] = float("nan")
    with pytest.raises(CompressorError, match=r"^c: its Hessian cannot be factorised"):
        factorise_batch([hessian(0), hessian(1), broken_II], 0.01, list("abc"))


def test_no_more_problems_are_solved_at_once_than_memory_is_meant_for(monkeypatch):
    cpu = torch.device("cpu")
    one = 4 * 3 * 100 * (100 + 50)
    for room, most in ((one - 1, 1), (one, 1), (2 * one - 1, 1), (2 * one, 2), (9.5 * one, 9)):
        monkeypatch.setattr(batch, "MOST_BYTES", room)
        assert batch.most(50, 100, cpu) == most


def kernels(monkeypatch, error: Exception | None) -> list[torch.device]:
    """Kernels that work, or end with an error, and which devices they were tried on."""
    tried: list[torch.device] = []

    def trial(device: torch.device) -> None:
        tried.append(device)
        if error is not None:
            raise error

    monkeypatch.setitem(sys.modules, "compressor_obs_diff.sweep_kernel", SimpleNamespace(trial=trial))
    monkeypatch.setattr(batch, "find_spec", lambda name: object())
    batch.works.cache_clear()
    return tried


CUDA = torch.device("cuda", 0)


def test_only_a_gpu_is_given_several_at_once_and_only_with_masks_that_its_kernels_know(monkeypatch):
    class Own(Unstructured):
        """A third party's, with masks of its own."""

    tried = kernels(monkeypatch, None)
    for granularity, known in ((Unstructured(), True), (NM(), True), (Own(), False)):
        assert batch.possible(granularity, CUDA) == known
        assert not batch.possible(granularity, torch.device("cpu"))
    assert tried == [CUDA]
    monkeypatch.setattr(batch, "find_spec", lambda name: None)
    batch.works.cache_clear()
    assert not batch.possible(Unstructured(), CUDA)
    batch.works.cache_clear()


@pytest.mark.parametrize(
    "error", [RuntimeError("Failed to find C compiler"), subprocess.CalledProcessError(1, "cc"), ImportError("libcuda")]
)
def test_where_triton_cannot_compile_every_problem_is_solved_alone(error, monkeypatch):
    tried = kernels(monkeypatch, error)
    assert not batch.possible(Unstructured(), CUDA)
    assert not batch.possible(Unstructured(), CUDA)
    assert tried == [CUDA]
    batch.works.cache_clear()
