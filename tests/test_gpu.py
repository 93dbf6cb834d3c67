"""The same code on a GPU: half-precision moments, and a whole run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from compressor_obs_diff import OBSDiff, admm, batch, greedy
from compressor_obs_diff.granularities import NM, Unstructured
from compressor_obs_diff.layers import prune_package
from compressor_obs_diff.least_squares import fit
from compressor_obs_diff.quadratic import Quadratic
from compressor_obs_diff.removal import Problem, Stream, remove_greedily, remove_together
from compressor_obs_diff.solver import factorise, sweep
from safetensors.torch import load_file

from compressor import pipeline as pipelines
from compressor import recipe, report, sparsity
from compressor.calibration import Group, Package, kernels
from compressor.calibration.curvature import Gradients
from compressor.calibration.moments import Moments
from compressor.progress import Progress
from compressor.recipe import Model
from compressor.run import run
from compressor.structure import Layer, Target
from tests import tiny
from tests.layer_errors import relative_error
from tests.waits import count_waits

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_moments_of_half_precision_inputs_are_summed_in_float32(dtype):
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(2, 100, 64, generator=generator).to(dtype) for _ in range(8)]
    moments = Moments.empty(64, second=True, device=torch.device("cuda"))
    for i, x in enumerate(batches):
        moments.add(x.cuda(), 0.5 + i)
    moments.finish()
    expected = torch.zeros(64, 64, dtype=torch.float64)
    for i, x in enumerate(batches):
        expected += (0.5 + i) * (x.double().flatten(0, 1).T @ x.double().flatten(0, 1))
    assert moments.second_II is not None
    assert moments.second_II.dtype == torch.float32
    error = (moments.second_II.double().cpu() - expected).norm() / expected.norm()
    assert error < 2e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "inputs"),
    [(8, 1536), (2664, 333), (2664, 1536), (16384, 320), (9000, 640), (1000, 2440), (700, 6144)],
)
@pytest.mark.parametrize("second", [True, False])
def test_the_kernels_sum_as_float64_does_and_the_same_every_time(dtype, tokens, inputs, second):
    assert kernels.problem(torch.device("cuda", 0)) is None
    generator = torch.Generator().manual_seed(0)
    x_TI = torch.randn(tokens, inputs, generator=generator).to(dtype).cuda()
    x_TI[tokens // 2, inputs - 1], x_TI[tokens - 1, 0], x_TI[1, 5] = torch.nan, torch.inf, -torch.inf
    good_TI = x_TI[x_TI.isfinite().all(1)].double()
    found = []
    for _ in range(2):
        moments = Moments.empty(inputs, second, torch.device("cuda"))
        for weight in (0.8, 1.1):
            moments.add(x_TI, weight)
        found.append(moments.finish())
    first, again = found
    assert torch.equal(first.total_I, again.total_I)
    assert torch.equal(first.squares_I, again.squares_I)
    total_I, squares_I = 1.9 * good_TI.sum(0), 1.9 * good_TI.square().sum(0)
    torch.testing.assert_close(first.total_I.double(), total_I, rtol=1e-5, atol=1e-5 * float(squares_I.max()))
    torch.testing.assert_close(first.squares_I.double(), squares_I, rtol=2e-4, atol=0)
    if second:
        assert first.second_II is not None
        assert torch.equal(first.second_II, again.second_II)
        assert torch.equal(first.second_II, first.second_II.T)
        expected_II = 1.9 * good_TI.T @ good_TI
        assert (first.second_II - expected_II).norm() < 2e-4 * expected_II.norm()
    assert (int(first.tokens), int(first.skipped)) == (2 * (tokens - 3), 2 * 3)
    assert first.weight.item() == pytest.approx(1.9 * (tokens - 3), rel=1e-12)


def test_the_kernels_multiply_gradients_block_by_block():
    g_TO = torch.randn(500, 4864, dtype=torch.float16, device="cuda")
    g_TO[3, 4000] = torch.nan
    sums = Gradients.empty(4864, torch.device("cuda"))
    sums.add(g_TO)
    assert sums.halved
    sums.finish()
    finite_TO = torch.cat([g_TO[:3], g_TO[4:]]).double()
    for second_KK, g_TK in zip(sums.second_BKK, finite_TO.split(sums.second_BKK.shape[-1], dim=1), strict=True):
        expected_KK = g_TK.T @ g_TK
        assert (second_KK - expected_KK).norm() < 2e-4 * expected_KK.norm()
    assert (int(sums.tokens), int(sums.skipped)) == (499, 1)


@pytest.mark.parametrize(("granularity", "sparsity"), [(Unstructured(), 0.5), (NM(keep=2, of=4), None)])
def test_the_solve_on_a_gpu_loses_as_little_as_on_the_cpu(granularity, sparsity):
    generator = torch.Generator().manual_seed(0)
    x_TI = torch.randn(2000, 256, generator=generator) @ torch.randn(256, 256, generator=generator)
    weight_OI, second_II = torch.randn(96, 256, generator=generator), x_TI.T @ x_TI
    errors = {}
    for device in ("cpu", "cuda"):
        weight, second = weight_OI.to(device), second_II.to(device)
        factor = factorise(second, 0.01, "layer")
        new, removed = sweep(weight, factor.upper_II, granularity, sparsity, 128)
        assert int(removed.sum()) == granularity.zeros(96, 256, sparsity)
        errors[device] = relative_error(weight, new, second)
    assert errors["cuda"] == pytest.approx(errors["cpu"], rel=1e-2)


@pytest.mark.parametrize("entries", [4096, sparsity.MOST_FOR_KTHVALUE + 4096])
def test_the_lowest_scores_are_the_same_as_on_the_cpu_and_found_without_waiting(entries):
    score = torch.randint(-40, 40, (2, entries // 2), generator=torch.Generator().manual_seed(0)) / 7
    for zeros in (0, 1, entries // 3, entries):
        expected = sparsity.lowest(score, zeros)
        on_gpu = score.cuda()
        assert count_waits(sparsity.lowest, on_gpu, zeros) == 0
        assert torch.equal(sparsity.lowest(on_gpu, zeros).cpu(), expected)
    assert torch.equal(sparsity.lowest_of_groups(score.cuda(), 2, 4).cpu(), sparsity.lowest_of_groups(score, 2, 4))


def problem(seed: int, inputs: int, streams: int, count: int) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    found: list[Stream] = []
    for s in range(streams):
        x_TI = torch.randn(4 * inputs, inputs, generator=generator) @ torch.randn(inputs, inputs, generator=generator)
        weight_OI = torch.randn(24, inputs, generator=generator, dtype=torch.float64)
        bias_O = torch.randn(24, generator=generator, dtype=torch.float64)
        moments = ((x_TI.T @ x_TI).cuda(), bias_O.cuda(), x_TI.sum(0).cuda(), float(len(x_TI)))
        found.append(Stream(f"{seed}.{s}", weight_OI.cuda(), *moments))
    return Problem(found, count)


def waits(problems: list[Problem], groups_GD: torch.Tensor) -> int:
    return count_waits(remove_together, problems, groups_GD, 0.01)


@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize("width", [1, 4])
def test_heads_and_neurons_leave_without_waiting_for_the_gpu_after_each(width, streams):
    groups_GD = torch.arange(96).view(-1, width)
    few, many = 5 // width + 1, 80 // width
    waits([problem(0, 96, streams, 2)], groups_GD)  # for what is waited for once
    expected = waits([problem(0, 96, streams, few)], groups_GD)
    assert waits([problem(0, 96, streams, many)], groups_GD) == expected
    assert waits([problem(seed, 96, streams, many) for seed in range(4)], groups_GD) == expected


@pytest.mark.parametrize(("panel", "refresh"), [(128, 2048), (16, 48)])
@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize("width", [1, 4])
def test_on_a_gpu_problems_solved_together_are_as_solved_alone_and_as_on_the_cpu(
    width, streams, panel, refresh, monkeypatch
):
    monkeypatch.setattr(greedy, "PANEL", panel)
    monkeypatch.setattr(greedy, "REFRESH", refresh)
    groups_GD = torch.arange(96).view(-1, width)
    problems = [problem(seed, 96, streams, (80 - 16 * seed) // width) for seed in range(4)]
    for one, found in zip(problems, remove_together(problems, groups_GD, 0.01), strict=True):
        of_cpu = [
            replace(
                stream,
                weight_OI=stream.weight_OI.cpu(),
                second_II=stream.second_II.cpu(),
                bias_O=None if stream.bias_O is None else stream.bias_O.cpu(),
                total_I=None if stream.total_I is None else stream.total_I.cpu(),
            )
            for stream in one.streams
        ]
        for streams_alone in (one.streams, of_cpu):
            alone = remove_greedily(streams_alone, groups_GD, one.count, 0.01)
            assert found.removed == alone.removed
            torch.testing.assert_close(found.costs_RS, alone.costs_RS, rtol=1e-7, atol=1e-7)
            for each, expected in zip(found.refits, alone.refits, strict=True):
                torch.testing.assert_close(each.weight_OK.cpu(), expected.weight_OK.cpu(), rtol=1e-8, atol=1e-8)
                assert each.error == pytest.approx(expected.error, rel=1e-6)


@pytest.mark.parametrize("granularity", [Unstructured(), NM(keep=2, of=4)], ids=str)
@pytest.mark.parametrize("coupled", [False, True])
def test_admm_and_the_refit_of_several_problems_are_on_a_gpu_as_on_the_cpu(granularity, coupled):
    """Sums of more terms than `product.LEAST`, which are of numbers in halves there."""
    generator = torch.Generator().manual_seed(0)
    rows, inputs, width = [512, 512], 640, 512
    weight_NOI = torch.randn(2, sum(rows), inputs, generator=generator)
    x_NTI = torch.randn(2, 1000, 80, generator=generator) @ torch.randn(2, 80, inputs, generator=generator)
    x_NTI += torch.randn(2, 1000, inputs, generator=generator)
    hessian_NII = x_NTI.mT @ x_NTI
    g_NBTK = torch.randn(2, 2, 1000, width, generator=generator) * torch.rand(width, generator=generator)
    metric_NBKK = g_NBTK.mT @ g_NBTK / 100
    metric_NBKK.diagonal(dim1=2, dim2=3).add_(0.3)
    shares = [[0.5, 0.6], [0.7, 0.5]] if granularity.needs_sparsity else [[None, None]] * 2
    errors = {}
    for device in ("cpu", "cuda"):
        weight = weight_NOI.to(device)
        quadratic = Quadratic(hessian_NII.to(device, copy=True), metric_NBKK.to(device, copy=True) if coupled else None)
        masks = batch.masks_of(granularity, rows, shares, admm.shares(), inputs, weight.device)
        sparse, removed = admm.choose(weight, quadratic, masks)
        new = fit(weight, quadratic, removed, sparse).weight_NOI
        for gone, asked in zip(removed, shares, strict=True):
            for layer, share in zip(gone.split(rows), asked, strict=True):
                assert int(layer.sum()) == granularity.zeros(512, inputs, share)
        assert not new[removed].any()
        off = (new.cpu() - weight_NOI).double()
        heavy = off @ hessian_NII.double()
        if coupled:
            heavy = (metric_NBKK.double() @ heavy.view(2, 2, width, inputs)).view(off.shape)
        errors[device] = (off * heavy).sum((1, 2))
    # where rows depend on one another, rounding of 1e-5 changes 2 % of the mask and the error by up to 1 %
    torch.testing.assert_close(errors["cuda"], errors["cpu"], rtol=2e-2 if coupled else 5e-3, atol=0)


@pytest.mark.parametrize(
    ("given", "most"),
    [
        ({"sparsity": 0.5}, 4),
        ({"granularity": "n_m"}, 4),
        ({"sparsity": 0.5, "solver": "admm", "refit": True}, 60),
    ],
)
def test_layers_of_equal_shape_are_solved_without_waiting_for_the_gpu_after_each(given, most):
    options = OBSDiff.model_validate(given)
    waited = []
    for count in (2, 3, 30):  # the first one for what is waited for once
        groups, moments = [], {}
        for name in map(str, range(count)):
            linear = torch.nn.Linear(512, 256, device="cuda").requires_grad_(False)
            target = Target(name, linear, name, Layer("to_q", "attention", "query", "image", 0))
            groups.append(Group(name, (target,)))
            moments[name] = Moments.empty(512, second=True, device=torch.device("cuda"))
            moments[name].add(torch.randn(1000, 512, device="cuda"), 1.0)
        package, results = Package(1, 1, tuple(groups), 0), []
        waited.append(count_waits(results.extend, prune_package(options, package, moments)))
        assert len(results) == count
    if "refit" not in given:  # which ends when all have arrived
        assert waited[2] == waited[1]
    assert waited[2] <= most


@pytest.mark.parametrize("kind", ["sd3", "sd2", "flux"])
def test_heads_and_neurons_leave_in_half_precision_with_proof(kind: str, tmp_path: Path):
    half = {"heads": 0.5, "neurons": 0.5, "multiple": 8, "keep_first": 0, "keep_last": 0}
    data = {
        "model": str(tiny.save(kind, tmp_path / "model", torch.float16)),
        "device": "cuda",
        "calibration": {"prompts": ["a", "b", "c d"], "steps": 3, "batch": 2, "packages": 2},
        "prune": [{"obs_diff": {"granularity": {"structured": half}}}],
        "report": {"images": 2, "steps": 2},
        "output": str(tmp_path / "out"),
    }
    output = run(recipe.Recipe.model_validate(data), Progress())
    found = report.read(output / "report.json")
    assert found.structure is not None
    assert found.sizes.after.parameters < found.sizes.before.parameters
    assert all(proof.layer_error <= proof.layer_tolerance for proof in found.structure.proofs)


def test_components_that_take_turns_are_on_the_gpu_one_at_a_time(tmp_path: Path):
    pipeline = pipelines.load(Model(source=str(tiny.folder("sd3"))), "cuda", turns=True)
    parts = [part for part in pipeline.pipe.components.values() if isinstance(part, torch.nn.Module)]
    pipeline.pipe("a", num_inference_steps=2, height=tiny.SIDE, width=tiny.SIDE)
    assert [part.device.type for part in parts if part is not pipeline.pipe.vae] == ["cpu"] * (len(parts) - 1)
    assert pipeline.pipe.vae.device.type == "cuda"
    assert pipeline.device.type == "cuda"
    data = {
        "model": str(tiny.folder("sd3")),
        "device": "cuda",
        "calibration": {"prompts": ["a", "b", "c d"], "steps": 3, "batch": 2, "packages": 2},
        "prune": [{"obs_diff": {"sparsity": 0.5}}],
        "report": {"images": 2, "steps": 2},
    }
    for way in ("none", "model"):
        run(recipe.Recipe.model_validate(data | {"offload": way, "output": str(tmp_path / way)}), Progress())
    files = [tmp_path / way / "transformer" / "diffusion_pytorch_model.safetensors" for way in ("none", "model")]
    plain, turns = (load_file(file) for file in files)
    assert all(torch.allclose(plain[name].float(), turns[name].float(), atol=1e-3) for name in plain)


def test_a_whole_run_in_half_precision_keeps_its_promises(tmp_path: Path):
    data = {
        "model": str(tiny.save("sd3", tmp_path / "model", torch.float16)),
        "device": "cuda",
        "calibration": {"prompts": ["a", "b", "c d"], "steps": 3, "batch": 2, "packages": 2},
        "prune": [{"obs_diff": {"sparsity": 0.5}}],
        "report": {"images": 2, "steps": 2},
        "output": str(tmp_path / "out"),
    }
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(data))
    output = run(recipe.load(file), Progress())
    weights = load_file(output / "transformer" / "diffusion_pytorch_model.safetensors")
    pruned = weights["transformer_blocks.0.attn.to_q.weight"]
    assert int((pruned == 0).sum()) == pruned.numel() // 2


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_run_on_the_second_gpu_takes_its_memory_and_gives_the_same(tmp_path: Path):
    weights = []
    for device in ("cuda:0", "cuda:1"):
        data = {
            "model": str(tiny.folder("sd3")),
            "device": device,
            "calibration": {"prompts": ["a", "b", "c d"], "steps": 3, "batch": 2, "packages": 2},
            "prune": [{"obs_diff": {"sparsity": 0.5}}],
            "report": {"images": 2, "steps": 2},
            "output": str(tmp_path / device[-1]),
        }
        torch.cuda.reset_peak_memory_stats(0)
        before = torch.cuda.max_memory_allocated(0)
        output = run(recipe.Recipe.model_validate(data), Progress())
        assert (torch.cuda.max_memory_allocated(0) > before) == (device == "cuda:0")
        peak = json.loads((output / "report.json").read_text())["peak_memory"]["gpu_allocated"]
        assert peak == torch.cuda.max_memory_allocated(device) > 0
        weights.append(load_file(output / "transformer" / "diffusion_pytorch_model.safetensors"))
    assert all(torch.allclose(weights[0][name], weights[1][name], atol=1e-3) for name in weights[0])
