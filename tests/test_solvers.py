"""ADMM and the refit, against enumeration and dense least squares."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from typing import Any

import pytest
import torch
from compressor_obs_diff import OBSDiff, admm, batch, least_squares, product
from compressor_obs_diff.granularities import NM, Unstructured
from compressor_obs_diff.layers import prune_package
from compressor_obs_diff.least_squares import TOLERANCE, Fitted
from compressor_obs_diff.quadratic import Quadratic
from compressor_obs_diff.solver import factorise, sweep
from torch import Tensor, nn

from compressor.calibration import Group, Moments, Package, sampling
from compressor.plugin import Elementwise, LayerResult
from compressor.structure import Component
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


def form(hessian_II: Tensor, metric_BKK: Tensor | None = None) -> Quadratic:
    return Quadratic(hessian_II[None].clone(), None if metric_BKK is None else metric_BKK[None].clone())


def choose(
    weight_OI: Tensor,
    hessian_II: Tensor,
    granularity: Elementwise,
    sparsity: float | None,
    metric_BKK: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Of one layer."""
    outputs, inputs = weight_OI.shape
    masks = batch.masks_of(granularity, [outputs], [[sparsity]], admm.shares(), inputs, weight_OI.device)
    sparse_NOI, removed_NOI = admm.choose(weight_OI[None], form(hessian_II, metric_BKK), masks)
    return sparse_NOI[0], removed_NOI[0]


def fit(
    weight_OI: Tensor,
    hessian_II: Tensor,
    removed_OI: Tensor,
    start_OI: Tensor | None = None,
    metric_BKK: Tensor | None = None,
    most: int = least_squares.MOST_STEPS,
) -> Fitted:
    """Of one layer, whose weights are O x I in the result as well."""
    start_NOI = None if start_OI is None else start_OI[None]
    found = least_squares.fit(weight_OI[None], form(hessian_II, metric_BKK), removed_OI[None], start_NOI, most)
    return dataclasses.replace(found, weight_NOI=found.weight_NOI[0])


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
    torch.testing.assert_close(fitted.weight_NOI, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
    assert loss(weight_OI, fitted.weight_NOI, hessian_II) == pytest.approx(
        loss(weight_OI, expected, hessian_II), rel=1e-6
    )
    assert not fitted.weight_NOI[removed_OI].any()


@pytest.mark.parametrize("granularity", [Unstructured(), NM(keep=2, of=4)], ids=str)
def test_the_refit_never_makes_the_sweep_worse_and_starts_from_it(granularity):
    weight_OI, hessian_II = (tensor.float() for tensor in problem(16, 32, 0))
    share = 0.5 if granularity.needs_sparsity else None
    new_OI, removed_OI = sweep(weight_OI, factorise(hessian_II, 1e-6, "x").upper_II, granularity, share, 8)
    fitted = fit(weight_OI, hessian_II, removed_OI, new_OI)
    before, after = (loss(weight_OI, found, hessian_II) for found in (new_OI, fitted.weight_NOI))
    assert after < before
    assert fit(weight_OI, hessian_II, removed_OI, fitted.weight_NOI).steps == 0


@pytest.mark.parametrize("coupled", [False, True])
def test_the_refit_ends_where_more_steps_would_hardly_lower_the_error(coupled, monkeypatch):
    weight_OI, hessian_II = problem(24, 192, 0)
    hessian_II.diagonal().sub_(0.0099 / 1.01 * hessian_II.diagonal().mean())  # a hundredth of the damping is left
    metric_BKK = None
    removed_OI = torch.rand(24, 192, generator=torch.Generator().manual_seed(0)) < 0.5
    if coupled:
        _, outputs_OO = problem(1, 24, 1)
        metric_BKK = outputs_OO[None]

    def error(new_OI: Tensor) -> float:
        difference_OI = new_OI - weight_OI
        left_OI = difference_OI if metric_BKK is None else metric_BKK[0] @ difference_OI
        return ((difference_OI @ hessian_II) * left_OI).sum().item()

    ended = fit(weight_OI, hessian_II, removed_OI, metric_BKK=metric_BKK)
    monkeypatch.setattr(least_squares, "GAIN", 0.0)
    whole = fit(weight_OI, hessian_II, removed_OI, metric_BKK=metric_BKK)
    assert ended.steps < whole.steps
    assert error(ended.weight_NOI) == pytest.approx(error(whole.weight_NOI), rel=1e-4)
    ten_less = fit(weight_OI, hessian_II, removed_OI, metric_BKK=metric_BKK, most=ended.steps - 10)
    twenty_less = fit(weight_OI, hessian_II, removed_OI, metric_BKK=metric_BKK, most=ended.steps - 20)
    assert error(ten_less.weight_NOI) - error(ended.weight_NOI) < 1e-5 * error(ended.weight_NOI)
    assert error(twenty_less.weight_NOI) - error(ten_less.weight_NOI) >= 1e-5 * error(ten_less.weight_NOI)


def masks(weights: int, granularity: Elementwise) -> Tensor:
    """Every choice of half of the weights: which stay, mask by mask, in order."""
    kept_MK = torch.tensor(list(itertools.combinations(range(weights), weights // 2)))
    if not isinstance(granularity, NM):
        return kept_MK
    groups = range(weights // granularity.of)
    right_GM = [(kept_MK // granularity.of == group).sum(1) == granularity.keep for group in groups]
    return kept_MK[torch.stack(right_GM).all(0)]


def least(weight_J: Tensor, form_JJ: Tensor, kept_MK: Tensor) -> float:
    """The loss with the best of all masks, each with its own least squares, by dense solves."""
    wanted_MK = (form_JJ @ weight_J)[kept_MK]
    found_MK = torch.linalg.solve(form_JJ[kept_MK[:, :, None], kept_MK[:, None]], wanted_MK)
    difference_MJ = weight_J.new_zeros(len(kept_MK), len(weight_J)).scatter(1, kept_MK, found_MK) - weight_J
    return (difference_MJ @ form_JJ * difference_MJ).sum(1).min().item()


@pytest.mark.parametrize("granularity", [Unstructured(), NM(keep=2, of=4)], ids=str)
def test_admm_comes_near_the_best_of_all_masks_and_nearer_than_the_sweep(granularity):
    """One row of 12 inputs, half of which go: all 924 masks, or the 216 of 2:4, each with its own least squares."""
    share = 0.5 if granularity.needs_sparsity else None
    possible = masks(12, granularity)
    assert len(possible) == (924 if granularity.needs_sparsity else 216)
    ours, theirs, best = [], [], []
    for seed in range(12):
        weight_OI, hessian_II = problem(1, 12, seed)
        sparse_OI, removed_OI = choose(weight_OI, hessian_II, granularity, share)
        assert int(removed_OI.sum()) == 6
        assert not sparse_OI[removed_OI].any()
        ours.append(loss(weight_OI, fit(weight_OI, hessian_II, removed_OI, sparse_OI).weight_NOI, hessian_II))
        upper_II = factorise(hessian_II.float(), 1e-9, "x").upper_II
        _, swept_OI = sweep(weight_OI.float(), upper_II, granularity, share, 12)
        theirs.append(loss(weight_OI, best_on(weight_OI, hessian_II, swept_OI), hessian_II))
        best.append(least(weight_OI[0], hessian_II, possible))
    assert all(found >= least * (1 - 1e-9) for found, least in zip(ours, best, strict=True))
    excess = [sum(f / b for f, b in zip(found, best, strict=True)) / len(best) for found in (ours, theirs)]
    assert excess[0] < 1.5
    assert excess[0] < excess[1]


def metric(outputs: int, seed: int) -> Tensor:
    """Of outputs that depend on one another and differ in size, float64."""
    generator = torch.Generator().manual_seed(100 + seed)
    mixing_OO = torch.randn(outputs, outputs, generator=generator, dtype=torch.float64)
    size_O = torch.rand(outputs, generator=generator, dtype=torch.float64) + 0.1
    return (mixing_OO * size_O).T @ (mixing_OO * size_O) + 0.05 * torch.eye(outputs, dtype=torch.float64)


def loss_in(outputs_OO: Tensor, weight_OI: Tensor, new_OI: Tensor, hessian_II: Tensor) -> float:
    difference_OI = new_OI - weight_OI
    return (outputs_OO @ difference_OI @ hessian_II * difference_OI).sum().item()


def best_in(outputs_OO: Tensor, weight_OI: Tensor, hessian_II: Tensor, removed_OI: Tensor) -> Tensor:
    """All rows at once, by a dense solve with the Kronecker product."""
    whole = torch.kron(outputs_OO, hessian_II)
    kept = (~removed_OI).flatten().nonzero()[:, 0]
    new = torch.zeros_like(weight_OI.flatten())
    new[kept] = torch.linalg.solve(whole[kept][:, kept], (whole @ weight_OI.flatten())[kept])
    return new.view_as(weight_OI)


@pytest.mark.parametrize("seed", range(3))
def test_with_a_metric_of_the_outputs_the_refit_is_the_least_squares_of_all_rows_together(seed):
    weight_OI, hessian_II = problem(5, 12, seed)
    outputs_OO = metric(5, seed)
    removed_OI = torch.rand(5, 12, generator=torch.Generator().manual_seed(seed)) < 0.6
    removed_OI[1] = True
    fitted = fit(weight_OI, hessian_II, removed_OI, metric_BKK=outputs_OO[None])
    assert fitted.residual <= TOLERANCE
    expected = best_in(outputs_OO, weight_OI, hessian_II, removed_OI)
    torch.testing.assert_close(fitted.weight_NOI, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
    by_row = loss_in(outputs_OO, weight_OI, fit(weight_OI, hessian_II, removed_OI).weight_NOI, hessian_II)
    assert loss_in(outputs_OO, weight_OI, fitted.weight_NOI, hessian_II) < 0.99 * by_row
    assert not fitted.weight_NOI[removed_OI].any()


@pytest.mark.parametrize("granularity", [Unstructured(), NM(keep=2, of=4)], ids=str)
def test_in_a_metric_of_the_outputs_admm_comes_near_the_best_of_all_masks(granularity):
    """Two rows of 6 or 4 inputs, half of which go: all 924 masks, or the 36 of 2:4."""
    share, inputs = (0.5, 6) if granularity.needs_sparsity else (None, 4)
    excess: dict[str, float] = {"with": 0.0, "without": 0.0}
    seeds = 24 if granularity.needs_sparsity else 100
    possible = masks(2 * inputs, granularity)
    assert len(possible) == (924 if granularity.needs_sparsity else 36)
    for seed in range(seeds):
        weight_OI, hessian_II = problem(2, inputs, seed)
        outputs_OO = metric(2, seed)
        best = least(weight_OI.flatten(), torch.kron(outputs_OO, hessian_II), possible)
        for name, given in (("with", outputs_OO[None]), ("without", None)):
            sparse_OI, removed_OI = choose(weight_OI, hessian_II, granularity, share, given)
            assert int(removed_OI.sum()) == inputs
            assert not sparse_OI[removed_OI].any()
            new_OI = best_in(outputs_OO, weight_OI, hessian_II, removed_OI)
            found = loss_in(outputs_OO, weight_OI, new_OI, hessian_II)
            assert found >= best * (1 - 1e-9)
            excess[name] += found / best / seeds
    assert excess["with"] < 1.5
    assert excess["with"] < excess["without"]


def test_a_metric_in_which_all_outputs_count_the_same_changes_nothing():
    weight_OI, hessian_II = problem(6, 16, 0)
    same_OO = 7 * torch.eye(6, dtype=torch.float64)
    plain_OI, removed_OI = choose(weight_OI, hessian_II, Unstructured(), 0.5)
    found_OI, chosen_OI = choose(weight_OI, hessian_II, Unstructured(), 0.5, same_OO[None])
    assert torch.equal(removed_OI, chosen_OI)
    torch.testing.assert_close(found_OI, plain_OI)


def several(problems: int, outputs: int, inputs: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, Hessians and metrics of several problems, float64."""
    found = [problem(outputs, inputs, seed) for seed in range(problems)]
    metrics = torch.stack([metric(outputs, seed) for seed in range(problems)])
    return torch.stack([weight for weight, _ in found]), torch.stack([second for _, second in found]), metrics


@pytest.mark.parametrize("coupled", [False, True])
@pytest.mark.parametrize("granularity", [Unstructured(), NM(keep=2, of=4)], ids=str)
def test_problems_and_layers_solved_at_once_are_as_solved_by_themselves(granularity, coupled, monkeypatch):
    """Three problems of three layers, of 4, 4 and 8 outputs; with metrics of blocks of 4."""
    monkeypatch.setattr(least_squares, "TOLERANCE", 1e-9)  # when to end is decided for all together
    monkeypatch.setattr(least_squares, "GAIN", 0.0)
    rows = [4, 4, 8]
    weight_NOI, hessian_NII, metric_NKK = several(3, 16, 32)
    metric_NBKK = torch.stack([metric_NKK[:, i : i + 4, i : i + 4] for i in range(0, 16, 4)], dim=1)
    shares = [
        [0.3 + 0.1 * problem + 0.05 * layer if granularity.needs_sparsity else None for layer in range(3)]
        for problem in range(3)
    ]
    masks = batch.masks_of(granularity, rows, shares, admm.shares(), 32, weight_NOI.device)
    quadratic = Quadratic(hessian_NII.clone(), metric_NBKK.clone() if coupled else None)
    sparse_NOI, removed_NOI = admm.choose(weight_NOI, quadratic, masks)
    fitted_NOI = least_squares.fit(weight_NOI, quadratic, removed_NOI, sparse_NOI, 500).weight_NOI
    for problem in range(3):
        first = 0
        for outputs, share in zip(rows, shares[problem], strict=True):
            part = slice(first, first + outputs)
            old_OI, hessian_II = weight_NOI[problem, part], hessian_NII[problem]
            metric_BKK = metric_NBKK[problem, first // 4 : part.stop // 4] if coupled else None
            new_OI, mask_OI = choose(old_OI, hessian_II, granularity, share, metric_BKK)
            assert torch.equal(removed_NOI[problem, part], mask_OI)
            torch.testing.assert_close(sparse_NOI[problem, part], new_OI)
            fitted_OI = fit(old_OI, hessian_II, mask_OI, new_OI, metric_BKK).weight_NOI
            torch.testing.assert_close(fitted_NOI[problem, part], fitted_OI)
            first += outputs


@pytest.mark.parametrize("coupled", [False, True])
def test_few_inverses_do_for_all_rows_and_rounds_and_no_hessian_is_diagonalised(coupled, monkeypatch):
    weight_NOI, hessian_NII, metric_NKK = several(2, 6, 16)
    inverted: list[int] = []
    diagonalised: list[int] = []
    real, eigh = admm.inverse_factor, torch.linalg.eigh
    monkeypatch.setattr(admm, "inverse_factor", lambda m: inverted.append(m.shape[-1]) or real(m))
    monkeypatch.setattr(torch.linalg, "eigh", lambda m: diagonalised.append(m.shape[-1]) or eigh(m))
    masks = batch.masks_of(Unstructured(), [6], [[0.5], [0.5]], admm.shares(), 16, weight_NOI.device)
    admm.choose(weight_NOI, Quadratic(hessian_NII, metric_NKK[:, None] if coupled else None), masks)
    assert inverted == [16] * (5 if coupled else len(admm.PENALTIES))
    assert diagonalised == [6] * coupled


@pytest.mark.parametrize("coupled", [False, True])
def test_with_numbers_taken_apart_the_error_is_that_of_float32(coupled, monkeypatch):
    """As on a GPU, with a Hessian as ill-conditioned as damping lets it be, and inputs of very different size."""
    generator = torch.Generator().manual_seed(0)
    low_TI = torch.randn(2000, 8, generator=generator) @ torch.randn(8, 96, generator=generator)
    x_TI = (low_TI + 0.01 * torch.randn(2000, 96, generator=generator)) * torch.logspace(-3, 3, 96)
    hessian_II = x_TI.T @ x_TI
    hessian_II.diagonal().add_(0.01 * hessian_II.diagonal())
    weight_OI = torch.randn(24, 96, generator=generator) / torch.logspace(-3, 3, 96)
    metric_BKK = metric(24, 0).float()[None] if coupled else None
    errors = []
    for halves in (False, True):
        monkeypatch.setattr(product, "worthwhile", lambda x, terms, answer=halves: answer)
        new_OI, removed_OI = choose(weight_OI, hessian_II, Unstructured(), 0.6, metric_BKK)
        fitted = fit(weight_OI, hessian_II, removed_OI, new_OI, metric_BKK, 500)
        outputs_OO = torch.eye(24) if metric_BKK is None else metric_BKK[0]
        given = (each.double() for each in (outputs_OO, weight_OI, fitted.weight_NOI, hessian_II))
        errors.append(loss_in(*given))
    assert errors[1] == pytest.approx(errors[0], rel=0.01)


@pytest.mark.parametrize("granularity", [Unstructured(), NM(keep=2, of=4)], ids=str)
def test_blocks_of_a_metric_are_what_the_whole_matrix_is_with_zeros_between_them(granularity):
    share = 0.5 if granularity.needs_sparsity else None
    weight_OI, hessian_II = problem(6, 16, 0)
    blocks_BKK = torch.stack([metric(3, 0), 5 * metric(3, 1)])
    whole_BKK = torch.block_diag(*blocks_BKK)[None]
    found = [choose(weight_OI, hessian_II, granularity, share, given) for given in (blocks_BKK, whole_BKK)]
    assert torch.equal(found[0][1], found[1][1])
    torch.testing.assert_close(found[0][0], found[1][0])
    fitted = [fit(weight_OI, hessian_II, found[0][1], metric_BKK=given) for given in (blocks_BKK, whole_BKK)]
    torch.testing.assert_close(fitted[0].weight_NOI, fitted[1].weight_NOI, rtol=1e-4, atol=1e-4)
    assert not torch.equal(found[0][1], choose(weight_OI, hessian_II, granularity, share)[1])


@pytest.mark.parametrize("granularity", [Unstructured(), NM(keep=2, of=4), NM(keep=1, of=4)], ids=str)
@pytest.mark.parametrize("sparsity", [0.3, 0.51, 0.9])
def test_every_solver_makes_exactly_as_many_zeros_as_asked(granularity, sparsity):
    weight_OI, hessian_II = (tensor.float() for tensor in problem(7, 20, 1))
    share = sparsity if granularity.needs_sparsity else None
    before = weight_OI.clone(), hessian_II.clone()
    new_OI, removed_OI = choose(weight_OI, hessian_II, granularity, share)
    swept = sweep(weight_OI, factorise(hessian_II, 0.01, "x").upper_II, granularity, share, 128)
    for sparse_OI, mask_OI in ((new_OI, removed_OI), swept):
        assert int(mask_OI.sum()) == granularity.zeros(7, 20, share)
        assert not sparse_OI[mask_OI].any()
        assert granularity.holds(sparse_OI)
    assert torch.equal(weight_OI, before[0])
    assert torch.equal(hessian_II, before[1])


def test_an_input_that_is_always_zero_is_no_trouble():
    weight_OI, hessian_II = (tensor.float() for tensor in problem(5, 16, 2))
    hessian_II[3] = hessian_II[:, 3] = 0
    hessian_II.diagonal().add_(0.01 * hessian_II.diagonal().mean())
    for new_OI, removed_OI in (
        choose(weight_OI, hessian_II, Unstructured(), 0.5),
        sweep(weight_OI, factorise(hessian_II, 0.01, "x").upper_II, Unstructured(), 0.5, 128),
    ):
        assert torch.isfinite(fit(weight_OI, hessian_II, removed_OI, new_OI).weight_NOI).all()


@pytest.mark.parametrize("options", [{"solver": "admm"}, {"refit": True}, {"solver": "admm", "refit": True}], ids=str)
def test_a_recipes_options_reach_the_layers_and_lower_their_error(options):
    errors = {}
    for name, given in (("obs", {}), ("other", options)):
        loaded = tiny.load("sd3")
        calibration = tiny.calibrate(loaded, packages=1)
        (package,) = calibration.packages(loaded.targets, "second", tiny.no_workspace)
        pruner = OBSDiff.model_validate({"sparsity": 0.6, "weighting": "uniform", **given})
        moments = calibration.collect(package, "second", pruner.weighting)
        errors[name] = [result.error or 0.0 for result in prune_package(pruner, package, moments)]
    assert sum(errors["other"]) < sum(errors["obs"])


class Seen:
    """The inputs of one layer in every forward."""

    def __init__(self, layer: nn.Linear) -> None:
        self.inputs: list[Tensor] = []
        self.handle = layer.register_forward_pre_hook(lambda _, args: self.inputs.append(args[0].flatten(0, -2)))

    def all(self) -> Tensor:
        self.handle.remove()
        return torch.cat(self.inputs).double()


@pytest.mark.parametrize("kind", ["sd3", "sd2"])
def test_the_refit_moves_the_bias_where_there_is_one_and_the_error_counts_that(kind):
    loaded = tiny.load(kind)
    calibration = tiny.calibrate(loaded, packages=1)
    (package,) = calibration.packages(loaded.targets, "second", tiny.no_workspace)
    pruner = OBSDiff.model_validate({"sparsity": 0.6, "weighting": "uniform", "solver": "admm", "refit": True})
    targets = [group.targets[-1] for group in package.groups]
    seen = {group.targets[-1].name: Seen(group.targets[0].module) for group in package.groups}
    moments = calibration.collect(package, "second", pruner.weighting)
    dense = {target.name: copy.deepcopy(target.module).double() for target in targets}
    results = {result.name: result for result in prune_package(pruner, package, moments)}
    biased = 0
    for target in targets:
        x_TI = seen[target.name].all()
        before, after = dense[target.name], copy.deepcopy(target.module).double()
        difference_TO = after(x_TI) - before(x_TI)
        whole_TO = x_TI @ before.weight.T
        expected = (difference_TO.square().sum() / whole_TO.square().sum()).item()
        assert results[target.name].error == pytest.approx(expected, rel=1e-3, abs=1e-6)
        if before.bias is not None:
            biased += 1
            assert not torch.equal(before.bias, after.bias)
            # the best bias leaves no mean difference
            assert difference_TO.mean(0).abs().max() < 1e-4 * whole_TO.abs().max()
    assert biased > 0
    assert (biased < len(targets)) == (kind == "sd2")


def test_inputs_that_never_change_leave_the_bias_alone():
    moments = Moments.empty(4, True, torch.device("cpu"))
    moments.add(torch.tensor([[1.0, 2.0, 3.0, 4.0]]).expand(10, 4), 1.0)
    layer = nn.Linear(4, 4)
    before = layer.bias.detach().clone()
    target = dataclasses.replace(tiny.load("sd3").targets[0], name="x", module=layer)
    pruner = OBSDiff.model_validate({"sparsity": 0.5, "refit": True})
    group = Group("x", (target,))
    (result,) = prune_package(pruner, Package(1, 1, (group,), 0), {"x": moments.finish()})
    assert torch.equal(layer.bias, before)
    assert result.error is not None
    assert torch.isfinite(layer.weight).all()


def pruned_for(objective: str, kind: str) -> tuple[float, list[LayerResult]]:
    """How far the network's output moves at each step of a fresh sampling, and what is said about the layers."""
    loaded = tiny.load(kind)
    calls: list[tuple[Any, Any, Tensor]] = []
    handle = loaded.module.register_forward_hook(
        lambda _, args, kwargs, result: calls.append((args, kwargs, result[0])), with_kwargs=True
    )
    encoded = sampling.encode(loaded, tiny.PROMPTS, 3.0, 1, "test")
    sampling.sample(loaded, encoded, sampling.Settings(4, 3.0, tiny.SIDE, tiny.SIDE), "latent")
    handle.remove()
    with torch.no_grad():
        calibration = tiny.calibrate(loaded, packages=2)
        component = Component(loaded.component_name, loaded.module, loaded.family, loaded.targets)
        pruner = OBSDiff.model_validate({"sparsity": 0.6, "solver": "admm", "refit": True, "objective": objective})
        results = [result for result in pruner.prune(component, calibration) if isinstance(result, LayerResult)]
        before = torch.cat([result for _, _, result in calls])
        after = torch.cat([loaded.module(*args, **kwargs)[0] for args, kwargs, _ in calls])
    assert all(pruner.zeros(target) <= int((target.module.weight == 0).sum()) for target in loaded.targets)
    return ((after - before).square().sum() / before.square().sum()).item(), results


@pytest.mark.parametrize("kind", ["sd3", "sd2", "flux"])
def test_minding_the_networks_output_moves_it_less(kind):
    by_layer, _ = pruned_for("layer", kind)
    by_network, results = pruned_for("network", kind)
    assert by_network < 0.7 * by_layer
    notes = {result.name: result.notes for result in results if result.notes}
    if kind == "sd3":  # the text's queries of the last block: nothing reads what they find
        (name,) = notes
        assert name.endswith("attn.add_q_proj")
        assert notes[name] == ("the network's output does not depend on it: its own outputs' error was minimised",)
    else:
        assert not notes
