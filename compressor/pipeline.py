"""Loads a diffusers pipeline without unpickling anything, and finds in it the network to change."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import shorten
from typing import Any

import diffusers
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from huggingface_hub import snapshot_download
from torch import nn

from compressor import builtin, offload, registry, shrunk
from compressor import weights as weight_files
from compressor.errors import CompressorError
from compressor.meta import on_meta
from compressor.recipe import Model
from compressor.rehearsal import Rehearsal
from compressor.structure import Family, Prompting, Target, discover, find_targets, unfuse

NETWORKS = ("transformer", "unet")


@dataclass(frozen=True)
class Folder:
    """A diffusers folder as read from its JSON files alone.

    Attributes:
        path: the folder.
        source: what the recipe called it.
        pipeline_class: such as `StableDiffusion3Pipeline`.
        components: names present; those that the pipeline does without are in `absent`.
        absent: names that `model_index.json` declares empty.
        network: the component to change.
        family: what is known about it.
        rehearsal: what makes its inputs, if the family was discovered.
        warnings: what the user should know of how it was found.
    """

    path: Path
    source: str
    pipeline_class: str
    components: tuple[str, ...]
    absent: tuple[str, ...]
    network: str
    family: Family
    rehearsal: Rehearsal | None = None
    warnings: tuple[str, ...] = ()

    def config(self, component: str) -> dict[str, Any]:
        """A component's `config.json`."""
        return weight_files.read_json(self.path / component / "config.json")

    def scheduler(self) -> Any:
        """The pipeline's scheduler, None if there is none; of a class that diffusers does not have, just the name."""
        file = self.path / "scheduler" / "scheduler_config.json"
        _, name = weight_files.read_json(self.path / "model_index.json").get("scheduler") or (None, None)
        if name is None or not file.is_file():
            return None
        cls = getattr(diffusers, name, None)
        return type(name, (), {})() if cls is None else cls.from_config(weight_files.read_json(file))

    @property
    def vae_factor(self) -> int:
        """Image pixels a latent pixel."""
        if self.rehearsal is not None:
            return self.rehearsal.vae_factor
        if "vae" not in self.components:
            return 8
        return 2 ** (len(self.config("vae").get("block_out_channels", [0] * 4)) - 1)

    @property
    def prompting(self) -> Prompting | None:
        """What is known of how the pipeline gives its network a prompt."""
        return self.family.prompts_of(self.pipeline_class)

    def text_tokens(self, max_sequence_length: int | None = None) -> int:
        """Text tokens that the network is given for a prompt.

        Args:
            max_sequence_length: of the T5 encoder's part, as diffusers calls it; None for the pipeline's default.
        """
        if self.rehearsal is not None:
            return max_sequence_length or self.rehearsal.sequence
        known = self.prompting
        t5 = (max_sequence_length or known.t5) if known and known.t5 else 0
        return t5 if known and not known.clip else self._clip_tokens() + t5

    def _clip_tokens(self) -> int:
        tokenizer = self.path / "tokenizer" / "tokenizer_config.json"
        found = weight_files.read_json(tokenizer).get("model_max_length") if tokenizer.is_file() else None
        return min(found or 77, 512)

    @property
    def default_size(self) -> int:
        """Height and width, in pixels, that the pipeline draws at if it is not told."""
        size = self.config(self.network).get("sample_size") or self._trained_size or 128
        return int(size if isinstance(size, int) else size[0]) * self.vae_factor

    @property
    def _trained_size(self) -> int:
        """Latent pixels that the autoencoder says it was trained at: Flux's network knows no size. 0 if not said."""
        return (self.config("vae").get("sample_size") or 0) // self.vae_factor if "vae" in self.components else 0

    def check_sequence(self, max_sequence_length: int | None, where: str) -> None:
        """Refuses a length of the T5 encoder's part for a pipeline that has none, or beyond the 512 that T5 is given.

        Args:
            max_sequence_length: None for the default.
            where: what it was given by, for the error.

        Raises:
            CompressorError: saying what would be right.
        """
        if max_sequence_length is None:
            return
        if self.prompting is None or not self.prompting.t5:
            raise CompressorError(f"{where} has no effect: {self.pipeline_class} takes none; remove it")
        if max_sequence_length > 512:
            raise CompressorError(f"{where}: should be at most 512, found {max_sequence_length}")

    def check_size(self, height: int | None, width: int | None, where: str) -> None:
        """Refuses a size in pixels that the network cannot draw.

        Args:
            height: None for the default.
            width: None for the default.
            where: put before the name in the error, as `calibration.`.

        Raises:
            CompressorError: if one is no multiple of what the network needs, or too large for it.
        """
        patch = self.family.patch * self.vae_factor
        step = math.lcm(patch, self.family.pixels)
        most = (self.config(self.network).get(self.family.most_patches or "") or 0) * patch
        for name, value in (("height", height), ("width", width)):
            if value is not None and value % step:
                raise CompressorError(f"{where}{name}: should be a multiple of {step} pixels, found {value}")
            if value is not None and most and value > most:
                raise CompressorError(f"{where}{name}: should be at most {most} pixels, found {value}")

    def twin(self) -> nn.Module:
        """The network on the meta device: every shape, no memory.

        Raises:
            CompressorError: if diffusers cannot make it from its config, or that says wrongly how it was shrunk.
        """
        config = self.config(self.network)
        file = self.path / self.network / "config.json"
        if (manifest := shrunk.manifest_in(config)) is None:
            return _make_twin(self.family.component_class, config, file)
        cls = getattr(diffusers, self.family.component_class)
        try:
            return shrunk.rebuild(cls, config, manifest, self.family, f"{file}: {shrunk.KEY}")
        except CompressorError:
            raise
        except Exception as error:  # as below
            raise _cannot_make(cls.__name__, file, error) from error


@dataclass(frozen=True)
class Pipeline:
    """A loaded pipeline.

    Attributes:
        pipe: the diffusers pipeline, on its device.
        folder: where it came from.
        module: the network to change (`pipe.transformer` or `pipe.unet`).
        targets: every linear of the network that may be pruned.
        stored: for each model component, the dtype of each tensor in its files.
        dtype: the dtype it computes in.
        warnings: what the user should know of how it was loaded.
    """

    pipe: Any
    folder: Folder
    module: nn.Module
    targets: tuple[Target, ...]
    stored: dict[str, dict[str, torch.dtype]]
    dtype: torch.dtype
    warnings: tuple[str, ...] = ()

    @property
    def component_name(self) -> str:
        """`transformer` or `unet`."""
        return self.folder.network

    @property
    def family(self) -> Family:
        """What is known about the network."""
        return self.folder.family

    @property
    def device(self) -> torch.device:
        """Where the network computes."""
        return offload.computes_on(self.module)

    def example_inputs(self) -> Mapping[str, Any]:
        """Random inputs of the network's forward, the same at every call: one sample of a small picture.

        Where components take turns, it becomes the network's, so that both are on the same device.
        """
        offload.bring(self.module)
        side = min(self.folder.default_size // self.folder.vae_factor, 32)
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(0)
            return self.family.inputs(self.module, batch=1, height=side, width=side, sequence=self.folder.text_tokens())


def open_folder(model: Model, *, weights: bool = True) -> Folder:
    """Finds a model's folder and reads what it is from its JSON files.

    Args:
        model: which one.
        weights: whether a model of the hub is fetched with its weights, or only its JSON files and tokenizers.

    Raises:
        CompressorError: if there is no such model, it is no diffusers folder, it lacks the component asked for, an
            adapter is attached, the network is quantised, or no family knows the network and none can be discovered.
    """
    path = _locate(model, weights=weights)
    index_file = path / "model_index.json"
    if not index_file.is_file():
        raise CompressorError(f"{path}: should be a diffusers folder with a model_index.json, found none")
    index = weight_files.read_json(index_file)
    entries = {k: v for k, v in index.items() if isinstance(v, list) and len(v) == 2 and not k.startswith("_")}
    absent = tuple(name for name, entry in entries.items() if entry[1] is None)
    present = tuple(name for name in entries if name not in absent)
    networks = [name for name in present if name in NETWORKS]
    if not model.component and not networks:
        raise CompressorError(f"{path}: should have a transformer or a unet, found {', '.join(present) or 'nothing'}")
    if not model.component and len(networks) > 1:
        raise CompressorError(f"{path}: model.component should say which to change, {' or '.join(networks)}")
    network = model.component or networks[0]
    if network not in present:
        raise CompressorError(f"{path}: the pipeline has no component '{network}'; it has {', '.join(present)}")
    known = {family.component_class: family for family in _families()}
    name = str(entries[network][1])
    if name not in known and not (network in NETWORKS and _is_network(name)):
        raise CompressorError(f"no family knows the network class '{name}'; known: {_list(known.values())}")
    file = path / network / "config.json"
    config = weight_files.read_json(file)
    weight_files.refuse_quantised(file, config, network)
    for component in present:
        weight_files.check_lists(path / component)
    pipeline_class = str(index.get("_class_name"))
    if name in known:
        return Folder(path, model.source, pipeline_class, present, absent, network, known[name])
    classes = {part: (str(entries[part][0]), str(entries[part][1])) for part in present}
    return _discover(path, model.source, pipeline_class, classes, absent, network)


def inspect(folder: Folder, twin: nn.Module) -> tuple[str, ...]:
    """Looks into the headers of the weights, where they are at hand, for what `load` would refuse or tell.

    Args:
        folder: of the model, perhaps without its weights.
        twin: the network on the meta device.

    Returns:
        A warning if there are fused projections.

    Raises:
        CompressorError: if a file is damaged, or an adapter is attached.
    """
    names: dict[str, torch.dtype] = {}
    for component in folder.components:
        found = weight_files.check(folder.path / component, sorted((folder.path / component).glob("*.safetensors")))
        if component == folder.network:
            names = found
    return _explain_fused(folder, tuple(dict.fromkeys(weight_files.fused(names, twin).values())))


def load(model: Model, device: str, folder: Folder | None = None, *, turns: bool = False) -> Pipeline:
    """Loads a pipeline onto a device.

    Args:
        model: which one, and in which dtype to compute.
        device: `auto`, `cpu`, `cuda`, ...
        turns: keep its components in the CPU's memory, each but while it computes.
        folder: what `open_folder` found for this model, if that was asked already: a hub is not asked twice, nor
            are the hashes of a built-in pipeline checked twice.

    Raises:
        CompressorError: if it cannot be found, its weights are missing, damaged or pickled, or the device is absent,
            or is the CPU, where none can take turns.
    """
    target = pick_device(device)
    if turns and target.type == "cpu":
        raise CompressorError("offload: model has no effect on the CPU: the model is there already; leave it out")
    folder = folder or open_folder(model)
    for name in folder.components:
        if not (folder.path / name).is_dir():
            raise CompressorError(f"{folder.path / name}: no such folder, though model_index.json lists this component")
    stored = {
        name: weight_files.check(folder.path / name, _files(folder, name, model.variant))
        for name in folder.components
        if _is_model(folder, name)
    }
    dtype = _compute_dtype(model.dtype, target, stored[folder.network])
    pipe_class = _pipeline_class(folder.path, folder.pipeline_class)
    try:
        pipe = pipe_class.from_pretrained(
            folder.path,
            use_safetensors=True,
            variant=model.variant or None,
            dtype=dtype,
            **dict.fromkeys(folder.absent),
            **_load_shrunk(folder, model.variant, dtype),
        )
    except CompressorError:
        raise
    except Exception as error:  # whatever a folder of wrong values makes diffusers or transformers stumble over
        raise CompressorError(
            f"{folder.path}: diffusers cannot load this pipeline: {_first_line(error)}{_explain_quantised(folder)}"
        ) from error
    pipe.set_progress_bar_config(disable=True)
    if hasattr(pipe, "default_sample_size") and not folder.config(folder.network).get("sample_size"):
        pipe.default_sample_size = folder.default_size // folder.vae_factor
    unfused = _unfuse(getattr(pipe, folder.network), folder, model.variant, stored[folder.network])
    for name in stored:
        component = getattr(pipe, name).eval().requires_grad_(False)
        if missing := [key for key, tensor in component.state_dict().items() if tensor.is_meta]:
            raise CompressorError(
                f"{folder.path / name}: its weights lack {len(missing)} of its tensors, first {missing[0]}"
            )
    if turns:
        offload.take_turns([part for part in pipe.components.values() if isinstance(part, nn.Module)], target)
    else:
        pipe.to(target)
    module = getattr(pipe, folder.network)
    warnings = (*folder.warnings, *unfused)
    return Pipeline(pipe, folder, module, find_targets(module, folder.family), stored, dtype, warnings)


def pick_device(name: str) -> torch.device:
    """The device of that name; `auto` is the first GPU, else the CPU.

    Raises:
        CompressorError: if it is no device, or absent.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except Exception as error:  # each backend that is not there says so in its own way
        raise CompressorError(f"device: '{name}' cannot be used: {_first_line(error).split('. ')[0]}") from None
    if device.type == "meta":
        raise CompressorError("device: 'meta' cannot be used: it computes nothing")
    return device


def current(device: torch.device) -> AbstractContextManager[object]:
    """While it lasts, a GPU is the one that is meant where none is named; nothing for other devices."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _locate(model: Model, *, weights: bool) -> Path:
    source = model.source
    if source.startswith("builtin:"):
        return builtin.path(source.removeprefix("builtin:"))
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise CompressorError(
            f"{source}: should be a diffusers folder, found a file; convert a single-file checkpoint with "
            "diffusers' from_single_file(...).save_pretrained(FOLDER)"
        )
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source) or source.startswith("."):
        raise CompressorError(f"model.source: no folder '{source}', and it is no hub id of the form org/name")
    try:
        if not weights:
            return Path(snapshot_download(source, allow_patterns=["*.json", "tokenizer*/*"]))
        return Path(
            DiffusionPipeline.download(source, use_safetensors=True, variant=model.variant or None)  # pyright: ignore
        )
    except Exception as error:  # the hub client raises many kinds; each means that there is no model
        raise CompressorError(
            f"model.source: no folder '{source}', and it cannot be had from the hub: {_first_line(error)}"
        ) from error


def _families() -> list[Family]:
    return [registry.load("family", name) for name in registry.find("family")]


def _list(families: Iterable[Family]) -> str:
    return ", ".join(f"{family.name} ({family.component_class})" for family in families)


def _is_network(name: str) -> bool:
    found = getattr(diffusers, name, None)
    return isinstance(found, type) and issubclass(found, nn.Module)


def _discover(
    path: Path,
    source: str,
    pipeline_class: str,
    classes: Mapping[str, tuple[str, str]],
    absent: tuple[str, ...],
    network: str,
) -> Folder:
    """A folder with a family for a network that none knows.

    Raises:
        CompressorError: saying why there cannot be one, and what to do.
    """
    name, file = classes[network][1], path / network / "config.json"
    dense = {key: value for key, value in weight_files.read_json(file).items() if key != shrunk.KEY}
    twin = _make_twin(name, dense, file)
    try:
        rehearsal = Rehearsal(path, _pipeline_class(path, pipeline_class), classes, absent, network, twin)
        bare = Family(name, name, (), rehearsal)
        folder = Folder(path, source, pipeline_class, tuple(classes), absent, network, bare, rehearsal)
        side = min(folder.default_size // folder.vae_factor, 32)
        family, warning = discover(twin, rehearsal, height=side, width=side)
    except CompressorError as error:
        raise CompressorError(
            f"no family knows the network class '{name}', and discovery cannot serve it: {error}; write a family for "
            f"it (docs/plugins.md, 'A family'); known: {_list(_families())}"
        ) from error
    return replace(folder, family=replace(family, pixels=8), warnings=(warning,))


def _pipeline_class(path: Path, name: str) -> type[DiffusionPipeline]:
    found = getattr(diffusers, name, None)
    if isinstance(found, type) and issubclass(found, DiffusionPipeline):
        return found
    raise CompressorError(f"{path}: diffusers {diffusers.__version__} has no pipeline class '{name}'")


def _make_twin(name: str, config: dict[str, Any], file: Path) -> nn.Module:
    cls = getattr(diffusers, name)
    try:
        with on_meta():
            return cls.from_config(config).eval()
    except Exception as error:  # whatever a config of wrong values makes diffusers stumble over
        raise _cannot_make(name, file, error) from error


def _cannot_make(name: str, file: Path, error: Exception) -> CompressorError:
    return CompressorError(f"{file}: diffusers cannot make a {name} of it: {_first_line(error)}")


def _is_model(folder: Folder, name: str) -> bool:
    return (folder.path / name / "config.json").is_file()


def _files(folder: Folder, name: str, variant: str | None) -> list[Path]:
    """A component's files of weights; of the network's, none but the variant asked for will do."""
    return weight_files.find(folder.path / name, variant, needed=name == folder.network)


def _load_shrunk(folder: Folder, variant: str | None, dtype: torch.dtype) -> dict[str, nn.Module]:
    """The network, if its config says that it is shrunk; else nothing, and diffusers loads it."""
    files = _files(folder, folder.network, variant)
    network = shrunk.load(folder.path / folder.network, files, folder.family, dtype)
    return {} if network is None else {folder.network: network}


def _unfuse(network: nn.Module, folder: Folder, variant: str | None, stored: dict[str, torch.dtype]) -> tuple[str, ...]:
    """Takes fused projections apart, in the network and in `stored`; a warning that names their attentions."""
    names = weight_files.fused(stored, network)
    if names:
        weight_files.unfuse_into(network, _files(folder, folder.network, variant), names)
    for name in names:
        del stored[name]
    return _explain_fused(folder, tuple(dict.fromkeys((*names.values(), *unfuse(network)))))


def _explain_fused(folder: Folder, attentions: tuple[str, ...]) -> tuple[str, ...]:
    if not attentions:
        return ()
    more = f" and {len(attentions) - 8} more" if len(attentions) > 8 else ""
    return (
        f"{folder.network}: the fused projections of {len(attentions)} attentions are taken apart, and count, "
        f"whatever separate ones lie beside them: {', '.join(attentions[:8])}{more}",
    )


def _explain_quantised(folder: Folder) -> str:
    """What may be the reason that a pipeline cannot be loaded: components other than the network that are quantised."""
    files = {name: folder.path / name / "config.json" for name in folder.components}
    found = {
        name: method
        for name, file in files.items()
        if file.is_file() and (method := weight_files.quantised_with(weight_files.read_json(file))) is not None
    }
    each = "; ".join(f"its {name} is quantised with {method}" for name, method in found.items())
    return f"; {each}: install what that needs, or give it in full precision" if each else ""


def _compute_dtype(asked: str, device: torch.device, stored: dict[str, torch.dtype]) -> torch.dtype:
    if asked != "auto":
        return getattr(torch, asked)
    if device.type == "cpu":
        return torch.float32
    return Counter(stored.values()).most_common(1)[0][0]


def _first_line(error: Exception) -> str:
    return shorten((str(error).strip().splitlines() or [type(error).__name__])[0], 300, placeholder=" ...")
