"""What a pipeline gives its network, found out without weights: for a network of which no family makes inputs."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from textwrap import shorten
from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from compressor.errors import CompressorError
from compressor.meta import on_meta

_PROMPT = "a photo of a red dog in the snow"


class Rehearsal:
    """A pipeline of which every model is on the meta device, run up to the first call of its network.

    The pipeline's own code decides what the network is given: tokenizers, scheduler and noise are real, and a text
    encoder's outputs are random numbers of the shapes that it would yield. It makes example inputs as a family does.

    Args:
        path: the pipeline's folder, of which no weights are read.
        pipeline_class: diffusers' class.
        entries: library and class of every component, as `model_index.json` says.
        absent: components that the pipeline does without.
        network: the name of the network.
        twin: the network on the meta device; not changed.

    Raises:
        CompressorError: if diffusers or transformers cannot make it of the folder's JSON files.
    """

    def __init__(
        self,
        path: Path,
        pipeline_class: type,
        entries: Mapping[str, tuple[str, str]],
        absent: tuple[str, ...],
        network: str,
        twin: nn.Module,
    ) -> None:
        self._twin, self._name = twin, pipeline_class.__name__
        self._arguments = inspect.signature(pipeline_class.__call__).parameters  # pyright: ignore[reportAttributeAccessIssue]
        try:
            self._pipe = self._assemble(path, pipeline_class, entries, absent, network)
        except Exception as error:  # whatever diffusers or transformers stumble over
            raise CompressorError(f"a rehearsal of {self._name} could not be made: {explain(error)}") from error

    def _assemble(
        self,
        path: Path,
        pipeline_class: type,
        entries: Mapping[str, tuple[str, str]],
        absent: tuple[str, ...],
        network: str,
    ) -> Any:
        models = {
            name: _on_meta(path / name, *entry)
            for name, entry in entries.items()
            if name != network and (path / name / "config.json").is_file()
        }
        for name, model in models.items():
            if entries[name][0] == "transformers":
                model.register_forward_pre_hook(_to_meta, with_kwargs=True)
                model.register_forward_hook(_make_up)
        here = property(lambda _self: torch.device("cpu"))
        stand_in: Any = type(self._name, (pipeline_class,), {"_execution_device": here, "device": here})
        pipe = stand_in.from_pretrained(
            path, use_safetensors=True, **models, **dict.fromkeys(absent), **{network: self._twin}
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    @property
    def vae_factor(self) -> int:
        """Image pixels a latent pixel."""
        return int(getattr(self._pipe, "vae_scale_factor", 8))

    @property
    def sequence(self) -> int:
        """Text tokens that the pipeline makes of a prompt at most, if it is not told; 77 if it does not say."""
        given = self._arguments.get("max_sequence_length")
        return given.default if given is not None and isinstance(given.default, int) else 77

    def __call__(self, module: nn.Module, *, batch: int, height: int, width: int, sequence: int) -> dict[str, Any]:
        """What the pipeline passes to its network in the first step, without guidance.

        Args:
            module: the network, for its device and dtype.
            batch: samples.
            height: latent rows.
            width: latent columns.
            sequence: text tokens, if the pipeline lets its caller choose.

        Raises:
            CompressorError: if the pipeline refuses the size, or does not get as far as its network.
        """
        height, width = height * self.vae_factor, width * self.vae_factor
        given: dict[str, Any] = {"max_sequence_length": sequence} if "max_sequence_length" in self._arguments else {}
        handle = self._twin.register_forward_pre_hook(_stop, with_kwargs=True)
        try:
            self._pipe(
                prompt=[_PROMPT] * batch,
                height=height,
                width=width,
                num_inference_steps=2,
                guidance_scale=1.0,
                output_type="latent",
                **given,
                **exact_size(type(self._pipe)),
            )
        except _Reached as reached:
            bound = inspect.signature(self._twin.forward).bind(*reached.positional, **reached.keywords).arguments
        except Exception as error:  # whatever the pipeline stumbles over
            raise CompressorError(
                f"a rehearsal of {self._name} at {height} x {width} pixels failed: {explain(error)}"
            ) from error
        else:
            raise CompressorError(f"a rehearsal of {self._name} ended without a call of its network")
        finally:
            handle.remove()
        like = next(parameter for parameter in module.parameters() if parameter.is_floating_point())

        def fit(tensor: Tensor) -> Tensor:
            return tensor.to(like.device, like.dtype if tensor.is_floating_point() else None)

        return {
            name: tree_map_only(Tensor, fit, value)
            for name, value in bound.items()
            if value is not None and name != "return_dict"
        }


def exact_size(pipeline_class: type) -> dict[str, Any]:
    """Arguments of a pipeline's call without which it draws at another size than it is told."""
    call: Any = pipeline_class.__call__  # pyright: ignore[reportAttributeAccessIssue]
    binned = "use_resolution_binning" in inspect.signature(call).parameters
    return {"use_resolution_binning": False} if binned else {}


def explain(error: Exception) -> str:
    """The kind of an error and its first line, cut short."""
    words = shorten((str(error).strip().splitlines() or [""])[0], 300, placeholder=" ...").rstrip(".")
    return f"{type(error).__name__}: {words}" if words else type(error).__name__


class _Reached(Exception):
    """The network was called."""

    def __init__(self, positional: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        super().__init__()
        self.positional, self.keywords = positional, keywords


def _stop(_network: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
    raise _Reached(args, keywords)


def _on_meta(folder: Path, library: str, name: str) -> nn.Module:
    cls: Any = getattr({"diffusers": diffusers, "transformers": transformers}[library], name)
    with on_meta():
        if library == "diffusers":
            return cls.from_config(cls.load_config(folder)).eval()
        return cls(cls.config_class.from_pretrained(folder)).eval()


def _to_meta(_model: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Moves a text encoder's arguments; a mask, which has no say in shapes, would be read."""
    keywords = {name: value for name, value in keywords.items() if name != "attention_mask"}
    args, keywords = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), (args, keywords))
    return args, keywords


def _make_up(_model: nn.Module, _args: Any, output: Any) -> Any:
    def fill(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return torch.zeros_like(tensor, device="cpu")
        return torch.randn_like(tensor, device="cpu")

    return tree_map_only(Tensor, fill, output)
