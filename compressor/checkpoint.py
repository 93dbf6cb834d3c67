"""Saves a pruned pipeline as a diffusers folder that proves what it is, and loads it back. Nothing is unpickled."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn
from torch.func import functional_call

from compressor import pipeline as pipelines
from compressor import shrunk
from compressor.errors import CompressorError
from compressor.output import RECORD, replacing
from compressor.pipeline import Pipeline
from compressor.recipe import Model
from compressor.units import several, size

FORMAT = 1


def check_space(pipeline: Pipeline, output: Path, exports: Mapping[str, int]) -> None:
    """Makes sure, before any slow work is done, that the disk has room for the result and its exports.

    Args:
        pipeline: as it is before the pruning.
        output: where the result goes; an earlier one there is removed before the exports begin.
        exports: about how many bytes each will take, by name.

    Raises:
        CompressorError: with what is needed and what is free.
    """
    sizes: dict[int, int] = {}  # by address, for a tensor that is shared is written once
    for component in pipeline.stored:
        for name, tensor in getattr(pipeline.pipe, component).state_dict().items():
            dtype = _stored_dtype(pipeline, component, name) if tensor.is_floating_point() else tensor.dtype
            sizes[tensor.data_ptr()] = tensor.numel() * dtype.itemsize
    result, free = sum(sizes.values()), shutil.disk_usage(output.resolve().parent).free
    earlier = sum(file.stat().st_size for file in output.rglob("*") if file.is_file() and not file.is_symlink())
    needed = max(result, result + sum(exports.values()) - earlier)
    if needed > free:
        parts = ", ".join(f"{name} {size(number)}" for name, number in {"the result": result, **exports}.items())
        raise CompressorError(
            f"output: {output} needs {size(needed)} on its disk ({parts}), found {size(free)} free; nothing was begun"
        )


@torch.no_grad()
def round_to_stored(pipeline: Pipeline) -> None:
    """Rounds the network's weights to the dtype that they will be saved in: what is measured is what is saved."""
    for name, tensor in pipeline.module.state_dict().items():
        tensor.copy_(tensor.to(_stored_dtype(pipeline, pipeline.component_name, name)))


def save(pipeline: Pipeline, output: Path, record: dict[str, Any]) -> None:
    """Writes the whole pipeline beside `output`, proves that it reloads, and only then puts it in its place.

    Args:
        pipeline: every component goes back to the dtype of its source (or the computing dtype, if that is smaller).
        output: replaced as a whole; left as it was if anything fails.
        record: plain data for `compression.json`; the hash of every file is added.

    Raises:
        CompressorError: if the disk is full or not writable, or the saved network does not compute the same bits.
    """
    output = output.resolve()
    with replacing(output) as beside:
        try:
            _write(pipeline, beside)
            hashes = {str(f.relative_to(beside)): sha256(f) for f in sorted(beside.rglob("*")) if f.is_file()}
            text = json.dumps({"format": FORMAT, **record, "files": hashes}, indent=2, ensure_ascii=False)
            (beside / RECORD).write_text(text + "\n", encoding="utf-8")
        except Exception as error:
            if not _is_io(error):
                raise
            kept = f"; the earlier result in {output} is intact" if output.exists() else ""
            raise CompressorError(f"the result cannot be written to {output}: {error}{kept}") from error
        _prove(pipeline, beside)


def load(folder: str | Path, device: str = "auto", dtype: str = "auto") -> Pipeline:
    """Loads a result of this toolkit, after checking every file against its recorded hash.

    Args:
        folder: as written by `save`.
        device: `auto`, `cpu`, `cuda`, ...
        dtype: `auto` (float32 on a CPU, as stored elsewhere), `float32`, `float16` or `bfloat16`.

    Raises:
        CompressorError: if it is no such folder, or a file is missing, damaged or changed.
    """
    verify(Path(folder))
    return pipelines.load(Model.model_validate({"source": str(folder), "dtype": dtype}), device)


def verify(folder: Path) -> dict[str, Any]:
    """Checks a result's files against their hashes and returns its record.

    Raises:
        CompressorError: naming the first file that is missing or differs.
    """
    file = folder / RECORD
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        files, version = record["files"].items(), record["format"]
    except FileNotFoundError:
        raise CompressorError(f"{folder}: should be a result of `compressor run`, found no {RECORD}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CompressorError(f"{file}: damaged: {error}") from None
    if version != FORMAT:
        raise CompressorError(f"{file}: should be of format {FORMAT}, found {version}; update the package")
    root = folder.resolve()
    for name, expected in files:
        path = (root / name.replace("\0", "?")).resolve()
        if root not in path.parents:
            raise CompressorError(f"{file}: names a file outside its folder: {name}")
        if not path.is_file():
            raise CompressorError(f"{folder / name}: missing; {RECORD} lists it")
        found = sha256(path)
        if found != expected:
            raise CompressorError(f"{folder / name}: damaged or changed: should have sha256 {expected}, found {found}")
    return record


def sha256(file: Path) -> str:
    """The hash of a file's contents, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _stored_dtype(pipeline: Pipeline, component: str, tensor: str) -> torch.dtype:
    stored = pipeline.stored[component]
    dtype = stored.get(tensor) or max(set(stored.values()), key=list(stored.values()).count)
    return dtype if dtype.itemsize <= pipeline.dtype.itemsize else pipeline.dtype


def _write(pipeline: Pipeline, folder: Path) -> None:
    undo = [_cast_to_stored(pipeline, name) for name in pipeline.stored]
    try:
        pipeline.pipe.save_pretrained(folder, safe_serialization=True)
    finally:
        for back in undo:
            back()
    for file in folder.rglob("*config.json"):
        _forget_origin(file)
    config = folder / pipeline.component_name / "config.json"
    shrunk.write(shrunk.describe(pipeline.module, pipeline.family), config)
    _forget_origin(folder / "model_index.json")


def _cast_to_stored(pipeline: Pipeline, name: str) -> Callable[[], None]:
    """Casts a component's tensors one by one; returns what casts them back."""
    module: nn.Module = getattr(pipeline.pipe, name)
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    before = {key: tensor.dtype for key, tensor in tensors.items() if tensor.is_floating_point()}
    for key in before:
        tensors[key].data = tensors[key].data.to(_stored_dtype(pipeline, name, key))

    def back() -> None:
        for key, dtype in before.items():
            tensors[key].data = tensors[key].data.to(dtype)

    return back


def _forget_origin(file: Path) -> None:
    """Removes the path that diffusers and transformers note of where a component came from."""
    config = json.loads(file.read_text(encoding="utf-8"))
    if "_name_or_path" in config:
        del config["_name_or_path"]
        file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@torch.no_grad()
def _prove(pipeline: Pipeline, folder: Path) -> None:
    """Reloads the saved network and compares its tensors, and one forward, bit by bit.

    The reloaded network computes with the tensors in memory, once they are known to be the same: how a CPU rounds may
    depend on where in memory a tensor begins.
    """
    path = folder / pipeline.component_name
    saved = shrunk.load(path, sorted(path.glob("*.safetensors")), pipeline.family, pipeline.dtype)
    if saved is None:
        cls = getattr(diffusers, pipeline.family.component_class)
        saved = cls.from_pretrained(path, use_safetensors=True, dtype=pipeline.dtype)
    saved = saved.to(pipeline.device).eval()
    inputs = pipeline.example_inputs()
    here, there = _tensors(pipeline.module), _tensors(saved)
    differing = [name for name in dict.fromkeys((*here, *there)) if not _same(here.get(name), there.get(name))]
    if differing:
        raise CompressorError(
            f"the saved {pipeline.component_name} does not reload as it was: it differs in "
            f"{several(len(differing), 'tensor')}, {differing[0]} first; nothing was kept"
        )
    expected = pipeline.module(**inputs, return_dict=False)[0]
    found = functional_call(saved, here, kwargs={**inputs, "return_dict": False})[0]
    if not torch.equal(expected, found):
        difference = (expected.float() - found.float()).abs().max().item()
        raise CompressorError(
            f"the saved {pipeline.component_name} does not reload as it was: one forward differs by up to "
            f"{difference:g}; nothing was kept"
        )
    if not torch.isfinite(expected).all():
        raise CompressorError(
            f"the pruned {pipeline.component_name} gives values that are not finite; compute in float32 or bfloat16 "
            "(model.dtype), or prune less; nothing was kept"
        )


def _tensors(network: nn.Module) -> dict[str, Tensor]:
    return dict((*network.named_parameters(), *network.named_buffers()))


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is not None and other is not None and one.dtype == other.dtype and torch.equal(one, other)


def _is_io(error: Exception) -> bool:
    return isinstance(error, OSError) or "I/O error" in str(error) or "No space left" in str(error)
