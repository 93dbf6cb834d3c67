"""Models are loaded without unpickling, and whatever is wrong with a folder, a hub id or a device is named."""

import json
import pickle
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from safetensors.torch import load_file, save_file
from torch.overrides import TorchFunctionMode

from compressor import pipeline
from compressor.errors import CompressorError
from compressor.recipe import Model
from compressor.structure.groups import FUSED
from tests import tiny

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
CONFIG = "transformer/config.json"
KNOWN = "known: flux (FluxTransformer2DModel), sd3 (SD3Transformer2DModel), unet (UNet2DConditionModel)"


@pytest.fixture
def m(tmp_path, monkeypatch) -> Path:
    """A folder `m` with a tiny SD3 in it, to be spoilt."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny.folder("sd3"), "m")
    return Path("m")


def mistake(device: str = "cpu", **model: Any) -> str:
    with pytest.raises(CompressorError) as caught:
        pipeline.load(Model(**{"source": "m", **model}), device)
    return str(caught.value)


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def reweight(file: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_every_kind_of_pipeline_loads_ready_to_compute(kind):
    found = pipeline.load(Model(source=str(tiny.folder(kind))), "cpu")
    assert found.family.name == tiny.FAMILY[kind]
    assert found.component_name == tiny.NETWORK[kind]
    assert found.dtype == torch.float32
    assert not found.module.training
    assert not any(parameter.requires_grad for parameter in found.module.parameters())


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_the_twin_has_every_shape_and_no_memory(kind):
    folder = pipeline.open_folder(Model(source=str(tiny.folder(kind))))
    real = pipeline.load(Model(source=str(tiny.folder(kind))), "cpu").module
    twin = folder.twin()
    assert {n: p.shape for n, p in twin.named_parameters()} == {n: p.shape for n, p in real.named_parameters()}
    assert all(parameter.is_meta for parameter in twin.parameters())


class Called(TorchFunctionMode):
    """Names of what PyTorch was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called in place of every function of PyTorch."""
        self.names.add(getattr(func, "__name__", ""))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_no_weight_of_a_twin_is_drawn(kind):
    folder = pipeline.open_folder(Model(source=str(tiny.folder(kind))))
    drawing = {"kaiming_uniform_", "uniform_", "normal_"}
    with Called() as called:
        folder.twin()
    assert "empty" in called.names
    assert not drawing & called.names
    with torch.device("meta"), Called() as called:
        torch.nn.Linear(2, 2)  # elsewhere they are
    assert drawing & called.names


def test_the_dtype_asked_for_is_computed_in():
    found = pipeline.load(Model(source=str(tiny.folder("sd3")), dtype="bfloat16"), "cpu")
    assert found.dtype == torch.bfloat16
    assert found.module.dtype == torch.bfloat16
    assert set(found.stored["transformer"].values()) == {torch.float32}


def test_weights_in_several_files_are_read(m):
    network = SD3Transformer2DModel.from_pretrained(m / "transformer")
    (m / WEIGHTS).unlink()
    network.save_pretrained(m / "transformer", max_shard_size="10KB")
    assert len(list((m / "transformer").glob("*.safetensors"))) > 2
    found = pipeline.load(Model(source="m"), "cpu")
    assert set(found.stored["transformer"]) == set(found.module.state_dict())
    sorted((m / "transformer").glob("*.safetensors"))[1].unlink()
    assert mistake().startswith("m: diffusers cannot load this pipeline: m/transformer/ does not appear to have a file")


@pytest.mark.parametrize("name", ["transformer", "text_encoder"])
def test_a_list_of_weight_files_that_names_a_pickle_is_refused(m, name):
    file = next((m / name).glob("*.safetensors"))
    torch.save(load_file(file), m / name / "part.bin")
    file.rename(file.with_name(f"{file.stem}-00001-of-00002.safetensors"))
    for variant in ("", ".fp16"):
        index = file.with_name(f"{file.name}.index{variant}.json")
        index.write_text(json.dumps({"weight_map": {"a.weight": "part.bin"}}))
        assert mistake() == f"{index}: should list .safetensors files only, found part.bin"
        index.unlink()


def test_a_folder_without_an_index_is_no_pipeline(m):
    (m / "model_index.json").unlink()
    assert mistake() == "m: should be a diffusers folder with a model_index.json, found none"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[]", "m/model_index.json: should hold a JSON object, found list"),
        (b"{", "m/model_index.json: not readable as JSON: "),
        (b"\xff\xfe", "m/model_index.json: not readable as JSON: "),
        (b"{}", "m: should have a transformer or a unet, found nothing"),
        (b'{"vae": ["diffusers", "AutoencoderKL"]}', "m: should have a transformer or a unet, found vae"),
    ],
)
def test_an_index_that_makes_no_sense_is_named(m, content, words):
    (m / "model_index.json").write_bytes(content)
    assert mistake().startswith(words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"_class_name": "FooPipeline"}, "has no pipeline class 'FooPipeline'"),
        ({"_class_name": "utils"}, "has no pipeline class 'utils'"),
        ({"_class_name": "AutoencoderKL"}, "has no pipeline class 'AutoencoderKL'"),
        ({"_class_name": ["code", "Evil"]}, "has no pipeline class '['code', 'Evil']'"),
        (
            {"unet": ["diffusers", "UNet2DConditionModel"]},
            "m: model.component should say which to change, transformer or unet",
        ),
        (
            {"transformer": ["diffusers", "FooTransformer"]},
            f"no family knows the network class 'FooTransformer'; {KNOWN}",
        ),
        ({"more": ["diffusers", "More"]}, "m/more: no such folder, though model_index.json lists this component"),
        ({"_class_name": "StableDiffusionXLPipeline"}, "m: diffusers cannot load this pipeline: Pipeline "),
        ({"vae": ["os", "system"]}, "m: diffusers cannot load this pipeline: The component "),
    ],
)
def test_an_index_that_does_not_fit_is_named(m, changes, words):
    edit(m / "model_index.json", **changes)
    assert words in mistake()


def test_code_in_a_folder_is_not_run(m):
    edit(m / "model_index.json", vae=["evil", "Evil"])
    (m / "vae" / "evil.py").write_text("open('ran', 'w')\nclass Evil: pass\n")
    assert mistake().startswith("m: diffusers cannot load this pipeline: ")
    assert not Path("ran").exists()


@pytest.mark.parametrize(
    ("component", "words"),
    [
        (
            "unet",
            "m: the pipeline has no component 'unet'; it has scheduler, text_encoder, text_encoder_2, tokenizer, ",
        ),
        ("text_encoder_3", "m: the pipeline has no component 'text_encoder_3'; it has scheduler, "),
        ("vae", f"no family knows the network class 'AutoencoderKL'; {KNOWN}"),
    ],
)
def test_a_component_that_cannot_be_pruned_is_named(m, component, words):
    assert mistake(component=component).startswith(words)


@pytest.mark.parametrize("name", ["transformer", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_component_whose_folder_is_missing_is_named(m, name):
    shutil.rmtree(m / name)
    assert mistake() in (
        f"m/{name}: no such folder, though model_index.json lists this component",
        "m/transformer/config.json: no such file",
    )


@pytest.mark.parametrize("name", ["transformer", "vae", "text_encoder"])
def test_a_component_without_weights_is_named(m, name):
    for file in (m / name).glob("*.safetensors"):
        file.unlink()
    assert mistake() == f"m/{name}: holds no weights; should hold a .safetensors file"


def test_a_variant_that_is_not_there_is_named(m):
    assert mistake(variant="fp16") == (
        "m/transformer: holds no weights of variant 'fp16'; found diffusion_pytorch_model.safetensors"
    )
    (m / WEIGHTS).rename(m / "transformer" / "diffusion_pytorch_model.fp16.safetensors")
    assert mistake() == "m/transformer: holds no weights; should hold a .safetensors file"


def test_a_variant_that_is_there_is_read(m):
    for file in list(m.rglob("*.safetensors")):
        file.rename(file.with_suffix(".fp16.safetensors"))
    assert pipeline.load(Model(source="m", variant="fp16"), "cpu").stored["transformer"]


@pytest.mark.parametrize("share", [0, 0.001, 0.5, 0.999])
@pytest.mark.parametrize("file", [WEIGHTS, "text_encoder/model.safetensors"])
def test_a_truncated_file_is_named(m, share, file):
    content = (m / file).read_bytes()
    (m / file).write_bytes(content[: int(share * len(content))])
    assert mistake().startswith(f"m/{file}: truncated or damaged safetensors file: ")


def test_weights_that_lack_a_tensor_are_named(m):
    reweight(m / WEIGHTS, lambda tensors: tensors.pop("proj_out.weight"))
    assert mistake() == "m/transformer: its weights lack 1 of its tensors, first proj_out.weight"


def test_weights_of_another_shape_are_named(m):
    reweight(m / WEIGHTS, lambda tensors: tensors.update({"proj_out.weight": torch.zeros(3, 3)}))
    assert mistake().startswith("m: diffusers cannot load this pipeline: Cannot load because proj_out.weight expected")


FUSE_IT = (
    "fuse it into the weights where it was attached: pipe.fuse_lora(), pipe.unload_lora_weights(), "
    "pipe.save_pretrained(FOLDER); and prune that folder"
)


def attach(tensors: dict[str, torch.Tensor], layer: str) -> None:
    """Renames and adds as `save_pretrained` does where a PEFT adapter is attached."""
    for kind in ("weight", "bias"):
        tensors[f"{layer}.base_layer.{kind}"] = tensors.pop(f"{layer}.{kind}")
    rows, columns = tensors[f"{layer}.base_layer.weight"].shape
    tensors[f"{layer}.lora_A.default_0.weight"] = torch.ones(4, columns)
    tensors[f"{layer}.lora_B.default_0.weight"] = torch.zeros(rows, 4)


@pytest.mark.parametrize(
    ("file", "layer"),
    [
        (WEIGHTS, "transformer_blocks.0.attn.to_q"),
        ("text_encoder/model.safetensors", "text_model.encoder.layers.0.self_attn.q_proj"),
    ],
)
def test_an_adapter_that_is_still_attached_is_refused_with_advice(m, file, layer):
    prefix = "" if f"{layer}.weight" in load_file(m / file) else "text_model."
    layer = layer.removeprefix(prefix)
    reweight(m / file, lambda tensors: attach(tensors, layer))
    assert mistake() == (
        f"m/{file}: refused: a LoRA or another adapter is still attached, 4 of its tensors, first "
        f"{layer}.base_layer.bias; {FUSE_IT}"
    )
    assert refusal() == mistake()


def refusal() -> str:
    """What `plan` says, which reads JSON files and the headers of weights."""

    def look() -> None:
        folder = pipeline.open_folder(Model(source="m"), weights=False)
        pipeline.inspect(folder, folder.twin())

    with pytest.raises(CompressorError) as caught:
        look()
    return str(caught.value)


def test_an_adapter_that_a_json_file_tells_of_is_refused_without_weights(m):
    index = m / f"{WEIGHTS}.index.json"
    index.write_text(json.dumps({"weight_map": {"a.lora_B.default.weight": "part.safetensors"}}))
    assert refusal() == (
        f"{index}: refused: a LoRA or another adapter is still attached, 1 of its tensors, first "
        f"a.lora_B.default.weight; {FUSE_IT}"
    )
    index.unlink()
    (m / "text_encoder" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert refusal() == (
        f"m/text_encoder/adapter_config.json: refused: a LORA adapter is attached to this component; {FUSE_IT}"
    )


@pytest.mark.parametrize(
    ("settings", "method"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "torchao"}, "torchao"),
        ({"load_in_8bit": True}, "an unnamed method"),
        ("nonsense", "an unnamed method"),
    ],
)
def test_a_quantised_network_is_refused_with_advice(m, settings, method):
    edit(m / CONFIG, quantization_config=settings)
    assert refusal() == mistake()
    assert mistake() == (
        f"m/{CONFIG}: refused: the transformer is quantised with {method}, and pruning needs its full-precision "
        "weights; prune those, and quantise the result afterwards"
    )


def test_a_quantised_text_encoder_that_does_not_load_is_named(m):
    edit(m / "text_encoder" / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    found = mistake()
    assert found.startswith("m: diffusers cannot load this pipeline: ")
    assert found.endswith(
        "; its text_encoder is quantised with bitsandbytes: install what that needs, or give it in full precision"
    )


@pytest.mark.parametrize(
    ("kind", "attentions"),
    [
        ("sd3", ("transformer_blocks.0.attn", "transformer_blocks.1.attn")),
        (
            "flux",
            ("transformer_blocks.0.attn", "single_transformer_blocks.0.attn", "single_transformer_blocks.1.attn"),
        ),
        (
            "sd2",
            tuple(
                f"{place}.attentions.{i}.transformer_blocks.0.attn{n}"
                for place, count in (("down_blocks.0", 1), ("up_blocks.1", 2), ("mid_block", 1))
                for i in range(count)
                for n in (1, 2)
            ),
        ),
    ],
)
def test_fused_projections_count_and_are_told(kind, attentions, tmp_path):
    """Tuned after fusing, the fused weights differ from the separate ones that lie beside them in the file."""
    pipe = pipeline.load(Model(source=str(tiny.folder(kind))), "cpu").pipe
    name = tiny.NETWORK[kind]
    network = getattr(pipe, name)
    network.fuse_qkv_projections()
    for parameter_name, parameter in network.named_parameters():
        if "qkv" in parameter_name or "to_kv" in parameter_name:
            parameter.data += 0.25
    pipe.save_pretrained(tmp_path / "fused")
    loaded = pipeline.load(Model(source=str(tmp_path / "fused")), "cpu")
    inputs = loaded.family.inputs(network, batch=1, height=8, width=8, sequence=5)
    if kind != "sd3":  # whose fused processor knows no norm of queries and keys
        torch.testing.assert_close(loaded.module(**inputs)[0], network(**inputs)[0])
    for attention in attentions:
        parts, wholes = loaded.module.get_submodule(attention), network.get_submodule(attention)
        for whole, names in FUSED.items():
            if hasattr(wholes, whole):
                together = torch.cat([parts.get_submodule(name).get_parameter("weight") for name in names])
                assert torch.equal(together, wholes.get_submodule(whole).weight)
    assert set(loaded.stored[name]) == set(loaded.module.state_dict())
    (warning,) = loaded.warnings
    assert pipeline.inspect(loaded.folder, loaded.folder.twin()) == (warning,)
    head, _, names = warning.partition(": the fused projections of ")
    counted, _, names = names.partition(" attentions are taken apart, and count, whatever separate ones lie beside ")
    assert (head, counted) == (name, str(len(attentions)))
    assert set(names.removeprefix("them: ").split(", ")) == set(attentions)


def test_many_fused_attentions_are_counted_and_the_first_ones_named(monkeypatch):
    names = tuple(f"blocks.{i}.attn" for i in range(10))
    monkeypatch.setattr(pipeline, "unfuse", lambda network: names)
    assert pipeline.load(Model(source=str(tiny.folder("sd3"))), "cpu").warnings == (
        "transformer: the fused projections of 10 attentions are taken apart, and count, whatever separate ones lie "
        f"beside them: {', '.join(names[:8])} and 2 more",
    )


def test_fused_projections_of_another_shape_are_named(m):
    name = "transformer_blocks.0.attn.to_qkv.weight"
    reweight(m / WEIGHTS, lambda tensors: tensors.update({name: torch.zeros(5, 16)}))
    assert mistake() == (
        f"m/{WEIGHTS}: {name}: should have the shape [48, 16], as to_q, to_k, to_v together, found [5, 16]"
    )


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (open, ("ran", "w"))


@pytest.mark.parametrize(
    ("folder", "name"),
    [("transformer", "diffusion_pytorch_model.bin"), ("text_encoder", "pytorch_model.bin"), ("vae", "model.ckpt")],
)
def test_pickled_weights_are_refused_and_not_opened(m, folder, name):
    for file in (m / folder).glob("*.safetensors"):
        file.unlink()
    (m / folder / name).write_bytes(pickle.dumps(Evil()))
    assert mistake() == (
        f"m/{folder}: refused: its weights are pickled ({name}), and unpickling runs whatever code is in them; "
        "load it where you trust it and save it again with save_pretrained(..., safe_serialization=True)"
    )
    assert not Path("ran").exists()


def test_pickled_weights_beside_safetensors_are_not_opened(m):
    (m / "transformer" / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    assert pipeline.load(Model(source="m"), "cpu")
    assert not Path("ran").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_layers": "two"}, "m: diffusers cannot load this pipeline: "),
        ({"num_layers": 4}, "m: diffusers cannot load this pipeline: Cannot load because "),
        ({"qk_norm": "nonsense"}, "m: diffusers cannot load this pipeline: "),
    ],
)
def test_a_config_that_does_not_fit_is_named(m, changes, words):
    edit(m / CONFIG, **changes)
    assert mistake().startswith(words)


def test_a_config_of_which_no_network_can_be_made_is_named(m):
    edit(m / CONFIG, num_layers="two")
    with pytest.raises(CompressorError) as caught:
        pipeline.open_folder(Model(source="m")).twin()
    assert str(caught.value) == (
        "m/transformer/config.json: diffusers cannot make a SD3Transformer2DModel of it: "
        "'str' object cannot be interpreted as an integer"
    )


@pytest.mark.parametrize(
    ("device", "words"),
    [
        pytest.param(
            "cuda",
            "device: 'cuda' cannot be used: ",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU"),
        ),
        ("cuda:99", "device: 'cuda:99' cannot be used: "),
        ("gpu", "device: 'gpu' cannot be used: Expected one of cpu, cuda, "),
        ("", "device: '' cannot be used: Device string must not be empty"),
        ("meta", "device: 'meta' cannot be used: it computes nothing"),
        ("hpu", "device: 'hpu' cannot be used: "),
    ],
)
def test_a_device_that_is_not_there_is_named(device, words):
    found = mistake(device)
    assert found.startswith(words)
    assert "\n" not in found


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("nothing", "model.source: no folder 'nothing', and it is no hub id of the form org/name"),
        ("./no/where", "model.source: no folder './no/where', and it is no hub id of the form org/name"),
        ("a/b/c", "model.source: no folder 'a/b/c', and it is no hub id of the form org/name"),
        (
            f"m/{WEIGHTS}",
            f"m/{WEIGHTS}: should be a diffusers folder, found a file; convert a single-file checkpoint with "
            "diffusers' from_single_file(...).save_pretrained(FOLDER)",
        ),
        ("builtin:shape", "no built-in pipeline named 'shape'; did you mean 'shapes'?"),
        ("builtin:", "no built-in pipeline named ''"),
    ],
)
def test_a_source_that_is_no_model_is_named(m, source, words):
    assert mistake(source=source).startswith(words)


def test_a_hub_id_that_cannot_be_had_is_one_quick_error():
    begun = time.perf_counter()
    words = mistake(source="nobody-here/nothing-of-that-name")
    assert time.perf_counter() - begun < 10
    assert words.startswith(
        "model.source: no folder 'nobody-here/nothing-of-that-name', and it cannot be had from the hub: "
    )
    assert "\n" not in words


@pytest.mark.parametrize(
    ("kind", "height", "width", "words"),
    [
        ("sd3", 10, None, "calibration.height: should be a multiple of 4 pixels, found 10"),
        ("sd3", 16, 13, "calibration.width: should be a multiple of 4 pixels, found 13"),
        ("sd3", 64, 16, "calibration.height: should be at most 32 pixels, found 64"),
        ("sd2", 12, 16, "calibration.height: should be a multiple of 8 pixels, found 12"),
        ("sdxl", 16, 20, "calibration.width: should be a multiple of 8 pixels, found 20"),
        ("flux", 18, 16, "calibration.height: should be a multiple of 4 pixels, found 18"),
    ],
)
def test_a_size_that_the_network_cannot_draw_is_refused(kind, height, width, words):
    folder = pipeline.open_folder(Model(source=str(tiny.folder(kind))))
    with pytest.raises(CompressorError) as caught:
        folder.check_size(height, width, "calibration.")
    assert str(caught.value) == words
    folder.check_size(None, None, "calibration.")
    folder.check_size(folder.default_size, folder.default_size, "calibration.")


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_the_default_size_and_token_count_are_those_the_pipeline_works_with(kind):
    folder = pipeline.open_folder(Model(source=str(tiny.folder(kind))))
    loaded = pipeline.load(Model(source=str(tiny.folder(kind))), "cpu")
    seen: dict[str, torch.Tensor] = {}

    def remember(_module: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.update({key: value for key, value in kwargs.items() if isinstance(value, torch.Tensor)})
        if args:
            seen["sample"] = args[0]

    loaded.module.register_forward_pre_hook(remember, with_kwargs=True)
    size = {} if kind != "flux" else {"height": 16, "width": 16}
    loaded.pipe("a cat", num_inference_steps=1, output_type="latent", **size)
    assert seen["encoder_hidden_states"].shape[1] == folder.text_tokens()
    if kind != "flux":
        latents = seen.get("hidden_states", seen.get("sample"))
        assert latents is not None
        assert latents.shape[-1] * folder.vae_factor == folder.default_size
