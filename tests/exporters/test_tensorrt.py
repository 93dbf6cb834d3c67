"""The exporter `tensorrt`: real builds with TensorRT-RTX, which need no GPU, and every message that it has."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
import torch
from compressor_tensorrt import TensorRT, builder
from compressor_tensorrt.profiles import Profile, Range
from onnx import TensorProto, helper
from pydantic import ValidationError

from compressor import registry
from compressor.errors import CompressorError
from compressor.measure import Stopwatch
from compressor.onnx_files import pieces
from compressor.pipeline import open_folder
from compressor.plan import plan
from compressor.prepare import prepare
from compressor.recipe import Model, Recipe
from compressor.report import read
from compressor.run import run
from compressor.structure import find_groups, find_targets, remove
from compressor.units import size
from tests import tiny
from tests.exporters import networks

pytestmark = pytest.mark.usefixtures("traced_once")
rtx = pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="TensorRT-RTX is not installed")
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="what happens without a GPU")

SMALL = {
    "batch": {"min": 1, "opt": 2, "max": 4},
    "height": {"min": 64, "opt": 64, "max": 128},
    "width": 64,
    "sequence": 24,
}


def shrink(pipeline: Any) -> Any:
    """The same pipeline with one head and a quarter of the neurons fewer in every group."""
    for group in find_groups(pipeline.module, pipeline.family):
        remove(group, range(1 if group.kind == "heads" else group.count // 4))
    return networks.pipeline_of(pipeline.module)


def export(pipeline: Any, folder: Path, **options: Any) -> SimpleNamespace:
    """What an export writes, its checks as they come out of report.json, and the build log."""
    before = {name: tensor.clone() for name, tensor in pipeline.module.state_dict().items()}
    done = TensorRT.model_validate({"runtime": "tensorrt_rtx", "profiles": [SMALL], **options}).export(pipeline, folder)
    assert all(torch.equal(tensor, before[name]) for name, tensor in pipeline.module.state_dict().items())
    component = pipeline.component_name
    checks = json.loads(json.dumps(done.checks))
    assert checks.pop("runtime").startswith("TensorRT-RTX ")
    log = (folder / component / "build.log").read_text(encoding="utf-8")
    return SimpleNamespace(files=[str(file) for file in done.files], checks=checks[component], log=log, folder=folder)


@rtx
@pytest.mark.parametrize(
    ("make", "how"),
    [  # each family in one way, and each way at least once; the rest takes minutes
        ("sd3_medium", "2:4"),
        ("sd3_medium", "shrunk"),
        ("flux_dev", "1:4"),  # as in test_onnx.py, and the next likewise
        ("sdxl", "2:4"),
        pytest.param("flux_dev", "shrunk", marks=pytest.mark.slow),
        pytest.param("sdxl", "shrunk", marks=pytest.mark.slow),
    ],
)
def test_every_family_is_built_sparse_and_shrunk(make: str, how: str, tmp_path: Path) -> None:
    pipeline = networks.pipeline_of(getattr(networks, make)())
    pipeline = shrink(pipeline) if how == "shrunk" else networks.prune(pipeline, int(how[0]))
    out = export(pipeline, tmp_path)
    component = pipeline.component_name
    assert out.files == [f"{component}/{name}" for name in ("build.log", "config.json", "model.engine")]
    assert (tmp_path / component / "model.engine").stat().st_size > 100_000
    assert sorted(path.name for path in (tmp_path / component).iterdir()) == [
        "build.log",
        "config.json",
        "model.engine",
    ]
    assert str(tmp_path) not in out.log  # nor a folder of this machine
    assert str(tmp_path).encode() not in (tmp_path / component / "model.engine").read_bytes()
    checks = out.checks
    assert checks["dtype"] == "float16"
    assert all(0 < entry["relative_l2"] <= 1e-2 for entry in checks["numeric"])
    assert checks["mapped"] == checks["targets"] == len(find_targets(pipeline.module, pipeline.family, adaln=True))
    assert checks["profiles"] == [{"batch": "1..2..4", "height": "64..64..128", "width": "64", "sequence": "24"}]
    assert checks["layers"] > 10
    if not torch.cuda.is_available():
        assert checks["engine"] == "not run: no CUDA device here"
    assert checks["log"] == {"eligible": "says nothing of sparsity", "chosen": "says nothing of sparsity"}
    if how == "shrunk":
        assert checks["sparse"] == {}
        return
    assert set(checks["sparse"]) == {target.name for target in pipeline.targets}
    for target in pipeline.targets:
        facts = checks["sparse"][target.name]
        assert facts["shape"] == f"{target.outputs} x {target.inputs}"
        assert (facts["pattern"], facts["holds"]) == (how, True)
        assert facts["eligible"] is facts["chosen"] is facts["sparse_weights"] is None  # not said by TensorRT-RTX
        assert facts["layer"], f"{target.name} is in no layer of the engine"
    query = next(name for name in checks["sparse"] if name.endswith("to_q"))
    assert query in checks["sparse"][query]["layer"]  # the engine speaks torch's names


@rtx
def test_a_disk_that_is_too_small_is_told_before_anything_is_written(monkeypatch, tmp_path):
    pipeline = networks.pipeline_of(networks.sd3_medium())
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=10_000))
    with pytest.raises(CompressorError) as error:
        TensorRT(runtime="tensorrt_rtx").export(pipeline, tmp_path)
    assert str(error.value) == (
        f"engines and the largest ONNX file need {size(TensorRT(runtime='tensorrt_rtx').space(pipeline))} "
        f"on the disk of {tmp_path}, found 10.0 kB free; nothing was written"
    )
    assert not list(tmp_path.iterdir())


@rtx
def test_bfloat16_is_built_and_not_compared_by_onnxruntime(tmp_path: Path) -> None:
    pipeline = networks.prune(networks.pipeline_of(networks.sd3_medium()))
    out = export(pipeline, tmp_path, dtype="bfloat16")
    assert out.checks["dtype"] == "bfloat16"
    assert out.checks["numeric"] == "not compared: onnxruntime's CPU provider takes no bfloat16"
    assert all(facts["holds"] for facts in out.checks["sparse"].values())
    assert len(out.checks["sparse"]) == len(pipeline.targets)
    assert "Datatype: BFloat16" in out.log
    assert "Datatype: Half" not in out.log


@rtx
@pytest.mark.parametrize(
    ("make", "dtype", "used", "absent"),
    [
        (networks.sd2_flat, "float32", "Float", "Half"),
        pytest.param(networks.flux_dev, "bfloat16", "BFloat16", "Half", marks=pytest.mark.slow),
    ],
    ids=["sd2", "flux_dev"],
)
def test_a_dense_network_is_built_in_the_types_of_its_file(make, dtype, used, absent, tmp_path: Path) -> None:
    pipeline = networks.pipeline_of(make())
    out = export(pipeline, tmp_path, dtype=dtype)
    assert out.checks["dtype"] == dtype
    assert out.checks["mapped"] == out.checks["targets"] >= len(pipeline.targets)
    assert out.checks["sparse"] == {}
    assert out.checks["layers"] > 10
    assert re.search(rf"Datatype: {used}\b", out.log)
    assert not re.search(rf"Datatype: {absent}\b", out.log)


@rtx
def test_options_reach_the_builder_and_every_profile_is_in_the_engine(tmp_path: Path) -> None:
    out = export(
        networks.prune(networks.pipeline_of(networks.sd3_medium())),
        tmp_path,
        profiles=[SMALL, {**SMALL, "batch": 1, "height": 128, "width": 128}],
        weight_streaming=True,
        workspace="1GiB",
        sparse_weights=False,
        compute_capabilities=["8.6", 8.9],
    )
    assert len(out.checks["profiles"]) == 2
    (line,) = [line for line in out.log.splitlines() if line.startswith(" Name: hidden_states, IOMode: Input")]
    assert line.count("OptShape") == 2
    assert "OptShape: [2,4,8,8]" in line
    assert "OptShape: [1,4,16,16]" in line


@rtx
def test_text_encoders_and_the_decoder_are_built(tmp_path: Path) -> None:
    loaded = tiny.load("flux")
    names = ("text_encoder", "text_encoder_2", "vae_decoder")
    done = TensorRT(runtime="tensorrt_rtx", components=names).export(loaded, tmp_path)
    assert [str(f) for f in done.files if f.name == "model.engine"] == [f"{name}/model.engine" for name in names]
    assert {name: done.checks[name]["profiles"][0].get("sequence") for name in names} == {
        "text_encoder": "16",  # all that CLIP takes
        "text_encoder_2": "512",
        "vae_decoder": None,
    }
    assert done.checks["vae_decoder"]["dtype"] == "float32"  # force_upcast
    assert done.checks["text_encoder"]["sparse"] == {}


@rtx
def test_a_run_exports_and_its_report_tells_each_sparse_layer(tmp_path: Path) -> None:
    pipe = tiny.load("sd3").pipe
    pipe.transformer = networks.sd3_medium()  # made 2:4, it is that of the tests above
    pipe.save_pretrained(tmp_path / "model")
    recipe = Recipe.model_validate(
        {
            "model": str(tmp_path / "model"),
            "prune": [{"magnitude": {"granularity": {"n_m": {"keep": 2, "of": 4}}}}],
            "report": {"images": 0},
            "export": [{"tensorrt": {"runtime": "tensorrt_rtx", "components": ["transformer"]}}],
            "output": str(tmp_path / "out"),
        }
    )
    output = run(recipe, tiny.quiet())
    (told,) = read(output / "report.json").exports
    assert "tensorrt/transformer/model.engine" in told.files
    taken = sum(file.stat().st_size for file in (output / "tensorrt").rglob("*") if file.is_file())
    assert taken <= recipe.export[0].space(networks.pipeline_of(pipe.transformer)) < 3 * taken
    sparse = told.checks["transformer"]["sparse"]
    assert all(facts["holds"] and facts["layer"] for facts in sparse.values())
    page = (output / "report.html").read_text(encoding="utf-8")
    assert "transformer, sparse, transformer_blocks.0.attn.to_q, layer" in page


@rtx
def test_a_failed_build_is_one_error_in_the_builders_words(tmp_path: Path) -> None:
    with pytest.raises(CompressorError) as error:
        export(networks.prune(networks.pipeline_of(networks.sd3_medium())), tmp_path, workspace=1024)
    message = str(error.value)
    assert message.startswith("transformer: TensorRT-RTX ")
    assert " cannot build the engine: " in message
    assert "no tactics to implement the operation within workspace limit" in message
    assert "\n" not in message


def model_of(*operators: str) -> onnx.ModelProto:
    names = ["x", *(f"y{i}" for i in range(len(operators)))]
    nodes = [helper.make_node(op, [names[i]], [names[i + 1]], name=f"node_{op}") for i, op in enumerate(operators)]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4]) for name in (names[0], names[-1])]
    return helper.make_model(helper.make_graph(nodes, "g", ends[:1], ends[1:]))


SHAPES = {"x": ((1, 4), (2, 4), (3, 4))}


def build(folder: Path, model: onnx.ModelProto | bytes, shapes: Any = SHAPES, **settings: Any) -> tuple[Any, str]:
    file = folder / "model.onnx"
    file.write_bytes(model if isinstance(model, bytes) else model.SerializeToString())
    with (folder / "log").open("w", encoding="utf-8") as stream:
        trt = builder.load("tensorrt_rtx")
        data = builder.build(trt, file, [shapes], builder.Settings(**settings), {}, builder.Log(stream), "unet")
    return data, (folder / "log").read_text(encoding="utf-8")


@rtx
def test_a_failed_parse_is_one_error_in_the_parsers_words(tmp_path: Path) -> None:
    with pytest.raises(CompressorError) as error:
        build(tmp_path, model_of("Relu", "Unheard"))
    message = str(error.value)
    assert message.startswith("unet: TensorRT-RTX ")
    assert " cannot parse the ONNX file: " in message
    assert message.endswith("(node node_Unheard, Unheard)")
    assert "\n" not in message
    with pytest.raises(CompressorError, match=r"cannot parse the ONNX file: .*Failed to parse the ONNX model\.$"):
        build(tmp_path, b"nonsense")


@rtx
def test_a_profile_that_the_builder_does_not_take_is_told(tmp_path: Path) -> None:
    with pytest.raises(
        CompressorError, match=r"cannot build the engine: .*Dimension mismatch for tensor x and profile 0"
    ):
        build(tmp_path, model_of("Relu"), {"x": ((1, 5), (2, 5), (3, 5))})


@rtx
def test_two_builds_in_one_process_keep_their_logs_apart(tmp_path: Path) -> None:
    _, first = build(tmp_path, model_of("Relu"))
    _, second = build(tmp_path, model_of("Sigmoid"))
    assert "node_Relu" in first
    assert "node_Sigmoid" not in first
    assert "node_Sigmoid" in second
    assert "node_Relu" not in second
    assert builder.listener(builder.load("tensorrt_rtx")).log_to is None


@rtx
def test_sparse_weights_change_nothing_in_tensorrt_rtx(tmp_path: Path) -> None:
    """Once this fails, docs/tensorrt.md and docs/recipes.md say something that is no longer true."""
    weight_KN = torch.randn(64, 64)
    weight_KN.view(16, 4, 64)[:, :2] = 0
    constant = helper.make_tensor("w", TensorProto.FLOAT, (64, 64), weight_KN.flatten().tolist())
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 64]) for name in ("x", "y")]
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="node_linear")
    model = helper.make_model(helper.make_graph([node], "g", ends[:1], ends[1:], [constant]))
    shapes = {"x": ((8, 64), (64, 64), (64, 64))}
    on, log = build(tmp_path, model, shapes, sparse_weights=True)
    off, _ = build(tmp_path, model, shapes, sparse_weights=False)
    assert "Sparsity" not in log
    assert bytes(on) == bytes(off)


@rtx
@no_gpu
def test_an_engine_that_cannot_be_loaded_is_told_in_the_runtimes_words(tmp_path: Path) -> None:
    from compressor_tensorrt import engine

    data, _ = build(tmp_path, model_of("Relu"))
    with (tmp_path / "log").open("w", encoding="utf-8") as stream, pytest.raises(CompressorError) as error:
        engine.load(builder.load("tensorrt_rtx"), data, builder.Log(stream), "unet")
    assert str(error.value).startswith("unet: TensorRT-RTX ")
    assert " cannot load the engine here: " in str(error.value)
    assert "CUDA" in str(error.value)


@rtx
@no_gpu
def test_an_engine_for_other_gpus_than_this_is_no_error_of_tensorrt_rtx(monkeypatch, tmp_path):
    """Such as one built on an H200, which TensorRT-RTX does not run on. Here no GPU at all stands for it."""
    monkeypatch.setattr("compressor_tensorrt.has_gpu", lambda: True)
    pipeline = networks.prune(networks.pipeline_of(networks.sd3_medium()))
    out = export(pipeline, tmp_path)
    assert out.checks["engine"].startswith("not run: transformer: TensorRT-RTX ")
    assert " cannot load the engine here: " in out.checks["engine"]
    exporter = TensorRT.model_validate({"runtime": "tensorrt_rtx", "profiles": [SMALL]})
    assert exporter.verify(pipeline, tmp_path) == {}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("runtime", ["tensorrt", "tensorrt_rtx"])
def test_an_engine_on_the_gpu_computes_what_torch_computes(runtime: str, tmp_path: Path) -> None:
    """Never run so far: see docs/tensorrt.md."""
    pytest.importorskip(runtime)
    pipeline = networks.prune(networks.pipeline_of(networks.sd3_medium()))
    out = export(pipeline, tmp_path, runtime=runtime)
    assert 0 < out.checks["engine"]["numeric"][0]["relative_l2"] <= 1e-2
    again = TensorRT.model_validate({"runtime": runtime, "profiles": [SMALL]}).verify(pipeline, tmp_path)
    assert again["transformer"] == out.checks["engine"]


def test_an_engines_outputs_are_held_against_torchs() -> None:
    from compressor_tensorrt.engine import compare

    right = {"y": torch.tensor([3.0, 4.0])}
    assert compare({"y": torch.tensor([3.0, 4.5])}, right, 0.2, "unet") == pytest.approx(0.1)
    with pytest.raises(CompressorError) as error:
        compare({"y": torch.tensor([3.0, 4.5])}, right, 0.01, "unet")
    assert str(error.value) == (
        "unet: the engine differs from torch in y by a relative L2 of 1.00e-01; should be at most 1e-02"
    )
    with pytest.raises(CompressorError) as error:
        compare({"y": torch.tensor([3.0, float("nan")])}, right, 0.01, "unet")
    assert str(error.value) == "unet: y is not finite, in torch it is; export with dtype bfloat16 or float32"
    with pytest.raises(CompressorError) as error:
        compare({"y": torch.zeros(3)}, right, 0.01, "unet")
    assert str(error.value) == "unet: y has the shape (3,), should have (2,) as in torch"


class Cache:
    def serialize(self) -> bytes:
        return b"times"


def stand_in(made: Any, taken: bool) -> tuple[Any, SimpleNamespace]:
    """As much of TensorRT as a timing cache takes."""
    config = SimpleNamespace(
        asked=[],
        create_timing_cache=lambda data: config.asked.append(data) or made,
        set_timing_cache=lambda cache, ignore_mismatch: config.asked.append(ignore_mismatch) or taken,
    )
    verbosity = SimpleNamespace(DETAILED="detailed")
    return SimpleNamespace(__name__="tensorrt", __version__="11.4", ProfilingVerbosity=verbosity), config


def test_a_timing_cache_is_read_if_it_is_there(tmp_path: Path) -> None:
    file = tmp_path / "times"
    settings = builder.Settings(sparse_weights=False, timing_cache=file)
    trt, config = stand_in(Cache(), True)
    builder._configure(trt, config, settings, "unet")
    file.write_bytes(b"old times")
    builder._configure(trt, config, settings, "unet")
    assert config.asked == [b"", False, b"old times", False]
    for made, taken in ((None, True), (Cache(), False)):
        trt, config = stand_in(made, taken)
        with pytest.raises(CompressorError) as error:
            builder._configure(trt, config, settings, "unet")
        assert str(error.value) == (
            f"unet: timing_cache {file} was not written by TensorRT 11.4 on this GPU; remove it, or name another file"
        )


def test_a_failure_without_words_says_why_there_are_none() -> None:
    assert builder._join([]) == (
        "it gave no reason; another library of this process may have taken its place as the logger"
    )
    assert builder._join(["a", "b", "a"]) == "a; b"


def test_a_runtime_that_cannot_be_imported_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "broken_runtime.py").write_text("raise OSError('libnvinfer.so.11: cannot open shared object file')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(CompressorError) as error:
        builder.load("broken_runtime")
    assert str(error.value) == (
        "broken_runtime is installed and cannot be imported: libnvinfer.so.11: cannot open shared object file"
    )


INSTALLED = {"tensorrt", "tensorrt_rtx", "onnx", "onnxruntime", "onnxscript"}


@pytest.mark.parametrize(
    ("runtime", "missing", "message"),
    [
        ("tensorrt", {"tensorrt"}, "tensorrt: the runtime tensorrt is not installed; pip install tensorrt"),
        (
            "tensorrt_rtx",
            {"tensorrt_rtx"},
            'tensorrt: the runtime tensorrt_rtx is not installed; pip install "diffusion-compressor[tensorrt-rtx]"',
        ),
        (
            "tensorrt_rtx",
            {"onnx", "onnxscript"},
            'tensorrt needs onnx, onnxscript; pip install "diffusion-compressor[onnx]"',
        ),
        (
            "tensorrt",
            set(),
            "tensorrt: the runtime tensorrt builds on a GPU, and this machine has no NVIDIA driver; "
            "choose runtime tensorrt_rtx, or export on the machine that will run the engine",
        ),
        ("tensorrt_rtx", set(), None),
    ],
)
def test_what_is_not_installed_is_named_with_how_to_install_it(runtime, missing, message, monkeypatch, tmp_path):
    monkeypatch.setattr("compressor_tensorrt.find_spec", lambda name: name in INSTALLED - missing or None)
    monkeypatch.setattr("compressor_tensorrt.has_driver", lambda: False)
    exporter = TensorRT(runtime=runtime)
    assert exporter.available() == message
    if message is not None:
        with pytest.raises(CompressorError) as error:
            exporter.export(networks.pipeline_of(networks.sd3_medium()), tmp_path)
        assert str(error.value) == message


def recipe_of(kind: str, output: Path, **options: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "model": str(tiny.folder(kind)),
            "prune": [{"magnitude": {"sparsity": 0.5}}],
            "report": {"images": 0},
            "export": [{"tensorrt": {"runtime": "tensorrt_rtx", **options}}],
            "output": str(output),
        }
    )


def test_a_runtime_that_is_not_installed_is_told_before_the_model_is_loaded(monkeypatch, tmp_path):
    monkeypatch.setattr("compressor_tensorrt.find_spec", lambda name: name != "tensorrt_rtx" or None)
    with pytest.raises(CompressorError) as error:
        prepare(recipe_of("sd3", tmp_path / "out"), tmp_path / "out", Stopwatch(), tiny.quiet())
    assert str(error.value) == (
        "export[0]: tensorrt: the runtime tensorrt_rtx is not installed; "
        'pip install "diffusion-compressor[tensorrt-rtx]"'
    )


@pytest.mark.parametrize(
    ("kind", "profile", "message"),
    [
        ("sd3", {"height": 18}, "profiles[0].height: should be a multiple of 4 pixels, found 18"),
        (
            "sd3",
            {"width": {"min": 16, "opt": 16, "max": 22}},
            "profiles[0].width: should be a multiple of 4 pixels, found 22",
        ),
        ("sd3", {"height": 4096}, "profiles[0].height: should be at most "),
        ("flux", {"height": 18}, "profiles[0].height: should be a multiple of 4 pixels, found 18"),
        ("sdxl", {"width": 18}, "profiles[0].width: should be a multiple of 8 pixels, found 18"),
    ],
)
def test_a_size_that_the_model_cannot_draw_is_refused_by_plan_and_run(kind, profile, message, tmp_path):
    recipe = recipe_of(kind, tmp_path / "out", profiles=[profile])
    with pytest.raises(CompressorError) as error:
        plan(recipe)
    assert str(error.value).startswith(f"export[0].tensorrt.{message}")
    with pytest.raises(CompressorError) as error:
        prepare(recipe, tmp_path / "out", Stopwatch(), tiny.quiet())
    assert str(error.value).startswith(f"export[0].tensorrt.{message}")
    assert not (tmp_path / "out").exists()


def test_a_component_that_the_model_does_not_have_is_refused():
    folder = open_folder(Model(source=str(tiny.folder("sd3"))))
    TensorRT(components=("transformer", "vae_decoder")).check(folder)
    with pytest.raises(CompressorError) as error:
        TensorRT(components=("transformer", "unet")).check(folder)
    assert str(error.value).startswith("components: no 'unet' to export: StableDiffusion3Pipeline has scheduler, ")


def test_a_plan_needs_no_runtime(monkeypatch, tmp_path):
    monkeypatch.setattr("compressor_tensorrt.find_spec", lambda name: None)
    plan(recipe_of("sd3", tmp_path / "out", compute_capabilities=["8.6"], profiles=[{"batch": 2}]))


@rtx
def test_a_compute_capability_that_the_runtime_does_not_know_is_refused():
    folder = open_folder(Model(source=str(tiny.folder("sd3"))))
    TensorRT(runtime="tensorrt_rtx", compute_capabilities=("8.0", "12.0")).check(folder)
    with pytest.raises(CompressorError) as error:
        TensorRT(runtime="tensorrt_rtx", compute_capabilities=("9.0",)).check(folder)
    message = str(error.value)
    assert message.startswith("compute_capabilities: TensorRT-RTX ")
    assert " does not build for compute capability 9.0; it knows 7.5, 8.0, 8.6, 8.9, 12.0" in message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"profiles": [{"batch": {"min": 2, "opt": 1, "max": 4}}]},
            "opt should be within min..max, found 1 and 2..4",
        ),
        (
            {"profiles": [{"height": {"min": 512, "opt": 2048, "max": 1024}}]},
            "opt should be within min..max, found 2048 and 512..1024",
        ),
        ({"profiles": [{"batch": 0}]}, "greater than or equal to 1"),
        ({"profiles": [{"batch": True}]}, "valid dictionary or instance of Range"),
        ({"profiles": [{"heigth": 512}]}, "unknown key; did you mean 'height'?"),
        ({"runtime": "tensorrt_trx"}, "should be 'tensorrt' or 'tensorrt_rtx'"),
        ({"components": []}, "at least 1 item"),
        ({"components": ["vae"]}, "should be 'transformer', "),
        ({"workspace": "much"}, "should be a size such as 8GiB or 500MB"),
        (
            {"compute_capabilities": ["8.6"]},
            "compute_capabilities has no effect: tensorrt builds for the GPU of this machine; remove it, "
            "or choose runtime tensorrt_rtx",
        ),
        (
            {"runtime": "tensorrt_rtx", "timing_cache": "times"},
            "timing_cache has no effect: tensorrt_rtx does not time kernels when it builds; remove it",
        ),
        (
            {"runtime": "tensorrt_rtx", "version_compatible": True},
            "version_compatible is not to be had of tensorrt_rtx, only of tensorrt; remove it",
        ),
    ],
)
def test_options_without_a_meaning_are_refused(options, message):
    with pytest.raises(ValidationError) as error:
        TensorRT.model_validate(options)
    assert message in str(error.value)


def test_a_range_is_a_number_or_three():
    assert Range.model_validate(4) == Range(min=4, opt=4, max=4)
    assert str(Range.model_validate(4)) == "4"
    assert str(Range(min=1, opt=2, max=4)) == "1..2..4"
    assert TensorRT(runtime="tensorrt_rtx").profiles == ()


def test_a_profile_takes_what_it_is_not_told_from_the_model():
    folder = open_folder(Model(source=str(tiny.folder("sd3"))))
    whole = Profile(width=Range.model_validate(8)).complete(folder)
    assert (str(whole.batch), str(whole.height), str(whole.width)) == ("1..2..2", str(folder.default_size), "8")
    assert whole.sequence == Range.model_validate(folder.text_tokens())


def test_the_shapes_of_a_profile_are_those_of_the_inputs():
    pipeline = networks.pipeline_of(networks.sdxl())
    piece = pieces.network(pipeline)
    profile = Profile.model_validate(SMALL)
    assert profile.shapes(piece, pipeline.folder) == {
        "sample": ((1, 4, 8, 8), (2, 4, 8, 8), (4, 4, 16, 8)),
        "timestep": ((), (), ()),
        "encoder_hidden_states": ((1, 24, 24), (2, 24, 24), (4, 24, 24)),
        "text_embeds": ((1, 40), (2, 40), (4, 40)),
        "time_ids": ((1, 6), (2, 6), (4, 6)),
    }
    assert profile.usual(piece, pipeline.folder) == pieces.Shape(2, 8, 8, 24)


def test_encoders_and_decoder_take_one_sample_even_where_the_network_is_guided():
    loaded = tiny.load("flux")
    found, _ = pieces.find(loaded, ["text_encoder", "text_encoder_2", "vae_decoder", "transformer"])
    profile = Profile.model_validate({"batch": {"min": 2, "opt": 2, "max": 4}}).complete(loaded.folder)
    assert {piece.name: profile.describe(piece, loaded.folder)["batch"] for piece in found} == {
        "transformer": "2..2..4",
        "text_encoder": "1..2..4",
        "text_encoder_2": "1..2..4",
        "vae_decoder": "1..2..4",
    }


def test_it_is_found_by_its_entry_point():
    assert registry.load("exporter", "tensorrt") is TensorRT


def test_its_options_are_read_without_importing_torch_or_tensorrt():
    script = (
        "import sys, compressor_tensorrt as c; c.TensorRT(runtime='tensorrt_rtx').available(); "
        "print([m for m in ('torch', 'numpy', 'onnx', 'tensorrt', 'tensorrt_rtx') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
