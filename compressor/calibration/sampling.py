"""Runs a diffusers pipeline on prompts that were encoded once, each with noise of its own."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from compressor.pipeline import Folder, Pipeline
from compressor.rehearsal import exact_size

_ENCODE_BATCH = 16


@dataclass(frozen=True)
class Encoded:
    """A prompt as the network is given it.

    Attributes:
        prompt: the text.
        seed: of its noise.
        tensors: arguments of the pipeline's call, each with a batch of one, on the CPU.
    """

    prompt: str
    seed: int
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class Settings:
    """How to sample: inference steps, classifier-free guidance scale, and the size in pixels (None: the default)."""

    steps: int
    guidance: float
    height: int | None = None
    width: int | None = None


@torch.no_grad()
def encode(
    pipeline: Pipeline,
    prompts: Sequence[str],
    guidance: float,
    seed: int,
    use: str,
    max_sequence_length: int | None = None,
    places: Sequence[int] | None = None,
) -> list[Encoded]:
    """Encodes prompts with the pipeline's own text encoders, once.

    Args:
        pipeline: any; one of an unknown class encodes its prompts again at every call.
        prompts: N texts.
        guidance: above 1, the empty prompt is encoded as well.
        seed: the recipe's; prompt number i has noise of its own, decided by seed, use and i.
        use: keeps the noises of calibration and of pictures apart.
        max_sequence_length: tokens of the T5 encoder's part, for pipelines that have one; None for their default.
        places: which of the prompts to encode, by number, in that order; all if None.
    """
    known = pipeline.folder.prompting
    places = range(len(prompts)) if places is None else places
    seeds = [noise_seed(seed, use, i) for i in places]
    prompts = [prompts[i] for i in places]
    if known is None:
        return [Encoded(prompt, s, {}) for prompt, s in zip(prompts, seeds, strict=True)]
    arguments = {"device": pipeline.device, "num_images_per_prompt": 1, **known.arguments}
    if known.guided:
        arguments["do_classifier_free_guidance"] = guidance > 1
    if max_sequence_length is not None:
        arguments["max_sequence_length"] = max_sequence_length
    encoded: list[Encoded] = []
    for start in range(0, len(prompts), _ENCODE_BATCH):
        texts = list(prompts[start : start + _ENCODE_BATCH])
        results = pipeline.pipe.encode_prompt(prompt=texts, **arguments)
        for i, text in enumerate(texts):
            tensors = {n: r[i : i + 1].cpu() for n, r in zip(known.results, results, strict=False) if r is not None}
            encoded.append(Encoded(text, seeds[start + i], tensors))
    return encoded


@torch.no_grad()
def sample(
    pipeline: Pipeline, batch: Sequence[Encoded], settings: Settings, output: Literal["latent", "pt"]
) -> tuple[Tensor, Tensor]:
    """Samples a batch of prompts.

    Args:
        pipeline: on its device.
        batch: B prompts.
        settings: steps, guidance and size.
        output: `latent` decodes nothing; `pt` gives images.

    Returns:
        The result, B x ..., images in [0, 1], and the final latents, B x ..., both float32 on the CPU.
    """
    final: dict[str, Tensor] = {}

    def keep(_pipe: Any, _step: int, _timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        final["latents"] = tensors["latents"]
        return {}

    def keep_of_old(_step: int, _timestep: Any, latents: Tensor) -> None:
        final["latents"] = latents

    arguments: dict[str, Any] = {
        name: torch.cat([encoded.tensors[name] for encoded in batch]).to(pipeline.device) for name in batch[0].tensors
    }
    if not arguments:
        arguments["prompt"] = [encoded.prompt for encoded in batch]
    known = inspect.signature(pipeline.pipe.__call__).parameters
    result = pipeline.pipe(
        **arguments,
        **exact_size(type(pipeline.pipe)),
        num_inference_steps=settings.steps,
        guidance_scale=settings.guidance,
        height=settings.height,
        width=settings.width,
        generator=[torch.Generator().manual_seed(encoded.seed) for encoded in batch],
        output_type=output,
        **({"callback_on_step_end": keep} if "callback_on_step_end" in known else {"callback": keep_of_old}),
        return_dict=False,
    )[0]
    return result.float().cpu(), final["latents"].float().cpu()


def noise_seed(seed: int, use: str, index: int) -> int:
    """The seed of one prompt's noise, different for every index.

    torch's generator on the CPU looks at the lowest 32 bits alone, so all that decides the noise must be in them.
    """
    base = int.from_bytes(hashlib.sha256(f"{use} {seed}".encode()).digest()[:4], "big")
    return (base + index) % 2**32


def guided(folder: Folder, guidance: float) -> bool:
    """Whether the network is also run on the empty prompt; some, as Flux, are told the guidance scale instead."""
    return guidance > 1 and (folder.prompting is None or folder.prompting.guided)


def takes_guidance(folder: Folder) -> bool:
    """Whether a guidance scale changes anything; it does not for a Flux that was distilled without one."""
    known = folder.prompting
    return known is None or known.guided or bool(folder.config(folder.network).get("guidance_embeds"))


def out_of_memory(error: RuntimeError) -> bool:
    """Whether an error says that memory ran out, on a GPU or on the CPU."""
    words = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words)
