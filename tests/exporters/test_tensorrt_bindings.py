"""Every name of TensorRT that the exporter uses is there, and takes what it is given: in 10, in 11 and in TensorRT-RTX.

TensorRT itself cannot be installed everywhere, its Python bindings can. They were made for libraries that are missing
then; empty ones stand in for those, so that the module is imported and tells its classes and signatures, and no more.

    pip download --no-deps -d wheels 'tensorrt-cu12-bindings==10.*' && unzip -d trt10 wheels/tensorrt_cu12_bindings*
    pip download --no-deps -d wheels 'tensorrt-cu13-bindings==11.*' && unzip -d trt11 wheels/tensorrt_cu13_bindings*
    TENSORRT_BINDINGS=trt10:trt11 python -m pytest tests/exporters/test_tensorrt_bindings.py
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent.parent / "exporters" / "compressor_tensorrt"

CLASSES = {
    "builder.py": {
        "builder": "Builder",
        "network": "INetworkDefinition",
        "parser": "OnnxParser",
        "config": "IBuilderConfig",
        "profile": "IOptimizationProfile",
        "layer": "ILayer",
        "tensor": "ITensor",
        "cache": "ITimingCache",
        "error": "ParserError",
    },
    "engine.py": {
        "runtime": "Runtime",
        "engine": "ICudaEngine",
        "context": "IExecutionContext",
        "inspector": "EngineInspector",
    },
}
"""What the variables of each file hold, by name."""

ONLY_RTX = {
    "ComputeCapability.__members__",
    "IBuilderConfig.num_compute_capabilities",
    "IBuilderConfig.set_compute_capability",
}

LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")
SYMBOLS = (
    *("createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL"),
    *("createNvOnnxParserRefitter_INTERNAL", "createNvOnnxParser_INTERNAL", "getBuilderPluginRegistry"),
    *("getNvOnnxParserVersion", "getPluginRegistry", "initLibNvInferPlugins"),
)
"""The functions that the bindings take from those libraries."""

TELL = """
import functools, importlib, json, sys
module, names = sys.argv[1], json.load(sys.stdin)
trt = importlib.import_module(module)
def tell(name):
    try:
        found = functools.reduce(getattr, name.split("."), trt)
    except AttributeError:
        return None
    doc = found.__init__.__doc__ if isinstance(found, type) else getattr(found, "__doc__", None)
    return {"doc": doc or "", "settable": getattr(found, "fset", None) is not None}
print(json.dumps({"version": trt.__version__, "names": {name: tell(name) for name in names}}))
"""


@dataclass(frozen=True)
class Use:
    """One use of a name: `how` is `call`, `set` or `get`; a call has so many positional arguments, and keywords."""

    where: str
    name: str
    how: str
    arguments: int = 0
    keywords: tuple[str, ...] = ()


def uses() -> list[Use]:
    """Every use of TensorRT's names in the exporter's source."""
    found = []
    for file, classes in CLASSES.items():
        tree = ast.parse((SOURCE / file).read_text(encoding="utf-8"))
        inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        calls = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
        for node in ast.walk(tree):
            if not isinstance(node, ast.Attribute) or id(node) in inner or (name := _dotted(node, classes)) is None:
                continue
            where = f"{file}:{node.lineno}: {ast.unparse(node)}"
            if (call := calls.get(id(node))) is not None:
                keywords = tuple(str(keyword.arg) for keyword in call.keywords)
                itself = name.endswith(".__init__")  # the base class's, called with self
                found.append(Use(where, name, "call", len(call.args) - itself, keywords))
            else:
                found.append(Use(where, name, "set" if isinstance(node.ctx, ast.Store) else "get"))
    return found


def _dotted(node: ast.AST, classes: dict[str, str]) -> str | None:
    """The name below the module, of `trt.A.b` as of `builder.b`; None for anything else."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.insert(0, node.attr)
        node = node.value
    if isinstance(node, ast.Name) and node.id == "trt":
        return None if parts[0].startswith("__") else ".".join(parts)
    if isinstance(node, ast.Name) and node.id in classes and len(parts) == 1:
        return f"{classes[node.id]}.{parts[0]}"
    return None


def folders() -> dict[str, Path]:
    """The unpacked bindings that TENSORRT_BINDINGS names, by major version."""
    found = {}
    for folder in filter(None, os.environ.get("TENSORRT_BINDINGS", "").split(os.pathsep)):
        text = (Path(folder) / "tensorrt_bindings" / "__init__.py").read_text(encoding="utf-8")
        version = re.search(r'^__version__ = "(\d+)\.', text, re.MULTILINE)
        assert version, folder
        found[version[1]] = Path(folder).resolve()
    return found


def ask(module: str, path: Path | None, libraries: Path | None) -> dict:
    """What a fresh interpreter finds of the names in use."""
    environment = dict(os.environ)
    if path is not None:
        environment |= {"PYTHONPATH": str(path), "LD_LIBRARY_PATH": str(libraries)}
    names = json.dumps(sorted({use.name for use in uses()}))
    done = subprocess.run(
        [sys.executable, "-c", TELL, module], input=names, capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def empty_libraries(folder: Path, major: str) -> Path:
    """Libraries that have the functions' names and do nothing."""
    source = folder / "empty.c"
    source.write_text("".join(f"void* {symbol}(void) {{ return 0; }}\n" for symbol in SYMBOLS))
    for library in LIBRARIES:
        name = f"lib{library}.so.{major}"
        command = ["gcc", "-shared", "-fPIC", "-o", str(folder / name), str(source), f"-Wl,-soname,{name}"]
        subprocess.run(command, check=True)
    return folder


def problems(answer: dict, absent: set[str]) -> list[str]:
    """What is not there, or does not take what it is given."""
    wrong = []
    for use in uses():
        told = answer["names"][use.name]
        if use.name in absent:
            if told is not None:
                wrong.append(f"{use.name} is there after all")
        elif told is None:
            wrong.append(f"{use.where}: there is no {use.name}")
        elif use.how == "set" and not told["settable"]:
            wrong.append(f"{use.where}: {use.name} cannot be set")
        elif use.how == "call" and not takes(told["doc"], use):
            wrong.append(f"{use.where}: {use.arguments} arguments and {use.keywords} for {told['doc'][:300]}")
    return wrong


def takes(doc: str, use: Use) -> bool:
    """Whether one of the signatures in a docstring takes a call."""
    for match in re.finditer(r"^(?:\d+\. )?\w+\((.*)\)(?: -> .*)?$", doc, re.MULTILINE):
        bare = re.sub(r"\[[^\[\]]*\]", "", re.sub(r"\[[^\[\]]*\]", "", match[1]))
        arguments = [part.strip() for part in bare.split(", ") if part.strip() and not part.startswith("self")]
        names = [argument.partition(":")[0] for argument in arguments]
        required = [name for name, text in zip(names, arguments, strict=True) if " = " not in text]
        given = {*names[: use.arguments], *use.keywords}
        if use.arguments <= len(names) and set(use.keywords) <= set(names) and set(required) <= given:
            return True
    return False


def test_what_is_looked_for_is_what_the_exporter_uses():
    found = {use.name: use for use in uses()}
    assert {"Builder", "Builder.create_network", "OnnxParser.parse_from_file", "IBuilderConfig.set_flag"} <= set(found)
    assert {"BuilderFlag.SPARSE_WEIGHTS", "NetworkDefinitionCreationFlag.STRONGLY_TYPED"} <= set(found)
    assert {"EngineInspector.get_engine_information", "IExecutionContext.execute_async_v3", "ParserError.desc"} <= set(
        found
    )
    assert found["IOptimizationProfile.set_shape"].arguments == 4
    assert found["IBuilderConfig.set_timing_cache"].keywords == ("ignore_mismatch",)
    assert found["IBuilderConfig.profiling_verbosity"].how == "set"
    assert set(found) >= ONLY_RTX


def test_a_call_is_held_against_the_signatures():
    doc = "set_shape(self: trt.IOptimizationProfile, input: str, min: trt.Dims, opt: int = 3) -> None\n\n    Words."
    assert takes(doc, Use("", "", "call", 2))
    assert takes(doc, Use("", "", "call", 1, ("min", "opt")))
    assert not takes(doc, Use("", "", "call", 1))
    assert not takes(doc, Use("", "", "call", 4))
    assert not takes(doc, Use("", "", "call", 2, ("max",)))


@pytest.mark.parametrize("major", ["10", "11"])
def test_tensorrt_has_every_name_in_use(major, tmp_path):
    if major not in folders():
        pytest.skip(f"the bindings of TensorRT {major} are not here; this file says how to get them")
    if shutil.which("gcc") is None:
        pytest.skip("no gcc to make empty libraries with")
    answer = ask("tensorrt_bindings", folders()[major], empty_libraries(tmp_path, major))
    assert answer["version"].startswith(f"{major}.")
    assert problems(answer, ONLY_RTX) == []


def test_tensorrt_rtx_has_every_name_in_use():
    if find_spec("tensorrt_rtx") is None:
        pytest.skip('TensorRT-RTX is not here; pip install "diffusion-compressor[tensorrt-rtx]"')
    assert problems(ask("tensorrt_rtx", None, None), set()) == []
