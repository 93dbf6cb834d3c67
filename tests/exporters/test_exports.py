"""A whole pipeline, shrunk, as a folder of ONNX files: drawn with, verified, and edited afterwards."""

import json
import math
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import click.testing
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import yaml
from compressor_onnx import ONNX
from onnx import numpy_helper

from compressor import checkpoint, exported, recipe
from compressor import run as running
from compressor.cli import main
from compressor.errors import CompressorError
from compressor.onnx_files import check, runtime
from tests import tiny
from tests.exporters import networks

pytestmark = pytest.mark.usefixtures("traced_once")
SHRINK = {"granularity": {"structured": {"heads": 0.5, "neurons": 0.5, "multiple": 1, "keep_first": 0, "keep_last": 0}}}
DRAW = ("--prompt", "a red dog", "--prompt", "a cat", "--steps", "3", "--height", "16", "--width", "16")
DRAWN = 90.0
"""PSNR in dB, onnxruntime to torch, that float32 must reach; 133 and more were measured over all families."""


def make(kind: str, folder: Path, *, shrink: bool = True, **options: Any) -> Path:
    """The result of a run with an ONNX export in it."""
    pruner = {"l1_norm": SHRINK} if shrink else {"magnitude": {"granularity": {"n_m": {"keep": 2, "of": 4}}}}
    data = {
        "model": str(tiny.folder(kind)),
        "prune": [pruner],
        "report": {"images": 0},
        "export": [{"onnx": options}],
        "output": str(folder / "out"),
    }
    (folder / "r.yaml").write_text(yaml.safe_dump(data))
    return running.run(recipe.load(str(folder / "r.yaml")), tiny.quiet())


@pytest.fixture(scope="module")
def result(tmp_path_factory) -> Path:
    """SD3 in small, half its heads and neurons removed. Not to be changed."""
    return make("sd3", tmp_path_factory.mktemp("shrunk"))


@pytest.fixture
def copy(result, tmp_path) -> Path:
    """The same, to be changed."""
    return Path(shutil.copytree(result, tmp_path / "out"))


def call(*arguments: object) -> click.testing.Result:
    found = click.testing.CliRunner().invoke(main, [str(argument) for argument in arguments])
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        raise found.exception
    return found


def draw(pipe: Any) -> np.ndarray:
    noise = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    more = {"max_sequence_length": 16} if type(pipe).__name__ == "FluxPipeline" else {}
    prompts = ["a red dog", "a cat"]
    return pipe(
        prompts,
        num_inference_steps=3,
        guidance_scale=3.0,
        height=16,
        width=16,
        generator=noise,
        output_type="np",
        **more,
    ).images


def psnr(found: np.ndarray, expected: np.ndarray) -> float:
    assert expected.std() > 0.05, "should show something"
    error = float(((found.astype(np.float64) - expected) ** 2).mean())
    return math.inf if error == 0 else -10 * math.log10(error)


def test_the_folder_is_what_optimum_onnx_reads(result):
    export = result / "onnx"
    index = json.loads((export / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusion3Pipeline"
    assert index["vae"] == ["diffusers", "AutoencoderKL"]
    assert index["tokenizer"] == ["transformers", "CLIPTokenizerFast"]  # which transformers 4 knows as well
    names = ("transformer", "text_encoder", "text_encoder_2", "vae_encoder", "vae_decoder")
    assert sorted(file.parent.name for file in export.glob("*/model.onnx")) == sorted(names)
    assert all((export / name / "config.json").is_file() for name in names)
    assert (export / "scheduler" / "scheduler_config.json").is_file()
    assert (export / "tokenizer_2" / "tokenizer.json").is_file()
    shrunk = onnx.load(export / "transformer" / "model.onnx")
    sizes = [math.prod(tensor.dims) for tensor in shrunk.graph.initializer]
    dense = sum(weight.numel() for weight in tiny.load("sd3").module.parameters())
    assert sum(sizes) < 0.9 * dense


def test_the_manifest_says_what_was_written(result):
    manifest = json.loads((result / "onnx" / "export.json").read_text())
    assert manifest["exporter"] == "onnx"
    assert manifest["options"]["dtype"] == "float32"
    assert manifest["source"] == {"compression.json": checkpoint.sha256(result / "compression.json")}
    assert {"torch", "onnx", "onnxruntime"} < set(manifest["versions"])
    on_disk = {str(file.relative_to(result / "onnx")) for file in (result / "onnx").rglob("*") if file.is_file()}
    assert set(manifest["files"]) == on_disk - {"export.json"}
    file = result / "onnx" / "transformer" / "model.onnx"
    assert manifest["files"]["transformer/model.onnx"] == {
        "bytes": file.stat().st_size,
        "sha256": checkpoint.sha256(file),
    }
    checks = manifest["checks"]["transformer"]
    assert checks["inputs"]["timestep"] == {"dtype": "float32", "shape": ["batch"]}
    assert checks["outputs"] == {"out_hidden_states": {"dtype": "float32", "shape": ["batch", 4, "height", "width"]}}
    assert checks["opset"] == {entry.domain: entry.version for entry in onnx.load(file).opset_import}[""]
    assert checks["tolerance"] == 2e-5
    assert len(checks["numeric"]) == 2


def test_the_room_that_an_export_asks_for_is_what_it_takes(result):
    taken = sum(file.stat().st_size for file in (result / "onnx").glob("*/model.onnx"))
    asked = ONNX().space(checkpoint.load(result, "cpu"))
    assert taken <= asked < 2 * taken  # tiny: more names than weights


def test_onnxruntime_draws_what_torch_draws(result):
    expected = draw(checkpoint.load(result, "cpu").pipe)
    assert psnr(draw(runtime.load(result / "onnx", result).pipe), expected) > DRAWN


def test_an_export_by_itself_draws_the_same(result, tmp_path):
    alone = Path(shutil.copytree(result / "onnx", tmp_path / "alone"))
    assert np.array_equal(draw(runtime.load(alone, None).pipe), draw(runtime.load(result / "onnx", result).pipe))
    found = call("generate", alone, "--runtime", "onnxruntime", *DRAW, "--out", tmp_path / "images")
    assert found.exit_code == 0, found.output
    assert sorted(file.name for file in (tmp_path / "images").iterdir()) == ["0000.png", "0001.png"]
    assert call("verify", alone).stdout == (
        f"{alone}: 16 files as exported\n{alone}: not compared with torch: no compression.json around it\n"
    )


def test_what_the_export_has_no_file_for_is_taken_from_the_result(copy):
    expected = draw(runtime.load(copy / "onnx", copy).pipe)
    shutil.rmtree(copy / "onnx" / "vae_decoder")
    shutil.rmtree(copy / "onnx" / "text_encoder_2")
    mixed = runtime.load(copy / "onnx", copy).pipe
    assert type(mixed.vae).__name__ == "AutoencoderKL"
    assert psnr(draw(mixed), expected) > DRAWN
    with pytest.raises(CompressorError) as error:
        runtime.load(copy / "onnx", None)
    assert str(error.value) in {
        f"{copy / 'onnx'}: no {file}/model.onnx, and no torch pipeline around it to take the {component} from"
        for file, component in (("vae_decoder", "vae"), ("text_encoder_2", "text_encoder_2"))
    }


def test_verify_holds_every_file_against_its_hash_and_torch(result):
    lines = call("verify", result).stdout.splitlines()
    assert lines[:2] == [f"{result}: 14 files as saved", f"{result / 'onnx'}: 16 files as exported"]
    names = ("transformer", "text_encoder", "text_encoder_2", "vae_encoder", "vae_decoder")
    for name, line in zip(names, lines[2:], strict=True):
        assert line.startswith(f"{result / 'onnx' / name}: within ")
        assert line.endswith("of torch, should be at most 2e-05")


def edit(file: Path) -> None:
    """One weight made larger."""
    model = onnx.load(file)
    tensor = next(t for t in model.graph.initializer if len(t.dims) == 2 and t.data_type == onnx.TensorProto.FLOAT)
    array = numpy_helper.to_array(tensor).copy()
    array.reshape(-1)[0] += 1
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    onnx.save(model, file)


@pytest.mark.parametrize("command", [("verify",), ("generate", "--runtime", "onnxruntime", *DRAW)])
def test_a_file_that_was_edited_after_the_export_is_named(copy, command):
    file = copy / "onnx" / "text_encoder" / "model.onnx"
    before = checkpoint.sha256(file)
    edit(file)
    found = call(command[0], copy, *command[1:])
    assert found.exit_code == 1
    assert found.stderr == (
        f"error: {file}: changed after the export: should have sha256 {before}, found {checkpoint.sha256(file)}\n"
    )


def test_a_file_that_was_edited_with_its_hash_is_found_by_what_it_computes(copy):
    file = copy / "onnx" / "transformer" / "model.onnx"
    edit(file)
    manifest = json.loads((copy / "onnx" / "export.json").read_text())
    manifest["files"]["transformer/model.onnx"]["sha256"] = checkpoint.sha256(file)
    (copy / "onnx" / "export.json").write_text(json.dumps(manifest))
    found = call("verify", copy)
    assert found.exit_code == 1
    said = f"error: {copy / 'onnx'}: transformer/model.onnx: onnxruntime differs from torch by a relative L2 of "
    assert found.stderr.startswith(said)


def noted(export: Path) -> dict[str, Any]:
    return json.loads((export / "export.json").read_text())


def rewrite(export: Path, **changes: Any) -> None:
    (export / "export.json").write_text(json.dumps(noted(export) | changes))


def forget_size(export: Path) -> None:
    files = noted(export)["files"]
    files["model_index.json"]["bytes"] += 1
    rewrite(export, files=files)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda export: (export / "scheduler" / "scheduler_config.json").unlink(), "missing; export.json lists it"),
        (lambda export: (export / "export.json").write_text("{"), "export.json: damaged: JSONDecodeError("),
        (
            lambda export: (export / "export.json").write_text('{"format": 1}'),
            "export.json: damaged: KeyError('files')",
        ),
        (lambda export: rewrite(export, format=9), "should be of format 1, found 9; update the package"),
        (
            lambda export: rewrite(export, files={"../r": {"bytes": 0, "sha256": ""}}),
            "names a file outside its folder: ../r",
        ),
        (lambda export: rewrite(export, source={"compression.json": "0"}), "found 0; export again"),
        (lambda export: rewrite(export, exporter="onxn"), "no exporter named 'onxn'; did you mean 'onnx'?"),
        (
            lambda export: rewrite(export, options={"tolerance": -1}),
            "export.json: damaged: options.tolerance: Input should be greater than 0",
        ),
        (
            lambda export: (export / "export.json").unlink(),
            "onnx/export.json: missing, so that nothing in ",
        ),
        (
            lambda export: (export / "vae_decoder" / "model.onnx.data").touch(),
            "onnx/vae_decoder/model.onnx.data: was not there when export.json was written; put it elsewhere",
        ),
        (
            lambda export: (export.parent / "vae" / "pytorch_model.bin").touch(),
            "out/vae/pytorch_model.bin: was not there when compression.json was written; put it elsewhere",
        ),
        (
            lambda export: shutil.copytree(export, export.parent / "more"),
            "out/more/export.json: was not there when compression.json was written; put it elsewhere",
        ),
        (
            lambda export: (export.parent / "compression.json").unlink(),
            "out: should be a result of `compressor run`, found no compression.json",
        ),
        (
            lambda export: rewrite(export, options=noted(export)["options"] | {"tolerance": 9.0}),
            "onnx/export.json: options.tolerance should be null as in compression.json, found 9.0",
        ),
        (
            lambda export: rewrite(export, exporter="tensorrt", options={}),
            "onnx/export.json: the recipe in compression.json has no export with tensorrt",
        ),
        (forget_size, "onnx/export.json: files.model_index.json.bytes should be "),
    ],
)
def test_what_is_wrong_with_an_export_is_told(copy, change, message):
    change(copy / "onnx")
    found = call("verify", copy)
    assert found.exit_code == 1
    assert message in found.stderr


def test_notes_and_hidden_files_may_lie_in_a_verified_folder(copy, tmp_path):
    alone = Path(shutil.copytree(copy / "onnx", tmp_path / "alone"))
    (alone / "README.md").touch()
    (alone / ".cache").mkdir()
    (alone / ".cache" / "download").touch()
    assert call("verify", alone).exit_code == 0


def test_an_export_that_cannot_be_run_here_is_verified_by_its_hashes_and_says_so(copy, monkeypatch):
    monkeypatch.setattr(ONNX, "verify", lambda _self, _pipeline, _folder: {})
    export = copy / "onnx"
    assert call("verify", copy).stdout.splitlines()[1:] == [
        f"{export}: 16 files as exported",
        f"{export}: not compared with torch: onnx has nothing that it could run here",
    ]


def test_what_the_manifest_says_of_a_file_is_held_against_the_file(copy):
    checks = json.loads((copy / "onnx" / "export.json").read_text())["checks"]
    opset = checks["text_encoder"]["opset"]
    checks["text_encoder"]["opset"] = 99
    rewrite(copy / "onnx", checks=checks)
    found = call("verify", copy)
    assert found.exit_code == 1
    said = f"checks.text_encoder.opset should be {opset} as in the file, found 99"
    assert found.stderr == f"error: {copy / 'onnx' / 'export.json'}: {said}\n"


def test_verify_of_a_folder_that_is_neither_says_what_it_should_be(tmp_path):
    assert call("verify", tmp_path).stderr == (
        f"error: {tmp_path}: should be a result of `compressor run`, found no compression.json\n"
    )


def test_generate_without_an_export_says_how_to_have_one(copy):
    shutil.rmtree(copy / "onnx")
    assert call("generate", copy, "--runtime", "onnxruntime", *DRAW).stderr == (
        f"error: {copy}: should hold an ONNX export, found no export.json of one; add `export: [onnx]` to the recipe\n"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--device", "mps"), "--device: should be cpu or cuda with --runtime onnxruntime, found mps"),
        (("--device", "cuda:a"), "--device: should be cpu or cuda with --runtime onnxruntime, found cuda:a"),
        (
            ("--device", "cuda:1"),
            f"--device: cuda:1 needs an onnxruntime with CUDAExecutionProvider, which {onnxruntime.__version__} as "
            "installed lacks; pip uninstall onnxruntime, then pip install onnxruntime-gpu",
        ),
        (("--height", "18"), "--height: should be a multiple of 4 pixels, found 18"),
        (("--width", "13"), "--width: should be a multiple of 4 pixels, found 13"),
    ],
)
def test_what_onnxruntime_cannot_draw_is_told(result, options, message):
    found = call("generate", result, "--runtime", "onnxruntime", *DRAW, *options)
    assert found.exit_code == 1
    assert found.stderr == f"error: {message}\n"


def with_cuda(monkeypatch: pytest.MonkeyPatch, *, starts: bool) -> list[Any]:
    """onnxruntime from now on as where it has CUDA, but for the arithmetic, which its CPU provider does.

    Returns:
        The providers that each session is asked for.
    """
    asked: list[Any] = []
    found = ["CUDAExecutionProvider", "CPUExecutionProvider"]

    class Session(onnxruntime.InferenceSession):
        def __init__(self, file: Path, options: Any, providers: list[Any]) -> None:
            asked.append(providers)
            super().__init__(file, options, providers=["CPUExecutionProvider"])

        def get_providers(self) -> list[str]:
            return found if starts else found[1:]

    monkeypatch.setattr(check.onnxruntime, "get_available_providers", lambda: found)
    monkeypatch.setattr(check.onnxruntime, "InferenceSession", Session)
    return asked


@pytest.mark.parametrize(
    ("device", "number"), [("auto", None), ("cpu", None), ("cuda", 0), ("cuda:0", 0), ("cuda:12", 12)]
)
def test_every_file_is_given_to_the_provider_of_the_device_asked_for(result, tmp_path, monkeypatch, device, number):
    asked = with_cuda(monkeypatch, starts=True)
    found = call("generate", result, "--runtime", "onnxruntime", *DRAW, "--device", device, "--out", tmp_path)
    assert found.exit_code == 0, found.output
    wanted: list[Any] = ["CPUExecutionProvider"]
    if number is not None:
        wanted = [("CUDAExecutionProvider", {"device_id": number}), *wanted]
    assert asked == [wanted] * len(list((result / "onnx").glob("*/model.onnx")))
    assert len(list(tmp_path.glob("*.png"))) == 2


def test_a_cuda_provider_that_does_not_start_is_told(result, monkeypatch):
    with_cuda(monkeypatch, starts=False)
    found = call("generate", result, "--runtime", "onnxruntime", *DRAW, "--device", "cuda")
    assert found.exit_code == 1
    label, _, message = found.stderr.removeprefix("error: ").partition(": ")
    assert label in {f"{name.parent.name}/model.onnx" for name in (result / "onnx").glob("*/model.onnx")}
    assert message == (
        f"onnxruntime {onnxruntime.__version__} could not start CUDAExecutionProvider on cuda; "
        "it needs the CUDA and cuDNN that it was built for, and a driver for them\n"
    )


@pytest.mark.filterwarnings("ignore:Specified provider 'CUDAExecutionProvider':UserWarning")
def test_an_onnxruntime_that_falls_back_to_the_cpu_by_itself_is_noticed(result, monkeypatch):
    monkeypatch.setattr(check.onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    with pytest.raises(CompressorError, match="could not start CUDAExecutionProvider on cuda;"):
        check.load(result / "onnx" / "text_encoder" / "model.onnx", "text_encoder/model.onnx", "cuda")


def test_onnxruntime_that_is_not_installed_is_told_with_how_to_install_it(result, monkeypatch):
    monkeypatch.setattr("compressor.exported.find_spec", lambda _: None)
    assert call("generate", result, "--runtime", "onnxruntime", *DRAW).stderr == (
        'error: --runtime onnxruntime needs onnxruntime; pip install "diffusion-compressor[onnx]"\n'
    )


def test_what_a_pipeline_and_a_file_do_not_share_is_told(result):
    pipe = runtime.load(result / "onnx", result).pipe
    ids = torch.ones(1, 4, dtype=torch.int64)
    with pytest.raises(CompressorError) as error:
        pipe.text_encoder(ids, attention_mask=torch.tensor([[1, 1, 1, 0]]))
    assert str(error.value) == (
        "text_encoder/model.onnx: takes no attention_mask, which this pipeline gives; draw with torch"
    )
    with pytest.raises(CompressorError) as error:
        pipe.transformer(hidden_states=torch.ones(1, 4, 8, 8), timestep=torch.ones(1), return_dict=False)
    assert str(error.value) == (
        "transformer/model.onnx: takes encoder_hidden_states, pooled_projections, which this pipeline does not give"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"components": ["transformer", "text_encoder_3"]},
            "components: no 'text_encoder_3' to export: StableDiffusion3Pipeline has "
            "scheduler, text_encoder, text_encoder_2, tokenizer, tokenizer_2, transformer, vae",
        ),
        ({"height": 7}, "height: should be a multiple of 2 latents, at least 4, found 7"),
        ({"width": 2}, "width: should be a multiple of 2 latents, at least 4, found 2"),
    ],
)
@pytest.mark.parametrize("command", ["plan", "run"])
def test_a_recipe_that_does_not_suit_the_model_is_refused_before_anything_is_pruned(
    tmp_path, monkeypatch, command, options, message
):
    monkeypatch.chdir(tmp_path)
    data = {
        "model": str(tiny.folder("sd3")),
        "prune": [{"magnitude": {"sparsity": 0.5}}],
        "report": {"images": 0},
        "export": [{"onnx": options}],
    }
    Path("r.yaml").write_text(yaml.safe_dump(data | {"output": "out"}))
    found = call(command, "r.yaml")
    assert found.exit_code == 1
    assert found.stderr.endswith(f"error: export[0].onnx.{message}\n")
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"dtype": "bfloat16"},
            r"dtype: onnxruntime's CPU provider, which proves every file, takes no bfloat16; choose float16 or float32",
        ),
        (
            {"opset": 40},
            r"opset: should be 18 to \d\d, which onnxscript \S+ and onnxruntime \S+ know, found 40; "
            r"torch's own default if left out",
        ),
    ],
)
@pytest.mark.parametrize("command", ["check", "plan", "run"])
def test_what_no_model_could_be_exported_as_is_told_with_the_recipes_line(
    tmp_path, monkeypatch, command, options, message
):
    monkeypatch.chdir(tmp_path)
    data = {"model": "no/such", "prune": [], "export": [{"onnx": options}], "output": "out"}
    Path("r.yaml").write_text(yaml.safe_dump(data))
    assert re.fullmatch(rf"error: r\.yaml:3: export\[0\]\.onnx\.{message}\n", call(command, "r.yaml").stderr)


def test_an_export_is_found_in_a_result_and_by_itself(result):
    assert list(exported.find(result)) == [(result / "onnx", result.resolve())]
    assert list(exported.find(result / "onnx", "onnx")) == [(result / "onnx", result.resolve())]
    assert list(exported.find(result, "tensorrt")) == []


UNET = {"onnx": {"components": ["unet"]}}


def test_a_pipeline_that_is_not_pruned_is_exported_and_drawn_with(tmp_path):
    pipe = tiny.load("sd2").pipe
    pipe.unet = networks.sd2_flat()
    source = tmp_path / "model"
    pipe.save_pretrained(source)
    data = {"model": str(source), "prune": [], "export": [UNET], "output": str(tmp_path / "out")}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(data))
    planned = call("plan", tmp_path / "r.yaml")
    assert planned.exit_code == 0
    assert "warning" not in planned.stdout
    out = running.run(recipe.load(str(tmp_path / "r.yaml")), tiny.quiet())
    expected = draw(pipe)
    assert psnr(draw(runtime.load(out / "onnx", out).pipe), expected) > DRAWN
    said = json.loads((out / "report.json").read_text())
    assert said["layers"] == []
    assert said["sizes"]["before"] == said["sizes"]["after"]
    page = (out / "report.html").read_text()
    assert f"<h1>{source}, not pruned</h1>" in page
    assert "What the zeros buy" not in page


def test_what_cannot_be_compared_without_pruning_is_told(tmp_path):
    data = {"model": str(tiny.folder("sd2")), "prune": [], "export": ["onnx"], "output": str(tmp_path / "out")}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(data | {"report": {"prompts": ["a cat"]}}))
    assert "warning: report has no effect: nothing is pruned, so that there is nothing to compare\n" in (
        call("plan", tmp_path / "r.yaml").stdout
    )
    assert call("compare", tmp_path / "r.yaml").stderr == (
        "error: prune: should have at least one entry to compare, found none\n"
    )


@pytest.fixture(scope="module", params=["sd3", "sd35", "sd2", "sdxl", "flux"])
def of_every_family(request, tmp_path_factory) -> Path:
    return make(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.slow
def test_every_family_is_drawn_by_onnxruntime_as_by_torch(of_every_family):
    expected = draw(checkpoint.load(of_every_family, "cpu").pipe)
    assert psnr(draw(runtime.load(of_every_family / "onnx", None).pipe), expected) > DRAWN


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd3", "sd2", "sdxl", "flux"])
def test_every_family_is_drawn_in_float16_by_onnxruntime_nearly_as_by_torch(kind, tmp_path):
    result = make(kind, tmp_path, shrink=False, dtype="float16")
    expected = draw(checkpoint.load(result, "cpu").pipe)
    assert psnr(draw(runtime.load(result / "onnx", None).pipe), expected) > 30


CLIENT = """
import json, sys
import numpy as np, torch
import optimum.onnxruntime
folder, out = sys.argv[1:]
name = json.load(open(folder + "/model_index.json"))["_class_name"]
pipe = getattr(optimum.onnxruntime, "ORT" + name).from_pretrained(folder)
noise = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
more = {"max_sequence_length": 16} if name == "FluxPipeline" else {}
given = {"num_inference_steps": 3, "guidance_scale": 3.0, "generator": noise, "output_type": "np"}
np.save(out, pipe(["a red dog", "a cat"], height=16, width=16, **given, **more).images)
"""


@pytest.mark.slow
@pytest.mark.skipif("OPTIMUM_PYTHON" not in os.environ, reason="OPTIMUM_PYTHON names no interpreter with optimum-onnx")
def test_optimum_onnx_draws_what_torch_draws(of_every_family, tmp_path):
    """docs/export.md says how to make an environment for it: it needs an older transformers than we do."""
    command = [os.environ["OPTIMUM_PYTHON"], "-c", CLIENT, str(of_every_family / "onnx"), str(tmp_path / "images.npy")]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    expected = draw(checkpoint.load(of_every_family, "cpu").pipe)
    assert psnr(np.load(tmp_path / "images.npy"), expected) > DRAWN
