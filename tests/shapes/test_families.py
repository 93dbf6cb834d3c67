"""The U-Net and Flux are trained with the shipped tokenizer, autoencoder and judge, and fed as diffusers feeds them."""

import copy
import json
import math

import pytest
import torch
from click.testing import CliRunner
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from safetensors.torch import load_file
from transformers import CLIPTokenizer

from compressor import builtin, pipeline
from compressor.recipe import Model
from compressor.shapes import captions, networks
from compressor.shapes.train import flux, padding, stages
from compressor.shapes.train.__main__ import main

TINY = ("--steps", "3", "--scenes", "16", "--batch", "8", "--evaluated", "2", "--guidance", "2", "--device", "cpu")


@pytest.fixture(scope="module")
def tokenizer():
    return CLIPTokenizer.from_pretrained(builtin.path("shapes") / "tokenizer")


@pytest.fixture(scope="module")
def vae():
    return AutoencoderKL.from_pretrained(builtin.path("shapes") / "vae")


@pytest.fixture(scope="module")
def untrained(tokenizer, vae):
    """Flux, in double precision, with weights that all matter."""
    built = flux.build(tokenizer, vae).double().eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in built.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    return built


@pytest.fixture
def model(untrained):
    """A copy of it."""
    return copy.deepcopy(untrained)


@pytest.mark.usefixtures("_drawn_in_two_steps")
@pytest.mark.parametrize(("family", "network"), [("unet", "unet"), ("flux", "transformer")])
def test_a_family_is_trained_with_what_ships_and_becomes_a_folder(tmp_path, family, network):
    run = CliRunner().invoke(
        main, ["--family", family, "--out", str(tmp_path), "--cache", str(tmp_path / "scenes.safetensors"), *TINY]
    )
    assert run.exit_code == 0, run.output
    folder = tmp_path / f"pipeline-{family}"
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) <= 8_000_000
    pipe = DiffusionPipeline.from_pretrained(folder)
    held = load_file(tmp_path / "work" / "denoiser.safetensors")
    for name, weight in list(getattr(pipe, network).named_parameters())[::20]:
        assert torch.equal(weight, held[f"average.denoiser.{name}"].half().float()), name
    index = json.loads((tmp_path / "hashes.json").read_text())
    assert index["pipelines"] == {f"shapes-{family}": f"pipeline-{family}"}
    assert json.loads((tmp_path / f"quality-{family}.json").read_text())["table"]["count"]["count"] == 2
    loaded = pipeline.load(Model(source=str(folder)), "cpu")
    picture = loaded.pipe("a red circle", num_inference_steps=1, output_type="pt").images
    assert picture.shape == (1, 3, 64, 64)


def test_scenes_that_were_kept_are_not_drawn_again(tmp_path, tokenizer, vae, monkeypatch):
    file, where = tmp_path / "deeper" / "scenes.safetensors", torch.device("cpu")
    words = builtin.path("shapes") / "tokenizer"
    drawn = stages.kept_latents(file, where, vae, words, stages.Plan(scenes=16))
    monkeypatch.setattr(stages, "cache_latents", None)
    read = stages.kept_latents(file, where, vae, words, stages.Plan(scenes=16))
    assert all(torch.equal(getattr(read, name), getattr(drawn, name)) for name in ("latents", "ids", "empty"))


def test_both_tokenizers_of_flux_cut_every_caption_into_the_same_words(model, tokenizer):
    texts = [*captions.calibration(), *captions.evaluation(), ""]
    ids = torch.tensor(tokenizer(texts, padding="max_length").input_ids)
    t5_ids = torch.tensor(model.t5_tokenizer(texts, padding="max_length", max_length=networks.TOKENS).input_ids)
    assert torch.equal(model.t5_ids(ids), t5_ids)
    assert not (t5_ids == model.t5_tokenizer.unk_token_id).any()
    assert (t5_ids[:, -1] == model.t5_tokenizer.pad_token_id).all()  # there is padding to stand for the rest
    assert model.t5_tokenizer.tokenize("zebra, a") == [*"\u2581zebra,", "\u2581a"]


@pytest.mark.parametrize("length", [24, 100])
def test_a_t5_that_ignores_its_padding_gives_what_one_with_a_mask_gives(model, length):
    narrow = model.text_encoder_2.float()
    texts = captions.evaluation()[:4]
    t5_ids = torch.tensor(model.t5_tokenizer(texts, padding="max_length", max_length=length).input_ids)
    real = t5_ids != 0
    with torch.no_grad():
        masked = narrow(t5_ids, attention_mask=torch.where(real, 0.0, -1e4)[:, None, None])[0]
        rows = padding.ignored(narrow, 0)(t5_ids)[0]
        unmasked = narrow(t5_ids)[0]
    assert torch.allclose(rows[real][:, padding.EXTRA :], masked[real], atol=1e-4)
    assert not torch.allclose(unmasked[real], masked[real], atol=1e-2)
    assert not rows[..., : padding.EXTRA].any()
    assert rows[~real].abs().max() < 1e-2
    assert masked[real].abs().max() > 1


@pytest.mark.parametrize("length", [24, 77, 512])
def test_training_feeds_flux_what_the_pipeline_feeds_at_any_length(model, tokenizer, vae, length):
    texts = captions.evaluation()[:2]
    ids = torch.tensor(tokenizer(texts, padding="max_length").input_ids)
    torch.manual_seed(0)
    noisy, level = torch.randn(2, 4, 16, 16).double(), torch.tensor([0.3, 0.9]).double()
    with torch.no_grad():
        predicted = model(noisy, level, ids, torch.tensor(math.log(length - networks.TOKENS + 1)))
        pipe = flux.assemble(model, vae, tokenizer)
        rows, pooled, places = pipe.encode_prompt(texts, max_sequence_length=length)
        packed = pipe._pack_latents(noisy, 2, 4, 16, 16)
        image_places = pipe._prepare_latent_image_ids(2, 8, 8, torch.device("cpu"), torch.float64)
        expected = model.denoiser(packed, rows, pooled, level, image_places, places, return_dict=False)[0]
    assert rows is not None
    assert rows.shape[1] == length
    assert torch.equal(flux.pack(noisy), packed)
    assert torch.equal(flux.unpack(packed, 16, 16), noisy)
    assert torch.allclose(flux.pack(predicted), expected, atol=2e-3)
    assert expected.abs().max() > 1
