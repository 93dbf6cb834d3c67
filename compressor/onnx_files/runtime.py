"""Runs a folder of ONNX files as the diffusers pipeline that it was exported from, with onnxruntime."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.modeling_outputs import AutoencoderKLOutput, Transformer2DModelOutput
from torch import Tensor, nn

from compressor import pipeline as pipelines
from compressor.errors import CompressorError
from compressor.onnx_files import check
from compressor.onnx_files.pieces import NETWORKS, TEXT_ENCODERS
from compressor.pipeline import Folder, Pipeline
from compressor.recipe import Model


def load(export: Path, result: Path | None, device: str = "cpu") -> Pipeline:
    """The pipeline of an export.

    Args:
        export: a folder in the layout of optimum-onnx: `model_index.json`, `<component>/model.onnx`, ...
        result: the folder of the torch pipeline that it was written from, which gives the components that the export
            has no file for, on the CPU; None to do without.
        device: that onnxruntime computes on, `cpu`, `cuda` or `cuda:N`. Whatever goes into a session or comes out of it
            is on the CPU.

    Returns:
        A pipeline whose components are onnxruntime's sessions; it has no weights to prune.

    Raises:
        CompressorError: if a component is in neither folder, or onnxruntime does not take a file or the device.
    """
    folder = pipelines.open_folder(Model(source=str(result or export)), weights=False)
    if result is None:
        folder = _Exported(**vars(folder))
    dense: Any = None
    models: dict[str, Any] = {}
    for name in folder.components:
        if name not in (*NETWORKS, *TEXT_ENCODERS, "vae"):
            continue
        if (found := _session(export, name, device)) is not None:
            models[name] = found
        elif result is not None:
            dense = dense or pipelines.load(Model(source=str(result)), "cpu", folder).pipe
            models[name] = getattr(dense, name)
        else:
            file = f"{'vae_decoder' if name == 'vae' else name}/model.onnx"
            raise CompressorError(f"{export}: no {file}, and no torch pipeline around it to take the {name} from")
    pipe = _assemble(folder, export, models)
    network = models[folder.network]
    return Pipeline(pipe, folder, network, (), {}, network.dtype)


class _Exported(Folder):
    """An export by itself, which has the autoencoder's config in the folders of its halves."""

    def config(self, component: str) -> dict[str, Any]:
        return super().config("vae_decoder" if component == "vae" else component)


class _Model(nn.Module, CacheMixin):
    """A component as its pipeline sees it, computed by onnxruntime."""

    def __init__(self, file: Path, device: str) -> None:
        super().__init__()
        self.label = f"{file.parent.name}/{file.name}"
        self.session = check.load(file, self.label, device)
        self.config: Any = FrozenDict(json.loads((file.parent / "config.json").read_text(encoding="utf-8")))
        self.takes = {given.name: _NUMPY[given.type] for given in self.session.get_inputs()}
        self.gives = [given.name for given in self.session.get_outputs()]
        self.nothing = nn.Parameter(torch.empty(0), requires_grad=False)  # who asks where the weights are, is answered

    @property
    def dtype(self) -> torch.dtype:
        """Of what the file gives."""
        return _TORCH[self.session.get_outputs()[0].type]

    @property
    def device(self) -> torch.device:
        """The CPU, where a session takes and gives tensors, wherever it computes."""
        return torch.device("cpu")

    def run(self, **given: Any) -> dict[str, Tensor]:
        """Runs the file on its inputs, each cast to the type that the file takes; other arguments are left out.

        Raises:
            CompressorError: if the pipeline does not give what the file takes.
        """
        if lacking := [name for name in self.takes if given.get(name) is None]:
            raise CompressorError(f"{self.label}: takes {', '.join(lacking)}, which this pipeline does not give")
        feeds = {name: np.asarray(given[name].detach().cpu()).astype(dtype) for name, dtype in self.takes.items()}
        return {
            name: torch.from_numpy(found)
            for name, found in zip(self.gives, self.session.run(self.gives, feeds), strict=True)
        }


class _Network(_Model):
    """A transformer or a U-Net."""

    def __init__(self, file: Path, device: str) -> None:
        super().__init__(file, device)
        if (width := self.config.get("projection_class_embeddings_input_dim")) is not None:
            self.add_embedding = nn.Module()  # SDXL's pipeline asks how many sizes it embeds
            self.add_embedding.linear_1 = nn.Linear(width, 1, device="meta")

    def forward(self, *inputs: Any, return_dict: bool = True, **named: Any) -> Any:
        given = {**dict(zip(("sample", "timestep"), inputs, strict=False)), **named}
        (found,) = self.run(**given, **(named.get("added_cond_kwargs") or {})).values()
        return Transformer2DModelOutput(found) if return_dict else (found,)


class _TextEncoder(_Model):
    """CLIP, with or without its projection, or T5."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        output_hidden_states: bool = False,
        **_rest: Any,
    ) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPooling
        from transformers.models.clip.modeling_clip import CLIPTextModelOutput

        if attention_mask is not None and not attention_mask.all():
            raise CompressorError(f"{self.label}: takes no attention_mask, which this pipeline gives; draw with torch")
        found = self.run(input_ids=input_ids)
        hidden = tuple(found.pop(name) for name in self.gives if name.startswith("hidden_states."))
        kind: Any = CLIPTextModelOutput if "text_embeds" in found else BaseModelOutputWithPooling
        return kind(**found, hidden_states=hidden if output_hidden_states else None)


class _Autoencoder(nn.Module):
    """The halves of an autoencoder; the encoder may be absent, for drawing does not need it."""

    def __init__(self, decoder: _Model, encoder: _Model | None) -> None:
        super().__init__()
        self.decoder, self.encoder, self.config = decoder, encoder, decoder.config

    @property
    def dtype(self) -> torch.dtype:
        """The decoder's."""
        return self.decoder.dtype

    @property
    def device(self) -> torch.device:
        """The CPU."""
        return self.decoder.device

    def decode(self, latents: Tensor, return_dict: bool = True, **_rest: Any) -> Any:
        """Images of latents."""
        found = self.decoder.run(latent_sample=latents)["sample"]
        return DecoderOutput(found) if return_dict else (found,)

    def encode(self, images: Tensor, return_dict: bool = True) -> Any:
        """The distribution of images' latents."""
        assert self.encoder is not None
        found = self.encoder.run(sample=images)["latent_parameters"]
        latents = DiagonalGaussianDistribution(found)
        return AutoencoderKLOutput(latents) if return_dict else (latents,)


def _session(export: Path, component: str, device: str) -> Any:
    """A component of an export, or None if it has no file for it."""
    files = {name: export / name / "model.onnx" for name in (component, "vae_decoder", "vae_encoder")}
    if component == "vae":
        if not files["vae_decoder"].is_file():
            return None
        return _Autoencoder(
            _Model(files["vae_decoder"], device),
            _Model(files["vae_encoder"], device) if files["vae_encoder"].is_file() else None,
        ).eval()
    if not files[component].is_file():
        return None
    return (_Network if component in NETWORKS else _TextEncoder)(files[component], device).eval()


def _assemble(folder: Folder, export: Path, models: dict[str, Any]) -> Any:
    """The pipeline of diffusers' class around these models, with the tokenizers and scheduler of the export."""
    cls: Any = getattr(diffusers, folder.pipeline_class)
    lacking = [name for name in folder.components if name not in models and not (export / name).is_dir()]
    try:
        rest = cls.from_pretrained(export, **dict.fromkeys((*models, *lacking, *folder.absent)))
    except Exception as error:  # whatever a folder of wrong values makes diffusers or transformers stumble over
        raise CompressorError(f"{export}: diffusers cannot load this pipeline: {error}") from error
    own = {name: rest.config[name] for name in inspect.signature(cls.__init__).parameters if name in rest.config}
    pipe = cls(**{**own, **rest.components, **models})
    pipe.set_progress_bar_config(disable=True)
    if hasattr(pipe, "default_sample_size") and not folder.config(folder.network).get("sample_size"):
        pipe.default_sample_size = folder.default_size // folder.vae_factor
    return pipe


_NUMPY = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}
_TORCH = {"tensor(float)": torch.float32, "tensor(float16)": torch.float16}
