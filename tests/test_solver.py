"""The OBS sweep against least squares, brute force, and a transcription of the published algorithm, all in float64."""

# Shapes: O outputs, I inputs, T tokens.

import itertools
from types import SimpleNamespace

import pytest
import torch
from compressor_obs_diff import OBSDiff, batch
from compressor_obs_diff import layers as obs_diff_layers
from compressor_obs_diff.granularities import NM, Unstructured
from compressor_obs_diff.layers import prune_package
from compressor_obs_diff.solver import Factor, factorise, sweep, sweep_together
from torch import Tensor, nn

from compressor import sparsity
from compressor.calibration import Group, Moments, Package
from compressor.errors import CompressorError
from compressor.structure import Layer, Target
from tests.layer_errors import relative_error

DAMPING = 0.01


def problem(outputs: int, inputs: int, tokens: int = 60, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random weights and correlated tokens."""
    generator = torch.Generator().manual_seed(seed)
    mixing_II = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)
    x_TI = torch.randn(tokens, inputs, generator=generator, dtype=torch.float64) @ mixing_II
    return torch.randn(outputs, inputs, generator=generator, dtype=torch.float64), x_TI


def damped(x_TI: Tensor, damping: float = DAMPING) -> Tensor:
    """Tokens whose second moment is the damped Hessian: damping as extra rows."""
    scale = (damping * x_TI.square().sum(0).mean()).sqrt()
    return torch.cat([x_TI, scale * torch.eye(x_TI.shape[1], dtype=x_TI.dtype)])


def upper(x_TI: Tensor) -> Tensor:
    """U of the damped Hessian in float64, as published: factorise, invert, factorise again."""
    x_TI = damped(x_TI)
    inverse_II = torch.cholesky_inverse(torch.linalg.cholesky(x_TI.T @ x_TI))
    return torch.linalg.cholesky(inverse_II, upper=True)


def loss(difference_OI: Tensor, x_TI: Tensor) -> Tensor:
    return (x_TI @ difference_OI.T).square().sum()


# ------------------------------------------------------------------------------------------------------ least squares


def best_update(weight_I: Tensor, x_TI: Tensor, frozen: dict[int, float]) -> Tensor:
    """The row nearest in output to `weight_I` among those with some entries given, by least squares."""
    free = [i for i in range(len(weight_I)) if i not in frozen]
    result_I = weight_I.clone()
    for i, value in frozen.items():
        result_I[i] = value
    if free:
        fixed_I = result_I.clone()
        fixed_I[free] = 0
        wanted_T = x_TI @ (weight_I - fixed_I)
        result_I[free] = torch.linalg.lstsq(x_TI[:, free], wanted_T[:, None]).solution[:, 0]
    return result_I


@pytest.mark.parametrize("seed", range(5))
def test_removing_the_first_weight_updates_the_rest_as_least_squares_does(seed):
    weight_OI, x_TI = problem(1, 6, seed=seed)
    first = SimpleNamespace(
        columns=lambda block: block,
        zeros=lambda outputs, inputs, share: min(inputs, 1),
        mask=lambda score_OI, zeros: torch.tensor([[True] + [False] * 5]),
    )
    new_OI, removed_OI = sweep(weight_OI, upper(x_TI), first, None, 128)  # pyright: ignore[reportArgumentType]
    assert removed_OI.tolist() == [[True, False, False, False, False, False]]
    expected_I = best_update(weight_OI[0], damped(x_TI), {0: 0.0})
    torch.testing.assert_close(new_OI[0], expected_I, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("seed", range(8))
def test_the_one_weight_removed_is_the_cheapest_of_all_choices(seed):
    """A choice costs what is lost after the best update of the columns behind it, as the sweep updates no others."""
    inputs = 7
    weight_OI, x_TI = problem(1, inputs, seed=seed)
    rows_TI = damped(x_TI)
    losses, candidates = [], []
    for j in range(inputs):
        before = {i: weight_OI[0, i].item() for i in range(j)}
        candidate_I = best_update(weight_OI[0], rows_TI, {**before, j: 0.0})
        candidates.append(candidate_I)
        losses.append(loss((candidate_I - weight_OI[0])[None], rows_TI).item())
    best = min(range(inputs), key=losses.__getitem__)
    new_OI, removed_OI = sweep(weight_OI, upper(x_TI), Unstructured(), 1 / inputs, 128)
    assert removed_OI[0].nonzero().flatten().tolist() == [best]
    torch.testing.assert_close(new_OI[0], candidates[best], rtol=1e-9, atol=1e-9)
    cost = (weight_OI[0, best] / upper(x_TI)[best, best]).square().item()
    assert cost == pytest.approx(losses[best], rel=1e-9)


@pytest.mark.parametrize("granularity", [Unstructured(), NM(keep=2, of=4), NM(keep=1, of=2)], ids=str)
def test_every_column_is_fixed_at_its_least_squares_value_given_those_before_it(granularity):
    weight_OI, x_TI = problem(3, 12)
    share = 0.5 if granularity.needs_sparsity else None
    new_OI, removed_OI = sweep(weight_OI, upper(x_TI), granularity, share, 4)
    rows_TI = damped(x_TI)
    for row in range(3):
        frozen: dict[int, float] = {}
        for j in range(12):
            value = 0.0 if removed_OI[row, j] else best_update(weight_OI[row], rows_TI, frozen)[j].item()
            frozen[j] = value
            assert new_OI[row, j].item() == pytest.approx(value, rel=1e-8, abs=1e-8)


@pytest.mark.parametrize("seed", range(3))
def test_two_of_four_are_the_cheapest_pair_by_their_own_costs(seed):
    """With independent inputs nothing can be made up for, so brute force over all pairs decides."""
    generator = torch.Generator().manual_seed(seed)
    weight_OI = torch.randn(4, 8, generator=generator, dtype=torch.float64)
    energy_I = torch.rand(8, generator=generator, dtype=torch.float64) + 0.1
    upper_II = (energy_I + DAMPING * energy_I.mean()).rsqrt().diag()
    new_OI, _ = sweep(weight_OI, upper_II, NM(keep=2, of=4), None, 128)
    for row, start in itertools.product(range(4), (0, 4)):
        damped_I = energy_I + DAMPING * energy_I.mean()
        choices = itertools.combinations(range(start, start + 4), 2)
        best = min(choices, key=lambda pair: sum(weight_OI[row, j] ** 2 * damped_I[j] for j in pair))
        zeros = [j for j in range(start, start + 4) if new_OI[row, j] == 0]
        assert zeros == list(best)
    kept = new_OI != 0
    assert torch.equal(new_OI[kept], weight_OI[kept])


# -------------------------------------------------------------------------------------------------- the published code


def published(weight_OI: Tensor, hessian_II: Tensor, block: int, share: float | None, keep: int, of: int) -> Tensor:
    """SparseGPT's algorithm 1 in its paper's notation (W, H, M, E, B, B_s), with an exact count instead of a threshold.

    M is 1 where a weight stays. The count of a block is the difference of the rounded counts up to its ends.
    """
    W, H = weight_OI.clone(), hessian_II.clone()
    rows, cols = W.shape
    H += 0.01 * H.diagonal().mean() * torch.eye(cols, dtype=H.dtype)
    Hinv = torch.linalg.cholesky(torch.linalg.inv(H), upper=True)
    M = torch.ones_like(W)
    for i in range(0, cols, block):
        end = min(i + block, cols)
        E = torch.zeros(rows, end - i, dtype=W.dtype)
        for j in range(i, end):
            if share is not None and j == i:
                k = round(share * rows * end) - round(share * rows * i)
                scores = [
                    (W[r, c].item() ** 2 / Hinv[c, c].item() ** 2, r, c) for r in range(rows) for c in range(i, end)
                ]
                for _, r, c in sorted(scores)[:k]:
                    M[r, c] = 0
            if share is None and j % of == 0:
                for r in range(rows):
                    scores = [(W[r, c].item() ** 2 / Hinv[c, c].item() ** 2, c) for c in range(j, j + of)]
                    for _, c in sorted(scores)[: of - keep]:
                        M[r, c] = 0
            E[:, j - i] = W[:, j] / Hinv[j, j] * (1 - M[:, j])
            for c in range(j, end):
                W[:, c] -= E[:, j - i] * Hinv[j, c]
        for c in range(end, cols):
            for j in range(i, end):
                W[:, c] -= E[:, j - i] * Hinv[j, c]
    return W * M


@pytest.mark.parametrize(("outputs", "inputs"), [(1, 5), (4, 12), (7, 13), (16, 24), (3, 1), (5, 30)])
@pytest.mark.parametrize("block", [1, 4, 5, 8, 128])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.9])
def test_the_sweep_is_the_published_one(outputs, inputs, block, share):
    weight_OI, x_TI = problem(outputs, inputs, seed=outputs + inputs)
    expected_OI = published(weight_OI, x_TI.T @ x_TI, block, share, 0, 0)
    new_OI, removed_OI = sweep(weight_OI, upper(x_TI), Unstructured(), share, block)
    assert torch.equal(removed_OI, expected_OI == 0)
    torch.testing.assert_close(new_OI, expected_OI, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("keep", "of"), [(1, 2), (2, 4), (1, 4), (2, 3), (4, 6), (4, 8)])
@pytest.mark.parametrize("block", [1, 4, 5, 16, 128])
def test_the_n_m_sweep_is_the_published_one_whatever_the_block(keep, of, block):
    weight_OI, x_TI = problem(5, 24, seed=of)
    expected_OI = published(weight_OI, x_TI.T @ x_TI, 24, None, keep, of)
    new_OI, removed_OI = sweep(weight_OI, upper(x_TI), NM(keep=keep, of=of), None, block)
    assert torch.equal(removed_OI, expected_OI == 0)
    torch.testing.assert_close(new_OI, expected_OI, rtol=1e-9, atol=1e-9)
    assert sparsity.holds(new_OI, keep, of)


def test_factorising_and_sweeping_in_float32_agree_with_float64():
    weight_OI, x_TI = problem(24, 64, tokens=400)
    second_II = (x_TI.T @ x_TI).float()
    factor = factorise(second_II, DAMPING, "layer")
    new_OI, removed_OI = sweep(weight_OI.float(), factor.upper_II, NM(keep=2, of=4), None, 16)
    expected_OI, mask_OI = sweep(weight_OI, upper(x_TI), NM(keep=2, of=4), None, 16)
    assert torch.equal(removed_OI, mask_OI)
    torch.testing.assert_close(new_OI.double(), expected_OI, rtol=2e-3, atol=2e-4)


# ---------------------------------------------------------------------------------------------------------- exactness


def test_exactly_as_many_weights_go_as_were_asked_for():
    for outputs, inputs in itertools.product((1, 2, 3, 7), (1, 2, 5, 9)):
        weight_OI, x_TI = problem(outputs, inputs, seed=inputs)
        upper_II = upper(x_TI)
        for share, block in itertools.product((0.01, 0.3, 0.5, 0.77, 0.99), (1, 2, 4, 128)):
            for weights in (weight_OI, torch.ones_like(weight_OI)):
                new_OI, removed_OI = sweep(weights, upper_II, Unstructured(), share, block)
                asked = sparsity.count(share, outputs * inputs)
                assert int(removed_OI.sum()) == asked
                assert int((new_OI[removed_OI] != 0).sum()) == 0
                assert int((new_OI == 0).sum()) == asked


def test_ties_go_to_the_lower_index():
    new_OI, removed_OI = sweep(torch.ones(2, 4), torch.eye(4), Unstructured(), 0.5, 128)
    assert removed_OI.tolist() == [[True] * 4, [False] * 4]
    assert torch.equal(new_OI, (~removed_OI).float())
    _, removed_OI = sweep(torch.ones(2, 4), torch.eye(4), NM(keep=2, of=4), None, 128)
    assert removed_OI.tolist() == [[True, True, False, False]] * 2


def test_neither_weights_nor_hessian_are_changed():
    weight_OI, x_TI = problem(4, 8)
    weight_OI, second_II = weight_OI.float(), (x_TI.T @ x_TI).float()
    before = weight_OI.clone(), second_II.clone()
    sweep(weight_OI, factorise(second_II, DAMPING, "layer").upper_II, Unstructured(), 0.5, 4)
    assert torch.equal(weight_OI, before[0])
    assert torch.equal(second_II, before[1])


def test_scaling_all_timestep_weights_changes_nothing():
    weight_OI, x_TI = problem(6, 16)
    weight_OI, second_II = weight_OI.float(), (x_TI.T @ x_TI).float()
    expected_OI, mask_OI = sweep(weight_OI, factorise(second_II, DAMPING, "layer").upper_II, Unstructured(), 0.5, 8)
    for scale in (4.0, 2.0**-40, 2.0**40):
        upper_II = factorise(second_II * scale, DAMPING, "layer").upper_II
        new_OI, removed_OI = sweep(weight_OI, upper_II, Unstructured(), 0.5, 8)
        assert torch.equal(removed_OI, mask_OI)
        assert torch.equal(new_OI, expected_OI)
    new_OI, removed_OI = sweep(
        weight_OI, factorise(second_II * 0.37, DAMPING, "layer").upper_II, Unstructured(), 0.5, 8
    )
    assert torch.equal(removed_OI, mask_OI)
    torch.testing.assert_close(new_OI, expected_OI, rtol=1e-3, atol=1e-4)


def test_an_input_that_is_always_zero_is_pruned_first_and_costs_nothing():
    generator = torch.Generator().manual_seed(0)
    x_TI = torch.randn(200, 4, generator=generator)
    x_TI[:, 2] = 0
    weight_OI = 0.5 + torch.rand(8, 4, generator=generator)
    second_II = x_TI.T @ x_TI
    new_OI, removed_OI = sweep(weight_OI, factorise(second_II, DAMPING, "layer").upper_II, Unstructured(), 0.25, 128)
    assert removed_OI[:, 2].all()
    assert relative_error(weight_OI, new_OI, second_II) == 0


@pytest.mark.parametrize("seed", range(3))
def test_compensation_loses_less_than_the_same_mask_without_it(seed):
    weight_OI, x_TI = problem(32, 48, tokens=500, seed=seed)
    second_II = x_TI.T @ x_TI
    new_OI, removed_OI = sweep(weight_OI, upper(x_TI), Unstructured(), 0.5, 8)
    masked_OI = weight_OI.masked_fill(removed_OI, 0)
    assert relative_error(weight_OI, new_OI, second_II) < 0.6 * relative_error(weight_OI, masked_OI, second_II)


@pytest.mark.parametrize("seed", range(3))
def test_obs_loses_less_than_wanda_and_magnitude_on_the_same_moments(seed):
    weight_OI, x_TI = problem(32, 48, tokens=500, seed=seed)
    second_II = x_TI.T @ x_TI
    wanda_OI, magnitude_OI = weight_OI.abs() * second_II.diagonal().sqrt(), weight_OI.abs()

    def error(new_OI: Tensor) -> float:
        return relative_error(weight_OI, new_OI, second_II)

    obs = error(sweep(weight_OI, upper(x_TI), Unstructured(), 0.5, 8)[0])
    assert obs < 0.7 * error(weight_OI.masked_fill(sparsity.lowest_per_row(wanda_OI, 24), 0))
    assert obs < 0.7 * error(weight_OI.masked_fill(sparsity.lowest(magnitude_OI, weight_OI.numel() // 2), 0))
    obs = error(sweep(weight_OI, upper(x_TI), NM(keep=2, of=4), None, 128)[0])
    assert obs < 0.7 * error(weight_OI.masked_fill(sparsity.lowest_of_groups(wanda_OI, 2, 4), 0))
    assert obs < 0.7 * error(weight_OI.masked_fill(sparsity.lowest_of_groups(magnitude_OI, 2, 4), 0))


def test_the_relative_error_is_that_of_the_outputs():
    weight_OI, x_TI = problem(5, 9)
    new_OI = weight_OI.masked_fill(weight_OI < 0.3, 0)
    expected = loss(new_OI - weight_OI, x_TI) / loss(weight_OI, x_TI)
    assert relative_error(weight_OI, new_OI, x_TI.T @ x_TI) == pytest.approx(expected.item(), rel=1e-12)
    assert relative_error(torch.zeros(2, 3), torch.zeros(2, 3), torch.eye(3)) == 0


# ------------------------------------------------------------------------------------------------------ factorisation


@pytest.mark.parametrize("inputs", [1, 2, 7, 64])
def test_the_factor_is_the_upper_cholesky_triangle_of_the_inverse(inputs):
    _, x_TI = problem(1, inputs, tokens=3 * inputs)
    second_II = (x_TI.T @ x_TI).float()
    factor = factorise(second_II, DAMPING, "layer")
    assert factor.damping == DAMPING
    assert factor.dtype == torch.float32
    assert torch.equal(factor.upper_II, factor.upper_II.triu())
    U = factor.upper_II.double()
    rows_TI = damped(x_TI)
    torch.testing.assert_close(U.T @ U @ (rows_TI.T @ rows_TI), torch.eye(inputs).double(), rtol=0, atol=2e-3)
    torch.testing.assert_close(U, upper(x_TI), rtol=2e-3, atol=2e-3 * U.max().item())


def test_a_hessian_of_one_token_is_factorised_with_the_damping_asked_for():
    x_TI = torch.randn(1, 50, generator=torch.Generator().manual_seed(0))
    assert factorise(x_TI.T @ x_TI, DAMPING, "layer").damping == DAMPING


def indefinite(negative: float) -> Tensor:
    """A Hessian of mean diagonal 1 with one eigenvalue of `-negative`, as rounding may leave it."""
    generator = torch.Generator().manual_seed(0)
    basis_II = torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=torch.float64)).Q
    values_I = torch.tensor([-negative, *[(8 + negative) / 7] * 7], dtype=torch.float64)
    return (basis_II * values_I @ basis_II.T).float()


@pytest.mark.parametrize(("negative", "needed"), [(0.005, 0.01), (0.05, 0.1), (0.5, 1.0), (5.0, 10.0)])
def test_damping_rises_tenfold_until_the_factorisation_succeeds(negative, needed):
    factor = factorise(indefinite(negative), DAMPING, "layer")
    assert factor.damping == pytest.approx(needed)
    assert factor.dtype == torch.float32
    assert torch.isfinite(factor.upper_II).all()


def test_damping_rises_for_a_singular_hessian():
    x_TI = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    factor = factorise(x_TI.T @ x_TI, 1e-12, "layer")
    assert factor.damping > 1e-12
    assert torch.isfinite(factor.upper_II).all()


def test_double_precision_is_tried_when_single_fails(monkeypatch):
    real = torch.linalg.cholesky_ex

    def failing(matrix: Tensor) -> tuple[Tensor, Tensor]:
        factor, info = real(matrix)
        return factor, torch.ones_like(info) if matrix.dtype == torch.float32 else info

    monkeypatch.setattr(torch.linalg, "cholesky_ex", failing)
    _, x_TI = problem(1, 6)
    factor = factorise((x_TI.T @ x_TI).float(), DAMPING, "layer")
    assert factor.dtype == torch.float64
    assert factor.damping == DAMPING
    assert factor.upper_II.dtype == torch.float32
    torch.testing.assert_close(factor.upper_II.double(), upper(x_TI), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("fill", "found"), [(0.0, "0.0"), (float("nan"), "nan"), (float("inf"), "inf")])
def test_a_hessian_of_nothing_or_not_finite_is_an_error_that_names_the_layer(fill, found):
    with pytest.raises(CompressorError) as caught:
        factorise(torch.full((4, 4), fill), DAMPING, "blocks.3.attn.to_q")
    assert str(caught.value) == (
        f"blocks.3.attn.to_q: the mean of the squared inputs should be positive and finite, found {found}; nothing "
        "reached this layer during calibration, or its activations overflow"
    )


@pytest.mark.parametrize("fill", [float("nan"), float("inf"), 1e9])
def test_a_hessian_that_cannot_be_factorised_is_an_error_that_names_the_layer(fill):
    hessian_II = torch.eye(4)
    hessian_II[0, 3] = hessian_II[3, 0] = fill
    with pytest.raises(CompressorError) as caught:
        factorise(hessian_II, DAMPING, "blocks.3.attn.to_q")
    assert str(caught.value) == (
        "blocks.3.attn.to_q: its Hessian cannot be factorised, even in float64 with a damping of 10 times its mean "
        "diagonal; calibrate with more prompts"
    )


# ----------------------------------------------------------------------------------------------------- whole packages


def package(weights: list[Tensor]) -> Package:
    targets = []
    for i, weight_OI in enumerate(weights):
        linear = nn.Linear(weight_OI.shape[1], weight_OI.shape[0], bias=False)
        linear.weight.data = weight_OI.clone()
        layer = Layer(f"to_{i}", "attention", "query", "image", 0)
        targets.append(Target(f"blocks.0.to_{i}", linear.requires_grad_(False), "blocks.0", layer))
    return Package(1, 1, (Group(targets[0].name, tuple(targets)),), 0)


def moments(second_II: Tensor) -> Moments:
    count = torch.tensor(1)
    return Moments(second_II.diagonal(), torch.zeros(len(second_II)), second_II, count, torch.tensor(0), count.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_layers_report_the_error_of_the_weights_as_they_are_kept(dtype):
    first_OI, x_TI = problem(6, 16)
    second_OI, _ = problem(3, 16, seed=1)
    dense = [first_OI.to(dtype), second_OI.to(dtype)]
    packed = package(dense)
    second_II = (x_TI.T @ x_TI).float()
    options = OBSDiff.model_validate({"sparsity": 0.5})
    results = list(prune_package(options, packed, {packed.groups[0].name: moments(second_II)}))
    assert [result.name for result in results] == ["blocks.0.to_0", "blocks.0.to_1"]
    for result, target, old_OI in zip(results, packed.groups[0].targets, dense, strict=True):
        new_OI = target.module.weight
        assert new_OI.dtype == dtype
        assert int((new_OI == 0).sum()) == options.zeros(target) == old_OI.numel() // 2
        difference_OI = new_OI.double() - old_OI.double()
        expected = loss(difference_OI, x_TI) / loss(old_OI.double(), x_TI)
        assert result.error is not None
        assert result.error == pytest.approx(expected.item(), rel=1e-3)
        assert result.error > 1e-3
        assert result.damping == DAMPING
        assert result.notes == ()


def test_layers_that_share_an_input_share_one_factorisation(monkeypatch):
    calls = []
    real = batch.factorise_batch
    monkeypatch.setattr(batch, "factorise_batch", lambda *args: calls.extend(args[2]) or real(*args))
    weight_OI, x_TI = problem(4, 8)
    packed = package([weight_OI.float()] * 3)
    held = {packed.groups[0].name: moments((x_TI.T @ x_TI).float())}
    assert len(list(prune_package(OBSDiff.model_validate({"sparsity": 0.5}), packed, held))) == 3
    assert calls == ["blocks.0.to_0"]
    assert held == {}


@pytest.mark.parametrize("granularity", ["unstructured", "n_m"])
def test_layers_that_share_an_input_are_solved_at_once_as_each_would_be_alone(granularity, monkeypatch):
    calls = []
    monkeypatch.setattr(
        obs_diff_layers, "sweep_together", lambda *args: calls.append(len(args[0])) or sweep_together(*args)
    )
    share = {"sparsity": 0.5} if granularity == "unstructured" else {}
    options = OBSDiff.model_validate({"granularity": granularity, "block": 8, **share})
    _, x_TI = problem(4, 16)
    second_II = (x_TI.T @ x_TI).float()
    dense = [problem(outputs, 16, seed=outputs)[0].float() for outputs in (5, 1, 12)]
    packed = package(dense)
    results = list(prune_package(options, packed, {packed.groups[0].name: moments(second_II)}))
    assert calls == [3]
    for weight_OI, together, target in zip(dense, results, packed.groups[0].targets, strict=True):
        single = package([weight_OI])
        (alone,) = prune_package(options, single, {single.groups[0].name: moments(second_II)})
        expected_OI = single.groups[0].targets[0].module.weight
        assert torch.equal(target.module.weight == 0, expected_OI == 0)
        torch.testing.assert_close(target.module.weight, expected_OI)
        assert together.zeros == alone.zeros == int((expected_OI == 0).sum())
        assert together.error == pytest.approx(alone.error, rel=1e-4)
        assert together.seconds > 0


def test_no_more_weights_are_solved_at_once_than_memory_is_meant_for(monkeypatch):
    calls = []
    monkeypatch.setattr(
        obs_diff_layers, "sweep_together", lambda *args: calls.append(len(args[0])) or sweep_together(*args)
    )
    monkeypatch.setattr(obs_diff_layers, "MOST_TOGETHER", 70)
    _, x_TI = problem(4, 8)
    packed = package([problem(outputs, 8, seed=outputs)[0].float() for outputs in (4, 4, 1, 20, 2, 3)])
    held = {packed.groups[0].name: moments((x_TI.T @ x_TI).float())}
    results = list(prune_package(OBSDiff.model_validate({"sparsity": 0.5}), packed, held))
    assert calls == [2, 1, 1, 2]  # 64, 8, 160 and 40 weights
    assert [result.name for result in results] == [target.name for target in packed.groups[0].targets]


def test_a_damping_that_had_to_rise_is_reported():
    weight_OI, _ = problem(4, 8)
    packed = package([weight_OI.float()])
    held = {packed.groups[0].name: moments(indefinite(0.05))}
    (result,) = prune_package(OBSDiff.model_validate({"sparsity": 0.5}), packed, held)
    assert result.damping == pytest.approx(0.1)
    assert result.notes == ("the Hessian could only be factorised with a damping of 0.1, not 0.01",)
    assert int((packed.groups[0].targets[0].module.weight == 0).sum()) == 16


def test_double_precision_is_reported(monkeypatch):
    factor = Factor(torch.eye(8), 0.01, torch.float64)
    monkeypatch.setattr(batch, "factorise_batch", lambda *_: (factor.upper_II[None], [factor]))
    weight_OI, x_TI = problem(4, 8)
    packed = package([weight_OI.float()])
    held = {packed.groups[0].name: moments((x_TI.T @ x_TI).float())}
    (result,) = prune_package(OBSDiff.model_validate({"sparsity": 0.5}), packed, held)
    assert result.notes == ("the Hessian could only be factorised with a damping of 0.01 in float64, not 0.01",)
