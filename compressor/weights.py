"""A component's weights files: found, checked without unpickling, and refused where they are no plain weights."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from compressor import shrunk
from compressor.errors import CompressorError
from compressor.structure.groups import FUSED

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_ADAPTER = re.compile(r"(^|\.)(base_layer|lora_[A-Za-z_]+|\w+_lora)\.")
"""In the name of a tensor: PEFT's layers around a linear, and diffusers' own of former days."""
_FUSED = re.compile(rf"(.+)\.({'|'.join(FUSED)})\.(weight|bias)")


def find(folder: Path, variant: str | None, *, needed: bool) -> list[Path]:
    """A component's files of weights.

    Args:
        folder: the component's.
        variant: such as `fp16`, or none.
        needed: whether files of another variant will not do.

    Raises:
        CompressorError: if there are none, none of the variant, or only pickled ones.
    """
    files = sorted(folder.glob("*.safetensors"))
    marked = [f for f in files if variant and f".{variant}" in f.name]
    plain = [f for f in files if re.fullmatch(r"[\w-]+\.safetensors", f.name)]
    if needed and plain and variant and not marked:
        raise CompressorError(
            f"{folder}: holds no weights of variant '{variant}'; found {', '.join(f.name for f in plain)}"
        )
    files = marked or plain
    if not files:
        pickles = sorted(f.name for f in folder.iterdir() if f.suffix in _PICKLES) if folder.is_dir() else []
        if pickles:
            raise CompressorError(
                f"{folder}: refused: its weights are pickled ({', '.join(pickles)}), and unpickling runs whatever "
                "code is in them; load it where you trust it and save it again with save_pretrained(..., "
                "safe_serialization=True)"
            )
        raise CompressorError(f"{folder}: holds no weights; should hold a .safetensors file{_of_variant(variant)}")
    return files


def check(folder: Path, files: Iterable[Path]) -> dict[str, torch.dtype]:
    """Reads the headers of a component's weights; nothing is unpickled.

    Returns:
        The dtype of every tensor.

    Raises:
        CompressorError: if a file is damaged, a list of files names another kind, or an adapter is attached.
    """
    check_lists(folder)
    dtypes: dict[str, torch.dtype] = {}
    for file in files:
        try:
            with safe_open(file, "pt") as tensors:
                found = {key: tensors.get_slice(key).get_dtype() for key in tensors.keys()}  # noqa: SIM118  (not a dict)
        except (SafetensorError, OSError) as error:
            raise CompressorError(f"{file}: truncated or damaged safetensors file: {error}") from None
        _refuse_adapter(file, found)
        dtypes |= {key: _DTYPES.get(name, torch.float32) for key, name in found.items()}
    return dtypes


def check_lists(folder: Path) -> None:
    """Checks what a component's JSON files say of its weights.

    Raises:
        CompressorError: if a list of files names one that is not safetensors, which diffusers would unpickle, or an
            adapter is attached.
    """
    for index in sorted(folder.glob("*.safetensors.index*.json")):
        listed = read_json(index).get("weight_map")
        names: dict[str, Any] = listed if isinstance(listed, dict) else {}
        for name in names.values():
            if not str(name).endswith(".safetensors"):
                raise CompressorError(f"{index}: should list .safetensors files only, found {name}")
        _refuse_adapter(index, names)
    if (file := folder / "adapter_config.json").is_file():
        kind = read_json(file).get("peft_type") or "PEFT"
        raise CompressorError(f"{file}: refused: a {kind} adapter is attached to this component; {_FUSE_IT}")


def refuse_quantised(file: Path, config: Mapping[str, Any], component: str) -> None:
    """Refuses a network whose weights are quantised.

    Args:
        file: its `config.json`, for the error.
        config: what is in it.
        component: its name.

    Raises:
        CompressorError: naming the method.
    """
    if (method := quantised_with(config)) is not None:
        raise CompressorError(
            f"{file}: refused: the {component} is quantised with {method}, and pruning needs its full-precision "
            "weights; prune those, and quantise the result afterwards"
        )


def quantised_with(config: Mapping[str, Any]) -> str | None:
    """The method that a component's config says its weights are quantised with; none if they are not."""
    if config.get(shrunk.KEY) is None or shrunk.manifest_in(config) is not None:
        return None
    found = config[shrunk.KEY]
    return str((found.get("quant_method") if isinstance(found, dict) else None) or "an unnamed method")


def fused(names: Iterable[str], network: nn.Module) -> dict[str, str]:
    """Names of tensors that are diffusers' fused projections and that the network, as it is, would not read.

    Returns:
        For each, the dotted name of its attention.
    """
    known = dict(network.named_parameters())
    hits = ((name, _FUSED.fullmatch(name)) for name in names if name not in known)
    return {name: hit[1] for name, hit in hits if hit}


@torch.no_grad()
def unfuse_into(network: nn.Module, files: Iterable[Path], names: Mapping[str, str]) -> None:
    """Gives a network's separate projections what its files hold of them fused, in place.

    `fuse_qkv_projections` leaves the separate ones in the file as they were, so that they may be older.

    Args:
        network: as diffusers loaded it, from the separate ones.
        files: its weights.
        names: as `fused` finds them.

    Raises:
        CompressorError: if one has not the rows and columns of the projections that it stands for.
    """
    for file in files:
        with safe_open(file, "pt") as tensors:
            for name in sorted(names.keys() & set(tensors.keys())):
                _take_apart(network, name, tensors.get_tensor(name), file)


def _take_apart(network: nn.Module, name: str, whole: Tensor, file: Path) -> None:
    hit = _FUSED.fullmatch(name)
    assert hit is not None
    attention, projection, kind = hit.groups()
    owners = [network.get_submodule(f"{attention}.{part}") for part in FUSED[projection]]
    parts = [getattr(owner, kind) for owner in owners]
    shape = [sum(len(part) for part in parts), *parts[0].shape[1:]]
    if list(whole.shape) != shape:
        raise CompressorError(
            f"{file}: {name}: should have the shape {shape}, as {', '.join(FUSED[projection])} together, "
            f"found {list(whole.shape)}"
        )
    for owner, part, rows in zip(owners, parts, whole.split([len(part) for part in parts]), strict=True):
        setattr(owner, kind, nn.Parameter(rows.to(part.dtype).clone(), requires_grad=False))


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CompressorError: if there is none.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CompressorError(f"{file}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CompressorError(f"{file}: not readable as JSON: {error}") from None
    if not isinstance(found, dict):
        raise CompressorError(f"{file}: should hold a JSON object, found {type(found).__name__}")
    return found


_FUSE_IT = (
    "fuse it into the weights where it was attached: pipe.fuse_lora(), pipe.unload_lora_weights(), "
    "pipe.save_pretrained(FOLDER); and prune that folder"
)


def _refuse_adapter(file: Path, names: Iterable[str]) -> None:
    adapter = sorted(name for name in names if _ADAPTER.search(name))
    if adapter:
        raise CompressorError(
            f"{file}: refused: a LoRA or another adapter is still attached, {len(adapter)} of its tensors, first "
            f"{adapter[0]}; {_FUSE_IT}"
        )


def _of_variant(variant: str | None) -> str:
    return f" of variant '{variant}'" if variant else ""
