"""The shipped Flux pipeline loads in diffusers, shows what captions say, and ignores padding and guidance."""

import pytest
import torch
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline

from compressor import builtin, pipeline
from compressor.recipe import Model
from compressor.shapes import captions, evaluate, judge, networks


def _load(**options):
    pipe = FluxPipeline.from_pretrained(builtin.path("shapes-flux"), **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _rows(pipe, texts, length):
    with torch.no_grad():
        return pipe.encode_prompt(texts, None, max_sequence_length=length)[0].float()


@pytest.fixture(scope="module")
def pipe():
    return _load()


def test_it_loads_in_every_precision(pipe):
    for loaded, dtype in ((pipe, torch.float32), (_load(dtype=torch.float16), torch.float16)):
        parts = (loaded.transformer, loaded.vae, loaded.text_encoder)
        assert {weight.dtype for part in parts for weight in part.parameters()} == {dtype}
        for name, weight in loaded.text_encoder_2.named_parameters():
            assert weight.dtype == (torch.float32 if ".wo." in name else dtype), name  # transformers keeps these apart


def test_most_of_it_are_heads_and_neurons_to_choose_from(pipe):
    double, single = pipe.transformer.transformer_blocks, pipe.transformer.single_transformer_blocks
    assert (len(double), len(single)) == (2, 6)
    assert {block.attn.heads for block in (*double, *single)} == {4}
    assert {block.ff.net[2].in_features for block in double} == {512}
    assert {block.ff_context.net[2].in_features for block in double} == {512}
    assert {block.proj_mlp.out_features for block in single} == {512}
    loaded = pipeline.load(Model(source="builtin:shapes-flux"), "cpu")
    weights = dict(loaded.module.named_parameters())
    pruned = sum(weights[f"{target.name}.weight"].numel() for target in loaded.targets)
    assert pruned > 0.7 * pipe.transformer.num_parameters()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float16, 2e-2)])
@pytest.mark.parametrize("length", [77, 512])
def test_t5_gives_a_caption_the_same_rows_at_any_length_and_padding_zeros(dtype, tolerance, length):
    loaded, texts = _load(dtype=dtype), captions.evaluation()[:4]
    short, long = (_rows(loaded, texts, tokens) for tokens in (networks.TOKENS, length))
    ids = loaded.tokenizer_2(texts, padding="max_length", max_length=length, return_tensors="pt").input_ids
    real = ids != loaded.tokenizer_2.pad_token_id
    within = real[:, : networks.TOKENS]
    assert torch.allclose(long[real], short[within], atol=tolerance)
    assert long[~real].abs().max() < 1e-2
    assert long[real].abs().max() > 1


def test_it_shows_what_captions_say_however_far_they_are_padded(pipe):
    asked, judging = captions.evaluation()[:6], judge.load()
    for length in (networks.TOKENS, None):
        pictures = evaluate.generate(pipe, asked, steps=10, batch=6, guidance=1.0, max_sequence_length=length)
        table = judge.score(judging, pictures, asked)
        assert pictures.shape == (6, 3, 64, 64)
        assert table["two_objects"].right >= 2 / 3
        assert table["one_object"].right >= 2 / 3


def test_guidance_changes_nothing(pipe):
    asked = captions.evaluation()[:1]
    without, with_it = (
        evaluate.generate(pipe, asked, steps=1, guidance=scale, max_sequence_length=networks.TOKENS)
        for scale in (1.0, 7.0)
    )
    assert torch.equal(without, with_it)


def test_the_toolkit_draws_at_the_size_that_it_was_trained_at():
    loaded = pipeline.load(Model(source="builtin:shapes-flux"), "cpu")
    images = loaded.pipe("a pink heart", num_inference_steps=1, max_sequence_length=24, output_type="pt").images
    assert images.shape == (1, 3, 64, 64)


@pytest.mark.slow
def test_the_quality_table_holds(pipe):
    rows, _ = evaluate.quality(pipe, judge.load(), captions.evaluation()[:128], guidance=1.0)
    for name in ("shape", "colour", "size", "background", "position", "relation", "one_object", "two_objects"):
        assert rows[name]["right"] >= 0.95, name
    assert rows["frechet"]["distance"] < 1.5 * rows["frechet"]["drawn"]
