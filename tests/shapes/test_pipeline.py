"""The shipped pipeline loads as any diffusers folder, is fed as it was trained, and shows what captions say."""

import math
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline

from compressor import builtin
from compressor.shapes import captions, evaluate, judge, networks, scenes
from compressor.shapes.train.sd3 import SD3

CAPTION = "a small red circle to the left of a big blue square on a white background"


def _load(**options):
    pipe = StableDiffusion3Pipeline.from_pretrained(
        builtin.path("shapes"), text_encoder_3=None, tokenizer_3=None, **options
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe():
    return _load()


def test_it_loads_in_every_precision(pipe):
    for loaded, dtype in ((pipe, torch.float32), (_load(dtype=torch.float16), torch.float16)):
        parts = (loaded.transformer, loaded.vae, loaded.text_encoder, loaded.text_encoder_2)
        assert {weight.dtype for part in parts for weight in part.parameters()} == {dtype}


def test_it_has_heads_to_choose_from(pipe):
    assert len(pipe.transformer.transformer_blocks) == 5
    assert pipe.transformer.config.num_attention_heads == 6


def test_training_feeds_what_the_pipeline_feeds(pipe):
    texts = [CAPTION, "", "a pink heart"]
    rows, _, pooled, _ = pipe.encode_prompt(texts, None, None, do_classifier_free_guidance=False)
    denoiser = networks.sd3()
    ids = torch.tensor(pipe.tokenizer(texts, padding="max_length", truncation=True).input_ids)
    with torch.no_grad():
        tokens, pooled_in_training = SD3(pipe.text_encoder, pipe.text_encoder_2, denoiser).encode(ids)
    assert torch.equal(tokens, rows[:, : networks.TOKENS])
    assert torch.equal(pooled_in_training, pooled)
    assert rows.shape[1] == networks.TOKENS + 256
    assert not rows[:, networks.TOKENS :].any()


@pytest.mark.parametrize("rows", [1, 24, 256])
def test_one_raised_token_equals_many_zero_rows(rows):
    tokenizer = networks.tokenizer([CAPTION])
    torch.manual_seed(0)
    denoiser = networks.sd3().double()
    with torch.no_grad():
        for weight in denoiser.parameters():
            weight.add_(0.05 * torch.randn_like(weight))  # the modulation is zero at first: nothing would attend
    encoders = [networks.text_encoder(tokenizer, 1).double() for _ in range(2)]
    ids = torch.tensor(tokenizer([CAPTION, ""], padding="max_length").input_ids)
    noisy, timestep = torch.randn(2, 4, 16, 16).double(), torch.tensor([300.0, 900.0]).double()
    with torch.no_grad():
        usual = denoiser.attn_processors
        model = SD3(encoders[0], encoders[1], denoiser)
        raised = model(noisy, timestep, ids, torch.tensor(math.log(rows), dtype=torch.float64))
        tokens, pooled = model.encode(ids)
        denoiser.set_attn_processor(usual)
        padded = torch.nn.functional.pad(tokens, (0, 0, 0, rows))
        plain = denoiser(noisy, padded, pooled, timestep, return_dict=False)[0]
    assert torch.allclose(raised, plain, rtol=0, atol=1e-12)
    assert plain.abs().max() > 0.1


def test_every_caption_fits_the_tokenizer(pipe):
    lists = captions.calibration() + captions.evaluation()
    lengths = [len(ids) for ids in pipe.tokenizer(lists).input_ids]
    assert max(lengths) <= networks.TOKENS == pipe.tokenizer.model_max_length
    assert lengths[0] == len(lists[0].replace(",", " ,").split()) + 2  # every word is one token


def test_the_tokenizer_spells_what_it_does_not_know(pipe):
    ids = pipe.tokenizer("zebra über 5", add_special_tokens=False).input_ids
    assert pipe.tokenizer.eos_token_id not in ids
    assert pipe.tokenizer.decode(ids) == "zebra über 5"


def test_the_autoencoder_keeps_what_the_judge_sees():
    vae: Any = AutoencoderKL.from_pretrained(builtin.path("shapes") / "vae")
    pictures = scenes.render(scenes.sample(128, 77))
    with torch.no_grad():
        latent = vae.encode(pictures * 2 - 1).latent_dist.mode()
        back = (vae.decode(latent).sample / 2 + 0.5).clamp(0, 1)
    scaled = (latent - vae.config.shift_factor) * vae.config.scaling_factor
    assert abs(scaled.mean().item()) < 0.05
    assert abs(scaled.std().item() - 1) < 0.05
    assert -10 * (back - pictures).square().mean().log10().item() > 35  # dB
    net = judge.load()
    seen, kept = judge.see(net, pictures), judge.see(net, back)
    assert sum(a == b for a, b in zip(seen, kept, strict=True)) >= 127


def test_it_shows_what_captions_say(pipe):
    asked = captions.evaluation()[:6]
    pictures = evaluate.generate(pipe, asked, steps=8, batch=6)
    table = judge.score(judge.load(), pictures, asked)
    assert pictures.shape == (6, 3, 64, 64)
    assert table["two_objects"].right >= 2 / 3
    assert table["one_object"].right >= 2 / 3


def test_a_picture_does_not_depend_on_its_batch(pipe):
    asked = captions.evaluation()[:3]
    together, alone = (evaluate.generate(pipe, asked, steps=2, batch=batch) for batch in (3, 2))
    assert torch.allclose(together, alone, atol=1e-3)
    assert not torch.allclose(together[:1], evaluate.generate(pipe, asked[:1], steps=2, seed=1), atol=1e-2)


@pytest.mark.slow
def test_the_quality_table_holds(pipe):
    rows, _ = evaluate.quality(pipe, judge.load(), captions.evaluation()[:128])
    for name in ("shape", "colour", "size", "background", "position", "relation"):
        assert rows[name]["right"] >= 0.95, name
    assert rows["one_object"]["right"] >= 0.85
    assert rows["bound"]["right"] >= 0.70
    assert rows["frechet"]["distance"] < 1.5 * rows["frechet"]["drawn"]
