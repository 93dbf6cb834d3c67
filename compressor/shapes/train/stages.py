"""The stages before the denoiser: tokenizer, autoencoder, judge, and the cached latents with their captions."""

# Shapes: N pictures, C latent channels, L caption tokens, K captions a picture.

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTokenizer

from compressor.shapes import captions, judge, networks, scenes
from compressor.shapes.scenes import Scenes
from compressor.shapes.train import prompts
from compressor.shapes.train.loop import Budget, Log, Rates, fit

_TOKENIZER_SEED, _POOL_SEED, _FRESH_SEED, _LATENTS_SEED = 1, 2, 3, 1000
_KL = 5e-4  # weight of the divergence from a standard normal, a latent element


@dataclass(frozen=True)
class Plan:
    """How much of everything; the smoke tests use small numbers."""

    pool: int = 98304  # pictures that the autoencoder and the judge are trained on
    fresh: int = 8192  # pictures that the judge is measured on
    scenes: int = 1_048_576  # scenes whose latents the denoiser is trained on
    wordings: int = 2  # captions a scene
    batch: int = 1024  # of the denoiser; the others take a quarter
    compiled: bool = True  # on a GPU: compile the networks, and record a whole step


@dataclass(frozen=True)
class Latents:
    """What the denoiser is trained on."""

    latents: Tensor  # N C 16 16, float16, scaled
    ids: Tensor  # N K L, int16
    empty: Tensor  # L, int16: the ids of the empty caption


def corpus() -> Iterator[str]:
    """The captions that tokenizers are made of."""
    rng = random.Random(_TOKENIZER_SEED)
    rows = prompts.labels(scenes.sample(20_000, _TOKENIZER_SEED))
    return (captions.write(captions.forget(demand, rng), rng) for demand in captions.demands(rows))


def train_tokenizer(folder: Path) -> CLIPTokenizer:
    """Trains the tokenizer on captions and saves it."""
    tokenizer = networks.tokenizer(corpus())
    tokenizer.save_pretrained(folder)
    return tokenizer


def train_vae(device: torch.device, plan: Plan, budget: Budget, checkpoint: Path, log: Log) -> AutoencoderKL:
    """Trains the autoencoder on rendered scenes and measures the scale and shift of its latents."""
    pictures = _drawn(scenes.sample(plan.pool, _POOL_SEED), device)
    vae = networks.vae()
    vae.to(device)  # type: ignore[arg-type]
    size = max(1, plan.batch // 4)

    def objective(x: Tensor, noise: Tensor) -> Tensor:
        mean, log_variance = vae.encoder(x).chunk(2, dim=1)
        log_variance = log_variance.float().clamp(-30, 20)
        decoded = vae.decoder(mean + noise * (0.5 * log_variance).exp()).float()
        divergence = 0.5 * (mean.float().square() + log_variance.exp() - 1 - log_variance).mean()
        wrong = decoded - x
        return wrong.abs().mean() + wrong.square().mean() + _KL * divergence

    compiled = torch.compile(objective) if plan.compiled and device.type == "cuda" else objective

    def loss() -> Tensor:
        index = torch.randint(len(pictures), (size,), device=device)
        x = pictures[index].float() / 127.5 - 1
        noise = torch.randn(size, networks.LATENT_CHANNELS, networks.LATENT_SIDE, networks.LATENT_SIDE, device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda", cache_enabled=False):
            return compiled(x, noise)

    fit("vae", vae, loss, budget=budget, rates=Rates(1.5e-3), checkpoint=checkpoint, log=log, graph=plan.compiled)
    mean = torch.cat([encoded.float() for encoded in _encoded(vae, pictures[:8192])])
    vae.register_to_config(shift_factor=mean.mean().item(), scaling_factor=1 / mean.std().item())
    error = (_decoded(vae, pictures[:2048]).float() - pictures[:2048]) / 255
    log(stage="vae", psnr=-10 * error.square().mean().log10().item(), **_scale(vae))
    return vae.requires_grad_(False)


def train_judge(
    device: torch.device, vae: AutoencoderKL, plan: Plan, budget: Budget, checkpoint: Path, log: Log
) -> tuple[judge.Judge, dict[str, dict[str, float]]]:
    """Trains the judge on scenes, half of them passed through the autoencoder, and measures it on fresh ones.

    Returns:
        The judge, and the share that each head gets right on fresh scenes, `drawn` and `decoded`.
    """
    pool = scenes.sample(plan.pool, _POOL_SEED)
    labels = {name: label.to(device) for name, label in _labels(pool).items()}
    drawn = _drawn(pool, device)
    pictures = torch.stack([drawn, _decoded(vae, drawn)])
    net = judge.Judge().to(device)
    size = max(1, plan.batch // 4)

    def loss() -> Tensor:
        index = torch.randint(len(drawn), (size,), device=device)
        source = torch.randint(2, (size,), device=device)
        x = pictures[source, index].float() / 255
        x = x + torch.randn_like(x) * 0.04 * torch.rand(size, 1, 1, 1, device=device)
        return judge.loss(net, x, {name: label[index] for name, label in labels.items()})

    fit("judge", net, loss, budget=budget, rates=Rates(2e-3), checkpoint=checkpoint, log=log, graph=plan.compiled)
    _settle(net, pictures)
    fresh = scenes.sample(plan.fresh, _FRESH_SEED)
    images = _drawn(fresh, device)
    accuracy = {
        "drawn": _accuracy(net, images, _labels(fresh)),
        "decoded": _accuracy(net, _decoded(vae, images), _labels(fresh)),
    }
    log(stage="judge", accuracy=accuracy)
    return net, accuracy


def kept_latents(file: Path | None, device: torch.device, vae: AutoencoderKL, tokenizer: Path, plan: Plan) -> Latents:
    """What `cache_latents` gives, read from a safetensors file if that exists, else written to it."""
    if file and file.exists():
        return Latents(**load_file(file, device=str(device)))
    data = cache_latents(device, vae, tokenizer, plan)
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial")
        save_file({"latents": data.latents, "ids": data.ids, "empty": data.empty}, partial)
        partial.replace(file)
    return data


def cache_latents(device: torch.device, vae: AutoencoderKL, tokenizer_folder: Path, plan: Plan) -> Latents:
    """Draws, encodes and captions the scenes that the denoiser is trained on, leaving out every evaluation scene."""
    reserved = prompts.held_out(captions.evaluation())
    chunk = min(plan.scenes, 16384)
    seeds = range(_LATENTS_SEED, _LATENTS_SEED + -(-plan.scenes // chunk))
    scale, latents, batches = _scale(vae), [], []
    for seed in seeds:
        batch = scenes.sample(chunk, seed)
        batch = batch[~torch.isin(batch.codes(), reserved)]
        batches.append((prompts.labels(batch), seed, plan.wordings, str(tokenizer_folder)))
        means = torch.cat(_encoded(vae, _drawn(batch, device)))
        latents.append(((means - scale["shift_factor"]) * scale["scaling_factor"]).half())
    workers = min(len(batches), max(1, (os.cpu_count() or 1) - 1))
    if workers > 4:
        with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
            ids = list(pool.map(_worded, batches))
    else:
        ids = [_worded(batch) for batch in batches]
    empty = CLIPTokenizer.from_pretrained(tokenizer_folder)("", padding="max_length").input_ids
    return Latents(
        torch.cat(latents).contiguous(),
        torch.from_numpy(np.concatenate(ids)).to(device),
        torch.tensor(empty, dtype=torch.int16, device=device),
    )


def _worded(batch: tuple[list[list[int]], int, int, str]) -> np.ndarray:
    """Token ids (N x K x L, int16) of several captions for each row of labels."""
    rows, seed, wordings, folder = batch
    rng, tokenizer = random.Random(seed), CLIPTokenizer.from_pretrained(folder)
    texts = [
        captions.write(captions.forget(demand, rng), rng) for demand in captions.demands(rows) for _ in range(wordings)
    ]
    ids = tokenizer(texts, padding="max_length", truncation=True).input_ids
    return np.array(ids, dtype=np.int16).reshape(len(rows), wordings, networks.TOKENS)


def _drawn(batch: Scenes, device: torch.device) -> Tensor:
    """Pictures as bytes (N x 3 x 64 x 64, uint8)."""
    return torch.cat(
        [
            (scenes.render(batch[start : start + 1024].to(device)) * 255).round().byte()
            for start in range(0, len(batch), 1024)
        ]
    )


@torch.no_grad()
def _encoded(vae: AutoencoderKL, pictures: Tensor) -> list[Tensor]:
    """Unscaled latent means of pictures as bytes, by batches."""
    return [_mean(vae, batch) for batch in pictures.split(1024)]


def _mean(vae: AutoencoderKL, batch: Tensor) -> Tensor:
    with torch.autocast(batch.device.type, torch.bfloat16, enabled=batch.is_cuda):
        return vae.encoder(batch.float() / 127.5 - 1).chunk(2, dim=1)[0].float()


@torch.no_grad()
def _decoded(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """Pictures as bytes, there and back through the autoencoder."""
    decoded = []
    for batch in pictures.split(1024):
        with torch.autocast(batch.device.type, torch.bfloat16, enabled=batch.is_cuda):
            image = vae.decoder(_mean(vae, batch)).float()
        decoded.append(((image + 1) * 127.5).round().clamp(0, 255).byte())
    return torch.cat(decoded)


def _labels(batch: Scenes) -> dict[str, Tensor]:
    names = ("shape", "colour", "size")
    slots = {f"{name}_{slot}": getattr(batch, name)[:, slot] for slot in range(2) for name in names}
    pair = (batch.shape[:, 1] != scenes.EMPTY).long()
    return {"count": pair, "background": batch.background, "layout": batch.layout} | slots


@torch.no_grad()
def _settle(net: nn.Module, pictures: Tensor) -> None:
    """Measures the batch statistics anew for the averaged weights."""
    norms = [layer for layer in net.modules() if isinstance(layer, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over all batches
    net.train()
    for batch in pictures[:, :16384].flatten(0, 1).split(2048):
        net(batch.float() / 255)
    net.eval()


@torch.no_grad()
def _accuracy(net: judge.Judge, pictures: Tensor, labels: dict[str, Tensor]) -> dict[str, float]:
    right: dict[str, list[Tensor]] = {name: [] for name in judge.HEADS}
    for start in range(0, len(pictures), 2048):
        logits = net.logits(pictures[start : start + 2048].float() / 255)
        for name in judge.HEADS:
            label = labels[name][start : start + 2048]
            right[name].append((logits[name].argmax(1).cpu() == label)[label != scenes.EMPTY])
    return {name: torch.cat(parts).float().mean().item() for name, parts in right.items()}


def _scale(vae: AutoencoderKL) -> dict[str, float]:
    return {name: vae.config[name] for name in ("shift_factor", "scaling_factor")}
