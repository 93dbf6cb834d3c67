"""What makes a folder of ONNX files a pipeline: the index, tokenizers and the scheduler, as optimum-onnx reads them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compressor.pipeline import Pipeline

_NAMES_IN_BOTH = {
    "CLIPTokenizer": "CLIPTokenizerFast",
    "T5Tokenizer": "T5TokenizerFast",
    "TokenizersBackend": "PreTrainedTokenizerFast",
}
"""transformers 5 saves a tokenizer as `tokenizer.json` alone, which its own class of transformers 4 does not read. That
of the same name with `Fast` does, and in transformers 5 it is another name for the same class."""


def copy_rest(pipeline: Pipeline, folder: Path) -> None:
    """Copies what of a pipeline is no model.

    Args:
        pipeline: loaded from a folder.
        folder: of the export.
    """
    source = pipeline.folder.path
    index = _read(source / "model_index.json")
    for name in pipeline.folder.components:
        if name in pipeline.stored:
            continue
        shutil.copytree(source / name, folder / name)
        if (folder / name / "tokenizer.json").is_file():
            index[name][1] = _NAMES_IN_BOTH.get(index[name][1], index[name][1])
            _rename(folder / name / "tokenizer_config.json")
    _write(index, folder / "model_index.json")


def _rename(file: Path) -> None:
    if not file.is_file():
        return
    config = _read(file)
    if (given := config.get("tokenizer_class")) in _NAMES_IN_BOTH:
        _write(config | {"tokenizer_class": _NAMES_IN_BOTH[given]}, file)


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))


def _write(data: dict[str, Any], file: Path) -> None:
    file.write_text(json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
