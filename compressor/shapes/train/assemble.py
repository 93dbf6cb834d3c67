"""Puts the trained networks together: a diffusers folder in half precision, the judge, and the hashes of weights."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from diffusers.models.attention_processor import JointAttnProcessor2_0
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline
from safetensors.torch import save_file
from transformers import CLIPTokenizer

from compressor.shapes import networks
from compressor.shapes.judge import Judge
from compressor.shapes.train.conditioned import Conditioned


def pipeline(model: Conditioned, vae: AutoencoderKL, tokenizer: CLIPTokenizer) -> StableDiffusion3Pipeline:
    """The parts as a pipeline; they are shared, not copied."""
    assert isinstance(model.denoiser, SD3Transformer2DModel)
    model.denoiser.set_attn_processor(JointAttnProcessor2_0())
    assembled = StableDiffusion3Pipeline(
        transformer=model.denoiser,
        scheduler=networks.scheduler(),
        vae=vae,
        text_encoder=model.text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=model.text_encoder_2,
        tokenizer_2=tokenizer,
        text_encoder_3=None,  # type: ignore[arg-type]
        tokenizer_3=None,  # type: ignore[arg-type]
    )
    assembled.set_progress_bar_config(disable=True)
    return assembled


def save(
    assembled: StableDiffusion3Pipeline, judge: Judge, accuracy: dict[str, dict[str, float]], folder: Path
) -> None:
    """Writes `pipeline/`, `judge.safetensors`, `judge.json`, `hashes.json`; converts the given pipeline to float16."""
    assembled.to(dtype=torch.float16).save_pretrained(folder / "pipeline", safe_serialization=True)
    for config in (folder / "pipeline").glob("text_encoder*/config.json"):
        # Where no dtype is asked for, transformers takes this one and diffusers takes float32: they must agree.
        settings = json.loads(config.read_text(encoding="utf-8")) | {"dtype": "float32"}
        config.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    weights = {name: tensor.cpu().contiguous() for name, tensor in judge.state_dict().items()}
    save_file(weights, folder / "judge.safetensors")
    text = json.dumps({"accuracy_on_fresh_scenes": accuracy}, indent=2)
    (folder / "judge.json").write_text(text + "\n", encoding="utf-8")
    write_hashes(folder)


def write_hashes(folder: Path) -> None:
    """Writes `hashes.json`: the built-in pipelines by name, and the sha256 of every weights file by its path."""
    files = [*sorted(folder.glob("pipeline*/**/*.safetensors")), folder / "judge.safetensors"]
    pipelines = {path.name.replace("pipeline", "shapes"): path.name for path in sorted(folder.glob("pipeline*"))}
    sha256 = {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    text = json.dumps({"pipelines": pipelines, "sha256": sha256}, indent=2)
    (folder / "hashes.json").write_text(text + "\n", encoding="utf-8")
