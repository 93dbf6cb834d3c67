"""The kernels of the sweep against the sweep in PyTorch: on a GPU, or, where there is none, in Triton's interpreter.

Triton is told to interpret before it is imported: so a process of its own runs this file once more.
"""

# Shapes: N problems of O outputs and I inputs, T tokens; S sets of K scores.

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch
from compressor_obs_diff import OBSDiff, admm, batch
from compressor_obs_diff.granularities import NM, Unstructured
from compressor_obs_diff.layers import prune_package
from compressor_obs_diff.solver import energy, factorise, sweep_together
from torch import Tensor, nn

from compressor import sparsity
from compressor.calibration import Group, Moments, Package
from compressor.plugin import Elementwise, LayerResult
from compressor.structure import Layer, Target

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")
kernels = pytest.mark.skipif(DEVICE.type == "cpu" and not INTERPRETED, reason="needs a CUDA device")
gpu = pytest.mark.gpu


def _interpreter() -> bool:
    try:
        return tuple(map(int, version("triton").split(".")[:2])) >= (3, 7)
    except PackageNotFoundError:
        return False


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
@pytest.mark.skipif(not _interpreter(), reason="needs Triton 3.7, the first whose interpreter takes NumPy 2.4")
def test_the_kernels_do_in_tritons_interpreter_what_the_tests_below_say():
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", __file__, "-m", "gpu", "-p", "no:cacheprovider"]
    root = Path(__file__).parent.parent
    ended = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=600, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert " passed" in ended.stdout
    assert "skipped" not in ended.stdout


# --------------------------------------------------------------------------------------------------- thresholds, blocks


@gpu
@kernels
@pytest.mark.parametrize("kind", ["random", "many ties", "all equal", "tiny"])
@pytest.mark.parametrize(("sets", "scores"), [(1, 1), (3, 7), (2, 9000)])
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
