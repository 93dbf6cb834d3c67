"""The same code on a GPU: half-precision moments, and a whole run."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from compressor_obs_diff.granularities import NM, Unstructured
from compressor_obs_diff.removal import Stream, remove_greedily
from compressor_obs_diff.solver import factorise, relative_error, sweep
from safetensors.torch import load_file

from compressor import pipeline as pipelines
from compressor import recipe, report, sparsity
from compressor.calibration.moments import Moments
from compressor.progress import Progress
from compressor.recipe import Model
from compressor.run import run
from tests import tiny

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_moments_of_half_precision_inputs_are_summed_in_float32(dtype):
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(2, 100, 64, generator=generator).to(dtype) for _ in range(8)]
    moments = Moments.empty(64, second=True, device=torch.device("cuda"))
    for i, x in enumerate(batches):
        moments.add(x.cuda(), 0.5 + i)
    expected = torch.zeros(64, 64, dtype=torch.float64)
    for i, x in enumerate(batches):
        expected += (0.5 + i) * (x.double().flatten(0, 1).T @ x.double().flatten(0, 1))
    assert moments.second_II is not None
    assert moments.second_II.dtype == torch.float32
    error = (moments.second_II.double().cpu() - expected).norm() / expected.norm()
    assert error < 2e-4


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
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = sparsity.lowest(on_gpu, zeros)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(found.cpu(), expected)
    assert torch.equal(sparsity.lowest_of_groups(score.cuda(), 2, 4).cpu(), sparsity.lowest_of_groups(score, 2, 4))


def test_neurons_leave_without_waiting_for_the_gpu_after_each():
    generator = torch.Generator().manual_seed(0)
    x_TI = torch.randn(400, 96, generator=generator)
    stream = Stream("layer", torch.randn(24, 96, generator=generator).cuda(), (x_TI.T @ x_TI).cuda())
    waits = []
    for count in (2, 5, 50):  # the first one for what is waited for once
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                remove_greedily([stream], torch.arange(96)[:, None], count, 0.01)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        waits.append(len(caught))
    assert waits[2] == waits[1]


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
