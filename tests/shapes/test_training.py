"""Every stage trains for a few steps on the CPU, and a run cut short goes on as if it had not been."""

import json
import math

import pytest
import torch
from click.testing import CliRunner
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline
from safetensors.torch import load_file

from compressor.shapes import judge, scenes
from compressor.shapes.train import denoiser, prompts, sd3, stages
from compressor.shapes.train.__main__ import main
from compressor.shapes.train.loop import Budget, Log, Rates, fit

TINY = ("--scenes", "16", "--pool", "16", "--batch", "8", "--evaluated", "2", "--guidance", "2", "--device", "cpu")


class _Interrupted(Exception):
    pass


def _fit(folder, steps_until_cut=None):
    """Fits a line through noise; returns the weights, and the losses logged."""
    torch.manual_seed(0)
    model, calls = torch.nn.Linear(3, 1), 0

    def loss():
        nonlocal calls
        if calls == steps_until_cut:
            raise _Interrupted
        calls += 1
        x = torch.randn(16, 3)
        return (model(x) - x.sum(1, keepdim=True)).square().mean()

    torch.manual_seed(1)
    fit(
        "line", model, loss, budget=Budget(steps=300), rates=Rates(0.05, warmup=10, average=0.9),
        checkpoint=folder / "line.safetensors", log=Log(folder / "log.jsonl"), save_every=0.0,
    )  # fmt: skip
    return model.weight.detach().clone()


def test_a_run_cut_short_ends_with_the_very_weights_of_one_that_was_not(tmp_path):
    whole = _fit(tmp_path / "whole")
    with pytest.raises(_Interrupted):
        _fit(tmp_path / "cut", steps_until_cut=137)
    torch.manual_seed(99)
    resumed = _fit(tmp_path / "cut")
    assert torch.equal(resumed, whole)
    assert torch.allclose(whole, torch.ones(1, 3), atol=1e-2)


def test_a_complete_stage_is_not_trained_again(tmp_path):
    first = _fit(tmp_path)
    assert torch.equal(_fit(tmp_path, steps_until_cut=0), first)
    assert torch.equal(load_file(tmp_path / "line.safetensors")["average.weight"], first)


def test_losses_are_logged(tmp_path):
    _fit(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 100, 200, 300]
    assert lines[-1]["loss"] < 0.01 * lines[0]["loss"]


def test_the_rate_rises_then_falls_to_zero_with_the_budget():
    rates = Rates(2.0, warmup=4)
    assert [rates.at(step, 0.0) for step in range(5)] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert rates.at(100, 0.5) == pytest.approx(1.0)
    assert rates.at(100, 1.0) == pytest.approx(0.0)
    budget = Budget(seconds=10, steps=100)
    assert budget.used(5, 10) == 0.5
    assert budget.used(1, 70) == 0.7
    assert budget.used(11, 0) == 1.0
    assert Budget(steps=4).used(1e9, 1) == 0.25


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    model = torch.nn.Linear(1, 1)
    with pytest.raises(FloatingPointError, match="vae: the loss is nan at step 1"):
        fit(
            "vae", model, lambda: model.weight.sum() * math.nan, budget=Budget(steps=5), rates=Rates(0.1),
            checkpoint=tmp_path / "a.safetensors", log=Log(tmp_path / "log"),
        )  # fmt: skip


@pytest.mark.usefixtures("_drawn_in_two_steps")
def test_all_stages_run_and_go_on(tmp_path):
    runner = CliRunner()
    begun = runner.invoke(main, ["--out", str(tmp_path), "--until", "judge", "--steps", "3", *TINY])
    assert begun.exit_code == 0, begun.output
    again = runner.invoke(main, ["--out", str(tmp_path), *TINY])
    assert again.exit_code == 1
    assert f"{tmp_path} already holds a training run; add --resume to go on with it" in again.output
    ended = runner.invoke(main, ["--out", str(tmp_path), "--steps", "3", "--resume", *TINY])
    assert ended.exit_code == 0, ended.output

    log = [json.loads(line) for line in (tmp_path / "work" / "log.jsonl").read_text().splitlines()]
    steps = [(line["stage"], line["step"]) for line in log if "step" in line]
    assert steps == [(stage, step) for stage in ("vae", "judge", "denoiser") for step in (1, 2, 3)]
    pipe = StableDiffusion3Pipeline.from_pretrained(tmp_path / "pipeline", text_encoder_3=None, tokenizer_3=None)
    held = load_file(tmp_path / "work" / "denoiser.safetensors")
    weight = pipe.transformer.transformer_blocks[2].ff.net[2].weight
    assert torch.equal(weight, held["average.denoiser.transformer_blocks.2.ff.net.2.weight"].half().float())
    judge.load(file=tmp_path / "judge.safetensors")
    assert set(json.loads((tmp_path / "hashes.json").read_text())["sha256"]) >= {"judge.safetensors"}
    quality = json.loads((tmp_path / "quality.json").read_text())
    assert quality["table"]["count"]["count"] == 2
    assert set(quality["calibration_by_guidance"]) == {"2.0"}


def test_no_evaluation_scene_is_trained_on(tmp_path, monkeypatch):
    kept = []

    def remember(vae, pictures):
        kept.append(len(pictures))
        return [torch.zeros(len(pictures), 4, 16, 16)]

    monkeypatch.setattr(stages, "_encoded", remember)
    monkeypatch.setattr(stages, "_scale", lambda vae: {"shift_factor": 0.0, "scaling_factor": 1.0})
    monkeypatch.setattr(stages, "_drawn", lambda batch, device: batch.codes())
    drawn = scenes.sample(2000, stages._LATENTS_SEED)
    reserved = prompts.held_out(prompts.evaluation())
    stages.train_tokenizer(tmp_path)
    data = stages.cache_latents(torch.device("cpu"), None, tmp_path, stages.Plan(scenes=2000))  # type: ignore[arg-type]
    expected = int((~torch.isin(drawn.codes(), reserved)).sum())
    assert kept == [expected]
    assert expected < 2000
    assert data.ids.shape == (expected, 2, 24)


def test_one_caption_in_ten_is_emptied():
    torch.manual_seed(0)
    data = stages.Latents(
        torch.randn(50, 4, 16, 16).half(), torch.ones(50, 2, 24, dtype=torch.int16), torch.zeros(24, dtype=torch.int16)
    )
    latents, ids = denoiser.draw(data, 20_000)
    assert latents.dtype == torch.float32
    assert ids.dtype == torch.int64
    assert (ids.sum(1) == 0).float().mean().item() == pytest.approx(denoiser.EMPTIED, abs=0.01)
    assert set(ids.unique().tolist()) == {0, 1}


def test_the_number_of_zero_rows_is_usually_that_of_diffusers():
    torch.manual_seed(0)
    rows = torch.stack([sd3.log_rows(torch.device("cpu")) for _ in range(2000)]).exp()
    assert (rows - 256).abs().lt(0.01).float().mean().item() == pytest.approx(0.5, abs=0.05)
    assert 16 <= rows.min() < 20
    assert 400 < rows.max() <= 512.1


def test_weights_are_saved_without_pickle(tmp_path):
    _fit(tmp_path)
    held = load_file(tmp_path / "line.safetensors")
    assert {
        "weight.weight",
        "average.weight",
        "exp_avg.weight",
        "exp_avg_sq.weight",
        "step.weight",
        "random.cpu",
    } <= set(held)
