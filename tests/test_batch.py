"""Problems solved at once: their factors against those of each alone, how many there may be, and where kernels help."""

# Shapes: T tokens, I inputs.

from __future__ import annotations

import pytest
import torch
from compressor_obs_diff import OBSDiff, batch
from compressor_obs_diff.batch import factorise_batch
from compressor_obs_diff.granularities import NM, Unstructured
from compressor_obs_diff.solver import factorise
from torch import Tensor

from compressor.calibration import kernels
from compressor.errors import CompressorError
from tests import tiny


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
    for room, most in ((99, 1), (100, 1), (199, 1), (200, 2), (999, 9)):
        monkeypatch.setattr(batch, "MOST_BYTES", room)
        assert batch.most(100, cpu, None) == most
    for room, most in ((-1, 1), (99, 1), (200, 2), (899, 8), (999, 9), (1000, 9)):
        assert batch.most(100, cpu, room) == most


CUDA = torch.device("cuda", 0)


class Own(Unstructured):
    """A third party's, with masks of its own."""


def test_only_a_gpu_is_given_several_at_once_and_only_with_masks_that_its_kernels_know(monkeypatch):
    monkeypatch.setattr(kernels, "problem", lambda _: None)
    for granularity, known in ((Unstructured(), True), (NM(), True), (Own(), False)):
        assert batch.possible(granularity, CUDA) == known
        assert not batch.possible(granularity, torch.device("cpu"))
    monkeypatch.setattr(kernels, "problem", lambda _: "triton is not installed")
    assert not batch.possible(Unstructured(), CUDA)


@pytest.mark.parametrize(
    ("solver", "slow"), [("obs", "columns are swept one by one"), ("admm", "masks are chosen layer by layer")]
)
def test_where_kernels_do_not_choose_a_gpus_user_is_told_why(solver, slow, monkeypatch):
    monkeypatch.setattr(kernels, "problem", lambda _: None)
    assert batch.note(solver, NM(), CUDA) is None
    costs = f"{slow}, which costs a GPU many times as much as by kernels: "
    assert batch.note(solver, Own(), CUDA) == f"{costs}they know only the granularities unstructured and n_m"
    monkeypatch.setattr(kernels, "problem", lambda _: "triton is not installed")
    assert batch.note(solver, NM(), CUDA) == f"{costs}triton is not installed"
    assert batch.note(solver, Own(), torch.device("cpu")) is None


def test_the_report_has_that_warning(monkeypatch):
    monkeypatch.setattr(batch, "note", lambda solver, *_: f"{solver} is slow")
    loaded = tiny.load("sd3")
    calibration = tiny.calibrate(loaded, packages=1)
    for _ in OBSDiff(sparsity=0.5).prune(tiny.component(loaded), calibration):
        pass
    assert calibration.facts.warnings.count("obs is slow") == 1


def test_masks_of_a_granularity_of_others_are_asked_for_layer_by_layer():
    seen = []

    class Rows(Own):
        """Says what it is asked for."""

        def mask(self, score_OI: Tensor, zeros: int, *, per_row: bool = False) -> Tensor:
            seen.append((tuple(score_OI.shape), zeros))
            return super().mask(score_OI, zeros, per_row=per_row)

    masks = batch.masks_of(Rows(), [2, 3], [[0.5, 0.2], [0.3, 0.8]], [0.5, 1.0], 10, torch.device("cpu"))
    score_NOI = torch.rand(2, 5, 10, generator=torch.Generator().manual_seed(0))
    found_NOI = masks(score_NOI, 1)
    assert seen == [((2, 10), 10), ((3, 10), 6), ((2, 10), 6), ((3, 10), 24)]
    assert torch.equal(found_NOI[1, :2], Unstructured().mask(score_NOI[1, :2], 6))
    assert int(masks(score_NOI, 0).sum()) == 5 + 3 + 3 + 12
