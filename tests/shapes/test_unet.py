"""The shipped U-Net pipeline loads as any diffusers folder, is fed as it was trained, and shows what captions say."""

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

from compressor import builtin
from compressor.shapes import captions, evaluate, judge
from compressor.shapes.train import objectives, unet


def _load(**options):
    pipe = StableDiffusionPipeline.from_pretrained(builtin.path("shapes-unet"), **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe():
    return _load()


def test_it_loads_in_every_precision(pipe):
    for loaded, dtype in ((pipe, torch.float32), (_load(dtype=torch.float16), torch.float16)):
        parts = (loaded.unet, loaded.vae, loaded.text_encoder)
        assert {weight.dtype for part in parts for weight in part.parameters()} == {dtype}


def test_most_of_it_are_heads_and_neurons_to_choose_from(pipe):
    blocks = [module for module in pipe.unet.modules() if type(module).__name__ == "BasicTransformerBlock"]
    assert len(blocks) == 5
    for block in blocks:
        assert block.attn1.heads == block.attn2.heads == 4
        assert block.ff.net[2].in_features == 512
        assert block.ff.net[0].proj.out_features == 2 * 512  # GEGLU
    linears = sum(weight.numel() for block in blocks for weight in block.parameters())
    assert linears > pipe.unet.num_parameters() / 2


def test_training_feeds_what_the_pipeline_feeds(pipe):
    texts = ["a small red circle on white", "", "a pink heart"]
    rows, _ = pipe.encode_prompt(texts, torch.device("cpu"), 1, do_classifier_free_guidance=False)
    model = unet.UNet(pipe.text_encoder, pipe.unet, 0.0)
    ids = torch.tensor(pipe.tokenizer(texts, padding="max_length", truncation=True).input_ids)
    noisy, step = torch.randn(3, 4, 16, 16), torch.tensor([999, 500, 3])
    with torch.no_grad():
        predicted = model(noisy, step, ids)
        expected = pipe.unet(noisy, step, rows, return_dict=False)[0]
    assert torch.equal(predicted, expected)
    assert torch.equal(model.kept_T, pipe.scheduler.alphas_cumprod)


def test_the_velocity_and_the_noisy_latent_give_the_latent_back(pipe):
    torch.manual_seed(0)
    latent = torch.randn(64, 4, 16, 16).double()
    kept = pipe.scheduler.alphas_cumprod.double()
    noisy, step, target = objectives.velocity(latent, kept)
    part = kept[step][:, None, None, None]
    assert torch.allclose(part.sqrt() * noisy - (1 - part).sqrt() * target, latent, atol=1e-12)
    assert kept[-1] == 0  # sampling begins with noise alone, and so does training


def test_it_shows_what_captions_say(pipe):
    asked = captions.evaluation()[:6]
    pictures = evaluate.generate(pipe, asked, steps=10, batch=6)
    table = judge.score(judge.load(), pictures, asked)
    assert pictures.shape == (6, 3, 64, 64)
    assert table["two_objects"].right >= 2 / 3
    assert table["one_object"].right >= 2 / 3


@pytest.mark.slow
def test_the_quality_table_holds(pipe):
    rows, _ = evaluate.quality(pipe, judge.load(), captions.evaluation()[:128])
    for name in ("shape", "colour", "size", "background", "position", "relation", "one_object", "two_objects"):
        assert rows[name]["right"] >= 0.95, name
    assert rows["frechet"]["distance"] < 1.5 * rows["frechet"]["drawn"]
