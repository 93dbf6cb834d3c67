"""ADMM and the refit, against enumeration and dense least squares."""

from __future__ import annotations

import itertools

import pytest
import torch
from compressor_obs_diff import OBSDiff, admm
from compressor_obs_diff.granularities import NM, Unstructured
from compressor_obs_diff.layers import prune_package
from compressor_obs_diff.least_squares import TOLERANCE, fit
from compressor_obs_diff.solver import factorise, sweep
from compressor_obs_diff.solvers import SOLVERS, Problem
from torch import Tensor

from tests import tiny


def problem(outputs: int, inputs: int, seed: int) -> tuple[Tensor, Tensor]:
    """Weights and a damped Hessian of correlated inputs of differing size, float64."""
    generator = torch.Generator().manual_seed(seed)
    weight_OI = torch.randn(outputs, inputs, generator=generator, dtype=torch.float64)
    mixing_II = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)
    size_I = torch.rand(inputs, generator=generator, dtype=torch.float64) + 0.1
    x_TI = torch.randn(8 * inputs, inputs, generator=generator, dtype=torch.float64) @ mixing_II * size_I
    hessian_II = x_TI.T @ x_TI
    hessian_II.diagonal().add_(0.01 * hessian_II.diagonal().mean())
    return weight_OI, hessian_II


def loss(weight_OI: Tensor, new_OI: Tensor, hessian_II: Tensor) -> float:
    difference_OI = new_OI - weight_OI
    return ((difference_OI @ hessian_II) * difference_OI).sum().item()


def best_on(weight_OI: Tensor, hessian_II: Tensor, removed_OI: Tensor) -> Tensor:
    """Row by row, by a dense solve."""
    new_OI = torch.zeros_like(weight_OI)
    for row in range(len(weight_OI)):
        kept = (~removed_OI[row]).nonzero()[:, 0]
        wanted = (hessian_II @ weight_OI[row])[kept]
        new_OI[row, kept] = torch.linalg.solve(hessian_II[kept][:, kept], wanted)
    return new_OI


@pytest.mark.parametrize("seed", range(4))
def test_the_refit_is_the_least_squares_of_every_row(seed):
    weight_OI, hessian_II = problem(6, 24, seed)
    removed_OI = torch.rand(6, 24, generator=torch.Generator().manual_seed(seed)) < 0.6
    removed_OI[0] = False
    removed_OI[1] = True
    fitted = fit(weight_OI, hessian_II, removed_OI)
    assert fitted.residual <= TOLERANCE
    expected = best_on(weight_OI, hessian_II, removed_OI)
    torch.testing.assert_close(fitted.weight_OI, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
    assert loss(weight_OI, fitted.weight_OI, hessian_II) == pytest.approx(
        loss(weight_OI, expected, hessian_II), rel=1e-6
    )
    assert not fitted.weight_OI[removed_OI].any()


@pytest.mark.parametrize("granularity", [Unstructured(), NM(keep=2, of=4)], ids=str)
def test_the_refit_never_makes_the_sweep_worse_and_starts_from_it(granularity):
    weight_OI, hessian_II = (tensor.float() for tensor in problem(16, 32, 0))
    share = 0.5 if granularity.needs_sparsity else None
    new_OI, removed_OI = sweep(weight_OI, factorise(hessian_II, 1e-6, "x").upper_II, granularity, share, 8)
    fitted = fit(weight_OI, hessian_II, removed_OI, new_OI)
    before, after = (loss(weight_OI, found, hessian_II) for found in (new_OI, fitted.weight_OI))
    assert after < before
    assert fit(weight_OI, hessian_II, removed_OI, fitted.weight_OI).steps == 0


def masks(inputs: int, zeros: int, keep: int | None, of: int | None) -> list[list[int]]:
    """Every choice of removed columns of one row."""
    found = [list(chosen) for chosen in itertools.combinations(range(inputs), zeros)]
    if keep is None or of is None:
        return found
    groups = range(inputs // of)
    return [m for m in found if all(sum(i // of == group for i in m) == of - keep for group in groups)]


@pytest.mark.parametrize("granularity", [Unstructured(), NM(keep=2, of=4)], ids=str)
def test_admm_comes_near_the_best_of_all_masks_and_nearer_than_the_sweep(granularity):
    """One row of 12 inputs, half of which go: all 924 masks, or the 216 of 2:4, each with its own least squares."""
    pattern = (granularity.keep, granularity.of) if isinstance(granularity, NM) else (None, None)
    share = 0.5 if granularity.needs_sparsity else None
    ours, theirs, best = [], [], []
    for seed in range(12):
        weight_OI, hessian_II = problem(1, 12, seed)
        possible = []
        for chosen in masks(12, 6, *pattern):
            removed_OI = torch.zeros(1, 12, dtype=torch.bool)
            removed_OI[0, chosen] = True
            possible.append(loss(weight_OI, best_on(weight_OI, hessian_II, removed_OI), hessian_II))
        sparse_OI, removed_OI = admm.choose(weight_OI, hessian_II, granularity, share)
        assert int(removed_OI.sum()) == 6
        assert not sparse_OI[removed_OI].any()
        ours.append(loss(weight_OI, fit(weight_OI, hessian_II, removed_OI, sparse_OI).weight_OI, hessian_II))
        upper_II = factorise(hessian_II.float(), 1e-9, "x").upper_II
        _, swept_OI = sweep(weight_OI.float(), upper_II, granularity, share, 12)
        theirs.append(loss(weight_OI, best_on(weight_OI, hessian_II, swept_OI), hessian_II))
        best.append(min(possible))
    assert all(found >= least * (1 - 1e-9) for found, least in zip(ours, best, strict=True))
    excess = [sum(f / b for f, b in zip(found, best, strict=True)) / len(best) for found in (ours, theirs)]
    assert excess[0] < 1.5
    assert excess[0] < excess[1]


@pytest.mark.parametrize("granularity", [Unstructured(), NM(keep=2, of=4), NM(keep=1, of=4)], ids=str)
@pytest.mark.parametrize("sparsity", [0.3, 0.51, 0.9])
def test_every_solver_makes_exactly_as_many_zeros_as_asked(granularity, sparsity):
    weight_OI, hessian_II = (tensor.float() for tensor in problem(7, 20, 1))
    share = sparsity if granularity.needs_sparsity else None
    before = weight_OI.clone(), hessian_II.clone()
    given = Problem(hessian_II, 0.01, granularity, share, 128, "x")
    for solve in SOLVERS.values():
        new_OI, removed_OI = solve(weight_OI, given)
        assert int(removed_OI.sum()) == granularity.zeros(7, 20, share)
        assert not new_OI[removed_OI].any()
        assert granularity.holds(new_OI)
    assert torch.equal(weight_OI, before[0])
    assert torch.equal(hessian_II, before[1])


def test_an_input_that_is_always_zero_is_no_trouble():
    weight_OI, hessian_II = (tensor.float() for tensor in problem(5, 16, 2))
    hessian_II[3] = hessian_II[:, 3] = 0
    given = Problem(hessian_II, 0.01, Unstructured(), 0.5, 128, "x")
    for solve in SOLVERS.values():
        new_OI, removed_OI = solve(weight_OI, given)
        assert torch.isfinite(fit(weight_OI, given.damped_II, removed_OI, new_OI).weight_OI).all()


@pytest.mark.parametrize("options", [{"solver": "admm"}, {"refit": True}, {"solver": "admm", "refit": True}], ids=str)
def test_a_recipes_options_reach_the_layers_and_lower_their_error(options):
    errors = {}
    for name, given in (("obs", {}), ("other", options)):
        loaded = tiny.load("sd3")
        calibration = tiny.calibrate(loaded, packages=1)
        (package,) = calibration.packages(loaded.targets, "second")
        pruner = OBSDiff.model_validate({"sparsity": 0.6, "weighting": "uniform", **given})
        moments = calibration.collect(package, "second", pruner.weighting)
        errors[name] = [result.error or 0.0 for result in prune_package(pruner, package, moments)]
    assert sum(errors["other"]) < sum(errors["obs"])
