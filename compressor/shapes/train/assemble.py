"""Writes what was trained: a diffusers folder in half precision, the judge, and the hashes of weights."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from safetensors.torch import save_file

from compressor.shapes.judge import Judge


def save(pipeline: DiffusionPipeline, folder: Path) -> None:
    """Writes a diffusers folder; converts the given pipeline to float16."""
    pipeline.to(dtype=torch.float16)
    pipeline.save_pretrained(folder, safe_serialization=True)
    for config in folder.glob("*/*config.json"):
        settings = json.loads(config.read_text(encoding="utf-8"))
        for name in ("_name_or_path", "is_local", "local_files_only"):  # where a part came from is nobody's business
            settings.pop(name, None)
        if config.parent.name.startswith("text_encoder"):
            settings["dtype"] = "float32"  # what transformers takes if none is asked for; diffusers takes float32 too
        config.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def save_judge(judge: Judge, accuracy: dict[str, dict[str, float]], folder: Path) -> None:
    """Writes `judge.safetensors` and `judge.json`."""
    weights = {name: tensor.cpu().contiguous() for name, tensor in judge.state_dict().items()}
    save_file(weights, folder / "judge.safetensors")
    text = json.dumps({"accuracy_on_fresh_scenes": accuracy}, indent=2)
    (folder / "judge.json").write_text(text + "\n", encoding="utf-8")


def write_hashes(folder: Path) -> None:
    """Writes `hashes.json`: the built-in pipelines by name, and the sha256 of every weights file by its path."""
    files = [*sorted(folder.glob("pipeline*/**/*.safetensors")), *folder.glob("judge.safetensors")]
    pipelines = {path.name.replace("pipeline", "shapes"): path.name for path in sorted(folder.glob("pipeline*"))}
    sha256 = {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    text = json.dumps({"pipelines": pipelines, "sha256": sha256}, indent=2)
    (folder / "hashes.json").write_text(text + "\n", encoding="utf-8")
