"""The kernels of sweep and removal against PyTorch: on a GPU, or, where there is none, in Triton's interpreter.

`test_interpreter.py` runs what is marked `gpu` in the latter.
"""

# Shapes: N problems of O outputs and I inputs, T tokens; S sets of K scores. Of removal: as in `greedy`.

from __future__ import annotations

import copy
import os
from typing import Any

import pytest
import torch
from compressor_obs_diff import OBSDiff, admm, batch, greedy, product
from compressor_obs_diff.granularities import NM, Unstructured
from compressor_obs_diff.layers import prune_package
from compressor_obs_diff.removal import Problem, Stream, remove_together
from compressor_obs_diff.solver import energy, factorise, sweep_together
from compressor_obs_diff.triangular import inverse_factor
from torch import Tensor, nn

from compressor import sparsity
from compressor.calibration import Group, Moments, Package
from compressor.calibration import kernels as calibration_kernels
from compressor.plugin import Elementwise, LayerResult
from compressor.structure import Layer, Target

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")
kernels = pytest.mark.skipif(DEVICE.type == "cpu" and not INTERPRETED, reason="needs a CUDA device")
gpu = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    """The interpreter is slow with large ones, and a few scores should be several programs' as well."""
    if INTERPRETED:
        from compressor_obs_diff import sweep_kernel

        monkeypatch.setattr(sweep_kernel, "CHUNK", 64)
        monkeypatch.setattr(sweep_kernel, "CHUNKS", 2)


@pytest.fixture
def _few_passes(monkeypatch):
    """Over the scores: half as many."""
    if INTERPRETED:
        from compressor_obs_diff import sweep_kernel

        monkeypatch.setattr(sweep_kernel, "DIGIT", 8)


# --------------------------------------------------------------------------------------------------- thresholds, blocks


@gpu
@kernels
@pytest.mark.parametrize("kind", ["random", "many ties", "all equal", "tiny"])
@pytest.mark.parametrize(("sets", "scores"), [(1, 1), (3, 7), (2, 300 if INTERPRETED else 9000)])
def test_every_set_loses_its_lowest_scores_with_ties_to_the_lower_index(sets, scores, kind):
    from compressor_obs_diff.sweep_kernel import lowest_of_each

    generator = torch.Generator().manual_seed(scores)
    score_SK = torch.rand(sets, scores, generator=generator)
    if kind == "many ties":
        score_SK = (score_SK * 3).floor()
    elif kind == "all equal":
        score_SK = torch.full_like(score_SK, 0.25)
    elif kind == "tiny":
        score_SK *= 1e-36  # some of them with fewer bits than others
    for first in (0, 1) if sets > 1 else (1,):
        zeros = (first, scores - first, scores // 3)[:sets]
        chosen_SK = lowest_of_each(score_SK.to(DEVICE), torch.tensor(zeros, device=DEVICE)).cpu()
        for chosen_K, score_K, asked in zip(chosen_SK, score_SK, zeros, strict=True):
            assert torch.equal(chosen_K, sparsity.lowest(score_K, asked))


@gpu
@kernels
@pytest.mark.parametrize(("keep", "of"), [(2, 4), (1, 3), (5, 8), (1, 32), (3, 100)])
@pytest.mark.parametrize("kind", ["random", "many ties"])
def test_every_group_loses_its_lowest_scores_with_ties_to_the_lower_index(keep, of, kind):
    from compressor_obs_diff.sweep_kernel import lowest_of_groups

    score_NOI = torch.rand(2, 3, 5 * of, generator=torch.Generator().manual_seed(0))
    if kind == "many ties":
        score_NOI = (score_NOI * 3).floor()
    chosen_NOI = lowest_of_groups(score_NOI.to(DEVICE), keep, of).cpu()
    for chosen_OI, score_OI in zip(chosen_NOI, score_NOI, strict=True):
        assert torch.equal(chosen_OI, sparsity.lowest_of_groups(score_OI, keep, of))


@gpu
@pytest.mark.usefixtures("_few_passes")
@kernels
@pytest.mark.parametrize("granularity", [Unstructured(), NM(keep=2, of=4)], ids=str)
def test_masks_of_several_problems_are_those_of_each_layer(granularity: Elementwise, monkeypatch):
    rows, parts = [3, 3, 5], [0.25, 1.0]
    shares = [
        [0.3 + 0.1 * layer + 0.2 * problem if granularity.needs_sparsity else None for layer in range(3)]
        for problem in range(2)
    ]
    score_NOI = torch.rand(2, 11, 16, generator=torch.Generator().manual_seed(0))
    found = []
    for device, answer in ((torch.device("cpu"), False), (DEVICE, True)):
        monkeypatch.setattr(batch, "possible", lambda *_, answer=answer: answer)
        masks = batch.masks_of(granularity, rows, shares, parts, 16, device)
        found.append([masks(score_NOI.to(device), turn).cpu() for turn in range(2)])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def problems(count: int, outputs: int, inputs: int) -> tuple[Tensor, list[Tensor]]:
    """Weights and Hessians of tokens that depend on one another a little."""
    generator = torch.Generator().manual_seed(outputs + inputs)
    weight_NOI = torch.randn(count, outputs, inputs, generator=generator)
    mixing_II = torch.randn(inputs, inputs, generator=generator) / inputs**0.5 + torch.eye(inputs)
    hessians = []
    for _ in range(count):
        x_TI = torch.randn(4 * inputs, inputs, generator=generator) @ mixing_II
        hessians.append(x_TI.T @ x_TI)
    return weight_NOI, hessians


SMALL = [
    (Unstructured(), [5, 3, 3], 30, 8),
    (Unstructured(), [4], 9, 5),
    (Unstructured(), [3, 2], 6, 1),
    (NM(keep=2, of=4), [5, 2], 24, 8),
    (NM(keep=4, of=8), [6], 40, 20),
    (NM(keep=1, of=3), [9], 24, 128),
    (NM(keep=2, of=4), [3], 12, 1),
]
LARGE = [
    (Unstructured(), [256, 256, 256], 512, 128),
    (Unstructured(), [1000], 520, 128),
    (Unstructured(), [384], 300, 48),
    (Unstructured(), [96, 384], 2048, 512),
    (NM(keep=2, of=4), [256, 256, 256], 512, 128),
    (NM(keep=4, of=8), [1000], 520, 128),
    (NM(keep=2, of=4), [384], 300, 50),
]


@gpu
@pytest.mark.usefixtures("_few_passes")
@kernels
@pytest.mark.parametrize(("granularity", "rows", "inputs", "block"), SMALL if INTERPRETED else SMALL + LARGE, ids=str)
def test_a_batch_is_swept_as_each_of_its_problems_alone(
    granularity: Elementwise, rows: list[int], inputs: int, block: int
):
    weight_NOI, hessians = problems(2, sum(rows), inputs)
    shares = [
        [0.3 + 0.1 * layer + 0.2 * problem if granularity.needs_sparsity else None for layer in range(len(rows))]
        for problem in range(2)
    ]
    new_NOI = weight_NOI.clone().to(DEVICE)
    there = [hessian_II.to(DEVICE) for hessian_II in hessians]
    upper_NII, _ = batch.factorise_batch(there, 0.01, ["a", "b"])
    removed_NOI = batch.sweep_batch(new_NOI, upper_NII, rows, granularity, shares, block).cpu()
    for problem, hessian_II in enumerate(hessians):
        upper_II = factorise(hessian_II, 0.01, "layer").upper_II
        expected = sweep_together(weight_NOI[problem].split(rows), upper_II, granularity, shares[problem], block)
        found = zip(new_NOI[problem].cpu().split(rows), removed_NOI[problem].split(rows), strict=True)
        for outputs, share, old_OI, (new_OI, removed_OI), (wanted_OI, mask_OI) in zip(
            rows, shares[problem], weight_NOI[problem].split(rows), found, expected, strict=True
        ):
            assert int(removed_OI.sum()) == granularity.zeros(outputs, inputs, share)
            assert not new_OI[removed_OI].any()
            assert granularity.holds(new_OI)
            differing = int((removed_OI != mask_OI).sum())
            assert differing <= 1e-3 * old_OI.numel()  # after a near tie, of which small layers have none
            if not differing:
                torch.testing.assert_close(new_OI, wanted_OI, rtol=1e-3, atol=1e-4)
            lost, least = (
                energy((kept_OI - old_OI).double(), hessian_II.double()).sum() for kept_OI in (new_OI, wanted_OI)
            )
            assert lost.item() == pytest.approx(least.item(), rel=1e-3 if differing else 1e-5)


@gpu
@kernels
@pytest.mark.parametrize(("tile", "warps"), [(1, 1), (64, 1), (256, 2), (4096, 4)])
@pytest.mark.parametrize("n_m", [None, (2, 4)])
def test_a_block_is_swept_alike_by_programs_of_any_size(tile, warps, n_m):
    from compressor_obs_diff.sweep_kernel import sweep_block

    weight_NOI, hessians = problems(2, 6, 24)
    upper_NII, _ = batch.factorise_batch(hessians, 0.01, ["a", "b"])
    mask_NOI = torch.rand(2, 6, 24, generator=torch.Generator().manual_seed(0)) < 0.5
    results = []
    for sizes in ({}, {"tile": tile, "warps": warps}):
        new_NOI = weight_NOI.clone().to(DEVICE)
        removed_NOI = (mask_NOI if n_m is None else torch.zeros_like(mask_NOI)).to(DEVICE)
        error_NOB = sweep_block(new_NOI, upper_NII.to(DEVICE), removed_NOI, 4, 16, n_m, **sizes)
        results.append((new_NOI.cpu(), removed_NOI.cpu(), error_NOB.cpu()))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
    new_NOI, removed_NOI, error_NOB = results[0]
    assert torch.equal(new_NOI[..., :4], weight_NOI[..., :4])
    assert torch.equal(new_NOI[..., 20:], weight_NOI[..., 20:])
    assert torch.equal(error_NOB != 0, removed_NOI[..., 4:20])


# ----------------------------------------------------------------------------------------------------- whole packages


def package(dtype: torch.dtype) -> tuple[Package, dict[str, Moments]]:
    """Two blocks of attention, whose layers have equal shapes, and one layer apart; the last but one needs damping."""
    generator = torch.Generator().manual_seed(0)
    groups, moments = [], {}
    shapes = [((4, 4, 2), 16), ((6,), 16), ((4, 4, 2), 16), ((5,), 8), ((6,), 16), ((6,), 16)]
    bare = {"0.to_2", "5.to_0"}
    for block, (outputs, inputs) in enumerate(shapes):
        targets = []
        for place, rows in enumerate(outputs):
            name = f"{block}.to_{place}"
            linear = nn.Linear(inputs, rows, bias=name not in bare).requires_grad_(False)
            linear.weight.copy_(torch.randn(rows, inputs, generator=generator))
            if linear.bias is not None:
                linear.bias.copy_(torch.randn(rows, generator=generator))
            layer = Layer(f"to_{place}", "attention", "query", "image", 0)
            targets.append(Target(name, linear.to(DEVICE, dtype), str(block), layer))
        x_TI = torch.randn(100, inputs, generator=generator) + 0.5
        second_II = x_TI.T @ x_TI
        if block == 4:  # an eigenvalue below zero, as rounding may leave it
            values_I, vectors_II = torch.linalg.eigh(second_II)
            values_I[0] = -0.05 * values_I.mean()
            second_II = (vectors_II * values_I) @ vectors_II.T
        found = Moments.empty(inputs, second=True, device=DEVICE)
        found.total_I.copy_(x_TI.sum(0))
        found.second_II = second_II.to(DEVICE)
        found.weight.fill_(100)
        moments[targets[0].name] = found.finish()
        groups.append(Group(targets[0].name, tuple(targets)))
    return Package(1, 1, tuple(groups), 0), moments


@gpu
@pytest.mark.usefixtures("_few_passes")
@kernels
@pytest.mark.parametrize(
    ("given", "dtype", "most"),
    [
        ({"sparsity": 0.5}, torch.float32, 100),
        ({"sparsity": 0.5, "refit": True, "block": 8}, torch.bfloat16, 2),
        ({"granularity": "n_m"}, torch.bfloat16, 1),
        ({"granularity": "n_m", "refit": True}, torch.float32, 100),
        ({"sparsity": 0.5, "solver": "admm"}, torch.float32, 100),
        ({"sparsity": 0.5, "solver": "admm", "refit": True}, torch.bfloat16, 2),
        ({"granularity": "n_m", "solver": "admm", "refit": True}, torch.float32, 100),
    ],
)
def test_a_package_is_pruned_at_once_as_group_by_group(given, dtype, most, monkeypatch):
    options = OBSDiff.model_validate(given)
    runs: list[tuple[dict[str, LayerResult], dict[str, nn.Linear]]] = []
    sizes: list[int] = []
    real = batch.factorise_batch
    monkeypatch.setattr(batch, "most", lambda *_: most)
    if INTERPRETED:  # all rounds take half a minute
        few = tuple((exponent, 1) for exponent, _ in admm.PENALTIES)
        monkeypatch.setattr(admm, "PENALTIES", few)
        monkeypatch.setattr(admm, "ROUNDS", len(few))
    for at_once in (False, True):
        for name in ("pays", "possible"):
            monkeypatch.setattr(batch, name, lambda *_, answer=at_once: answer)
        sizes.clear()
        monkeypatch.setattr(
            batch, "factorise_batch", lambda found, *rest: sizes.append(len(found)) or real(found, *rest)
        )
        packed, moments = package(dtype)
        zeros = {t.name: options.zeros(t) for group in packed.groups for t in group.targets}
        if options.sparsity:
            zeros["2.to_1"] -= 3
        results = {found.name: found for found in prune_package(options, packed, moments, zeros)}
        assert moments == {}
        runs.append((results, {t.name: t.module for group in packed.groups for t in group.targets}))
    assert max(sizes) == min(most, 3)  # the layers of blocks 1, 4 and 5
    assert sum(sizes) == 6 + options.refit  # then a layer of block 0 has no bias to absorb the mean that others absorb
    (expected, modules), (found, others) = runs
    assert found.keys() == expected.keys()
    for name, result in found.items():
        assert result.damping == expected[name].damping == pytest.approx(0.1 if name == "4.to_0" else 0.01)
        assert result.notes == expected[name].notes
        assert result.zeros == expected[name].zeros
        assert result.error == pytest.approx(expected[name].error, rel=1e-3)
        assert result.seconds > 0
        one, other = modules[name], others[name]
        assert torch.equal(one.weight == 0, other.weight == 0)
        rtol, atol = (1e-2, 1e-2) if dtype == torch.bfloat16 else (1e-3, 1e-4)
        torch.testing.assert_close(one.weight, other.weight, rtol=rtol, atol=atol)
        if one.bias is not None:
            torch.testing.assert_close(one.bias, other.bias, rtol=rtol, atol=atol)


# ------------------------------------------------------------------------------------------------- inputs that leave


def pivots(problems: int, streams: int, groups: int, kind: str) -> tuple[Tensor, Tensor]:
    """Hinv_jj and M_jj / 2, N x 2 x G, and which groups are gone, P x G."""
    generator = torch.Generator().manual_seed(groups)
    pivots_N2G = torch.rand(problems * streams, 2, groups, generator=generator, dtype=torch.float64) + 0.1
    out_PG = torch.rand(problems, groups, generator=generator) < 0.4
    out_PG[:, groups // 2] = False
    if kind == "ties":
        pivots_N2G = (pivots_N2G * 3).ceil()
    elif kind == "below zero":  # by rounding: as good as zero
        pivots_N2G[:, 1] -= 0.6
    elif kind == "infinite":
        pivots_N2G[:, 1] = torch.inf
    elif kind == "nan":
        pivots_N2G[:, 1, -1] = 0
        pivots_N2G[:, 1, groups // 2 :: 3] = torch.nan
    pivots_N2G.masked_fill_(out_PG.repeat_interleave(streams, 0)[:, None], 1e-20)
    return pivots_N2G, out_PG


@gpu
@kernels
@pytest.mark.parametrize("kind", ["random", "ties", "below zero", "infinite", "nan"])
@pytest.mark.parametrize(("streams", "groups"), [(1, 1), (1, 300), (2, 41), (2, 300)])
def test_the_cheapest_group_of_each_problem_is_chosen_and_marked(kind, streams, groups, monkeypatch):
    from compressor_obs_diff import removal_kernel

    monkeypatch.setattr(removal_kernel, "GROUPS", 64)
    pivots_N2G, out_PG = pivots(3, streams, groups, kind)
    energy_PS = torch.linspace(1, 2, 3 * streams, dtype=torch.float64).view(3, streams)
    costs_PSG = (2 * pivots_N2G[:, 1] / pivots_N2G[:, 0]).clamp(min=0).view(3, streams, groups)
    expected_P1 = greedy.cheapest(costs_PSG, out_PG, energy_PS, "energy")
    found_PG = out_PG.to(DEVICE)
    place_P1, costs_PS1 = removal_kernel.choose(pivots_N2G.to(DEVICE), found_PG, energy_PS.to(DEVICE))
    assert torch.equal(place_P1.cpu(), expected_P1)
    expected_PS1 = costs_PSG.gather(2, expected_P1[:, None].expand(-1, streams, 1))
    torch.testing.assert_close(costs_PS1.cpu(), expected_PS1, rtol=1e-15, atol=0, equal_nan=True)
    assert bool(costs_PS1.isfinite().all()) == (kind not in ("infinite", "nan"))
    assert torch.equal(found_PG.cpu(), out_PG.scatter(1, expected_P1, True))


@gpu
@kernels
def test_the_cost_of_what_is_gone_already_is_infinite():
    from compressor_obs_diff import removal_kernel

    out_PG = torch.ones(2, 5, dtype=torch.bool, device=DEVICE)
    ones = torch.ones(4, 2, 5, dtype=torch.float64, device=DEVICE)
    place_P1, costs_PS1 = removal_kernel.choose(ones, out_PG, torch.ones(2, 2, dtype=torch.float64, device=DEVICE))
    assert place_P1.tolist() == [[0], [0]]
    assert costs_PS1.isinf().all()


def streams_of(seed: int, inputs: int, count: int) -> list[Stream]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for s in range(count):
        x_TI = torch.randn(4 * inputs, inputs, generator=generator, dtype=torch.float64)
        x_TI += torch.randn(4 * inputs, 1, generator=generator)
        weight_OI = torch.randn(9, inputs, generator=generator, dtype=torch.float64)
        found.append(Stream(f"{seed}.{s}", weight_OI.to(DEVICE), (x_TI.T @ x_TI).to(DEVICE)))
    return found


@gpu
@kernels
@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize("rows", [0, 1, 5, 19])
def test_a_removal_by_the_kernel_leaves_what_one_in_pytorch_does(rows, streams, monkeypatch):
    from compressor_obs_diff import removal_kernel

    monkeypatch.setattr(removal_kernel, "ROWS", 8)
    monkeypatch.setattr(removal_kernel, "COLUMNS", 16)
    every = streams_of(0, 40, streams) + streams_of(1, 40, streams)
    hessian_NII = torch.stack([each.second_II for each in every])
    groups_GD = torch.randperm(40, generator=torch.Generator().manual_seed(0))[:37, None]  # the others stay
    factors = [inverse_factor(hessian_NII.clone())[0]]
    weights = [each.weight_OI for each in every]
    search = greedy.Search(hessian_NII, factors, weights, [None] * len(every), groups_GD, streams)
    search.panel_N2BC.fill_(torch.nan)  # of rows not in use nothing is read
    generator = torch.Generator().manual_seed(rows)
    places_PR = torch.stack([torch.randperm(37, generator=generator) for _ in range(2)]).to(DEVICE)
    for row in range(rows):
        search.remove(places_PR[:, row : row + 1])
    other = copy.deepcopy(search)
    other._kernels = removal_kernel
    for each in (search, other):
        each.remove(places_PR[:, rows : rows + 1].contiguous())
    assert other.panel_N2BC[:, :, : rows + 1].isfinite().all()
    assert torch.equal(other.state_N2CC, search.state_N2CC)
    torch.testing.assert_close(other.panel_N2BC, search.panel_N2BC, rtol=1e-9, atol=1e-9, equal_nan=True)
    torch.testing.assert_close(other.pivots_N2G, search.pivots_N2G, rtol=1e-9, atol=1e-9)


@gpu
@kernels
@pytest.mark.filterwarnings("ignore:(divide by zero|invalid value):RuntimeWarning")  # of what is gone
@pytest.mark.parametrize(
    ("inputs", "counts", "panel", "refresh"),
    [(24, (15, 9), 4, 12)] if INTERPRETED else [(200, (180, 150), 4, 12), (700, (600, 320), 128, 2048)],
)
@pytest.mark.parametrize(("streams", "fusion"), [(1, "rank_fusion"), (2, "energy"), (2, "rank_fusion")])
def test_inputs_leave_by_kernels_in_the_order_and_at_the_costs_of_pytorch(
    streams, fusion, inputs, counts, panel, refresh, monkeypatch
):
    from compressor_obs_diff import removal_kernel

    monkeypatch.setattr(greedy, "PANEL", panel)
    monkeypatch.setattr(greedy, "REFRESH", refresh)
    if INTERPRETED:  # which is slower with large tiles
        for name, size in (("GROUPS", 16), ("ROWS", 4), ("COLUMNS", 32)):
            monkeypatch.setattr(removal_kernel, name, size)
    groups_GD = torch.randperm(inputs, generator=torch.Generator().manual_seed(0))[: inputs - 3, None]
    problems = [Problem(streams_of(seed, inputs, streams), count) for seed, count in enumerate(counts)]
    monkeypatch.setattr(calibration_kernels, "usable", lambda _: False)
    expected = remove_together(problems, groups_GD, 0.01, fusion)
    monkeypatch.setattr(calibration_kernels, "usable", lambda _: True)
    launched: list[str] = []
    for name in ("choose", "downdate"):
        real: Any = getattr(removal_kernel, name)
        monkeypatch.setattr(
            removal_kernel, name, lambda *given, name=name, real=real: launched.append(name) or real(*given)
        )
    found = remove_together(problems, groups_GD, 0.01, fusion)
    if streams == 2 and fusion == "rank_fusion":
        assert not launched
    elif DEVICE.type == "cpu":  # a GPU replays some
        assert launched == ["choose", *["downdate", "choose"] * (counts[0] - 1)]
    else:
        assert launched
    for one, other in zip(found, expected, strict=True):
        assert one.removed == other.removed
        torch.testing.assert_close(one.costs_RS, other.costs_RS, rtol=1e-9, atol=0)
        for refit, wanted in zip(one.refits, other.refits, strict=True):
            torch.testing.assert_close(refit.weight_OK, wanted.weight_OK, rtol=1e-9, atol=1e-9)


TYPES = {
    **dict.fromkeys(("pivots", "energies", "costs", "state", "panel"), "*fp64"),
    "out": "*u8",
    "places": "*i64",
}
HALVES = {"x": "*fp32", "parts": "*fp16", "scale": "*fp32"}


@pytest.mark.skipif(INTERPRETED, reason="compiles")
@pytest.mark.parametrize(("kernel", "streams"), [("_choose", 1), ("_choose", 2), ("_downdate", 2), ("_take_apart", 0)])
def test_kernels_are_compiled_for_hopper(kernel, streams):
    """Without a GPU, by the assembler that comes with triton; the interpreter lets pass what the compiler refuses."""
    pytest.importorskip("triton")
    from compressor_obs_diff import halves_kernel, removal_kernel

    from tests.assembled import compiled

    module: Any = removal_kernel
    if kernel == "_take_apart":
        module, warps = halves_kernel, 4
        constants = dict(zip("LT", halves_kernel.COLUMNS, strict=True))
    elif kernel == "_choose":
        constants, warps = {"S": streams, "T": removal_kernel.GROUPS}, removal_kernel.CHOOSING_WARPS
    else:
        constants = {"S": streams, "R": removal_kernel.ROWS, "T": removal_kernel.COLUMNS}
        warps = removal_kernel.DOWNDATING_WARPS
    types = HALVES if module is halves_kernel else TYPES
    found = compiled(getattr(module, kernel), types, constants, 90, warps)
    assert found.asm["cubin"]
    if module is removal_kernel:
        assert "div.rn.f64" in found.asm["ptx"]  # not an approximation
    assert "atom" not in found.asm["ptx"]


# ----------------------------------------------------------------------------------------------------- products, halves


@gpu
@kernels
@pytest.mark.parametrize("dim", [-1, -2])
@pytest.mark.parametrize("size", [1.0, 4e18, 3e-45])
def test_a_matrix_is_taken_apart_to_the_last_bit_as_in_pytorch(dim, size, monkeypatch):
    """Rows or columns at a time, in one piece or several, wherever they lie in memory."""
    from compressor_obs_diff import halves_kernel

    monkeypatch.setattr(halves_kernel, "ROWS", (4, 16))
    monkeypatch.setattr(halves_kernel, "COLUMNS", (16, 16))
    monkeypatch.setattr(product, "worthwhile", lambda *_: True)
    monkeypatch.setattr(calibration_kernels, "usable", lambda _: False)
    x = torch.randn(2, 19, 34, generator=torch.Generator().manual_seed(0)).to(DEVICE) * size
    x[1, 4] *= 1e6
    before = x.clone()
    for given in (x, x.mT, x[:, 1:, 3:]):
        expected, second_at = (product.left(given), 1) if dim == -1 else (product.right(given), 2)
        parts, scale = halves_kernel.take_apart(given, dim, second_at, product.LARGEST)
        assert torch.equal(parts, expected.parts)
        assert expected.scale is not None
        assert torch.equal(scale, expected.scale)
    assert torch.equal(x, before)


@gpu
@kernels
def test_a_line_of_zeros_stays_one():
    from compressor_obs_diff import halves_kernel

    parts, scale = halves_kernel.take_apart(torch.zeros(1, 3, 40, device=DEVICE), -1, 1, product.LARGEST)
    assert not parts.any()
    assert scale.isfinite().all()
