"""Shrunk networks on disk: they come back as they were, and a manifest that says anything else is refused."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.quantizers import auto
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import compressor
from compressor import checkpoint, pipeline, registry, shrunk
from compressor.errors import CompressorError
from compressor.pipeline import Pipeline
from compressor.recipe import Model
from compressor.structure import find_groups, remove
from tests import tiny

KINDS = pytest.mark.parametrize("kind", list(tiny.KINDS))
RECORD = {"recipe": {"export": []}}


def inputs(loaded: Pipeline) -> dict[str, Any]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return dict(loaded.family.inputs(loaded.module, batch=2, height=8, width=8, sequence=6))


@torch.no_grad()
def output(module: nn.Module, given: dict[str, Any]) -> Tensor:
    return module(**given, return_dict=False)[0]


def cut(loaded: Pipeline) -> Pipeline:
    """Removes other heads, and another number of neurons, in every block."""
    for place, group in enumerate(find_groups(loaded.module, loaded.family)):
        if group.kind == "neurons":
            remove(group, range(0, 2 * place + 1, 2))
        elif place % 4:
            remove(group, [place // 4 % 2])
    return loaded


def shrunken(kind: str, dtype: torch.dtype = torch.float32) -> Pipeline:
    name = str(dtype).removeprefix("torch.")
    return cut(pipeline.load(Model.model_validate({"source": str(tiny.folder(kind, dtype)), "dtype": name}), "cpu"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Pipeline, Path]]:
    """A shrunk pipeline of a kind, and the folder it was saved in; neither is to be changed."""
    made: dict[str, tuple[Pipeline, Path]] = {}

    def make(kind: str) -> tuple[Pipeline, Path]:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind) / "out"
            loaded = shrunken(kind)
            checkpoint.save(loaded, folder, RECORD)
            made[kind] = loaded, folder
        return made[kind]

    return make


def same(found: nn.Module, expected: nn.Module) -> bool:
    a, b = found.state_dict(), expected.state_dict()
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in b)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@KINDS
def test_blocks_of_other_widths_come_back_with_the_same_bits(kind, saved):
    loaded, folder = saved(kind)
    counts = {(group.kind, group.count) for group in find_groups(loaded.module, loaded.family)}
    assert len(counts) >= 4
    given = inputs(loaded)
    for pipe in (compressor.load(folder), pipeline.load(Model(source=str(folder)), "cpu").pipe):
        found = getattr(pipe, tiny.NETWORK[kind])
        assert same(found, loaded.module)
        assert tiny.computes_alike(loaded.module, found, given)
        assert not found.training
        assert not any(parameter.requires_grad for parameter in found.parameters())


@KINDS
def test_the_twin_of_a_shrunk_folder_has_its_shapes(kind, saved):
    loaded, folder = saved(kind)
    twin = pipeline.open_folder(Model(source=str(folder))).twin()
    assert {name: p.shape for name, p in twin.named_parameters()} == {
        name: p.shape for name, p in loaded.module.named_parameters()
    }
    assert all(parameter.is_meta for parameter in twin.parameters())
    given = inputs(loaded)
    meta = {
        k: v.to("meta") if isinstance(v, Tensor) else {n: t.to("meta") for n, t in v.items()} for k, v in given.items()
    }
    assert output(twin, meta).shape == output(loaded.module, given).shape


@KINDS
def test_in_half_precision_too(kind, tmp_path):
    loaded = shrunken(kind, torch.float16)
    checkpoint.save(loaded, tmp_path / "out", RECORD)
    found = checkpoint.load(tmp_path / "out", "cpu", "float16")
    given = inputs(loaded)
    assert found.dtype == torch.float16
    assert same(found.module, loaded.module)
    assert tiny.computes_alike(loaded.module, found.module, given)
    assert {p.dtype for p in checkpoint.load(tmp_path / "out", "cpu").module.parameters()} == {torch.float32}


@KINDS
def test_the_manifest_says_what_is_smaller_and_nothing_else(kind, saved):
    loaded, folder = saved(kind)
    manifest = json.loads((folder / tiny.NETWORK[kind] / "config.json").read_text())["quantization_config"]
    assert manifest == shrunk.describe(loaded.module, loaded.family)
    dense = tiny.load(kind).module
    before, after = dict(dense.named_parameters()), dict(loaded.module.named_parameters())
    assert set(manifest["shapes"]) == {name for name in before if before[name].shape != after[name].shape}
    assert manifest["attributes"]
    for block, numbers in manifest["attributes"].items():
        for path, value in numbers.items():
            owner, _, name = path.rpartition(".")
            found, was = (
                getattr(m.get_submodule(f"{block}.{owner}".rstrip(".")), name) for m in (loaded.module, dense)
            )
            assert found == value < was
    assert shrunk.describe(dense, loaded.family) is None


def test_a_network_that_was_not_shrunk_has_no_manifest(tmp_path):
    loaded = tiny.load("sd3")
    checkpoint.save(loaded, tmp_path / "out", RECORD)
    config = json.loads((tmp_path / "out" / "transformer" / "config.json").read_text())
    assert "quantization_config" not in config
    network: Any = loaded.module
    network.register_to_config(quantization_config={"quant_method": shrunk.METHOD})  # as if it once had been
    checkpoint.save(loaded, tmp_path / "again", RECORD)
    assert contents(tmp_path / "again") == contents(tmp_path / "out")


@KINDS
def test_saved_twice_and_saved_when_reloaded_are_the_same_bytes(kind, saved, tmp_path):
    loaded, folder = saved(kind)
    checkpoint.save(loaded, tmp_path / "twice", RECORD)
    assert contents(tmp_path / "twice") == contents(folder)
    checkpoint.save(checkpoint.load(folder, "cpu"), tmp_path / "reloaded", RECORD)
    assert contents(tmp_path / "reloaded") == contents(folder)


@KINDS
def test_what_was_reloaded_is_shrunk_saved_and_loaded_again(kind, saved, tmp_path):
    again = checkpoint.load(saved(kind)[1], "cpu")
    before = sum(parameter.numel() for parameter in again.module.parameters())
    for group in find_groups(again.module, again.family):
        if group.kind == "neurons" and group.count > 4:
            remove(group, [1, 3])
    checkpoint.save(again, tmp_path / "out", RECORD)
    found = checkpoint.load(tmp_path / "out", "cpu")
    assert same(found.module, again.module)
    assert tiny.computes_alike(again.module, found.module, inputs(again))
    assert sum(parameter.numel() for parameter in found.module.parameters()) < before


def test_weights_in_several_files_load(saved, tmp_path):
    loaded, folder = saved("flux")
    copied = tmp_path / "flux"
    shutil.copytree(folder, copied)
    (copied / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    plain: Any = diffusers.FluxTransformer2DModel.from_pretrained(folder / "transformer")  # type: ignore[attr-defined]
    plain.save_pretrained(copied / "transformer", max_shard_size="8KB")
    assert len(list((copied / "transformer").glob("*.safetensors"))) > 1
    assert same(pipeline.load(Model(source=str(copied)), "cpu").module, loaded.module)


WITHOUT_US = """
import sys, json, diffusers
for name, folder in json.loads(sys.argv[1]):
    for options in ({}, {"low_cpu_mem_usage": False, "ignore_mismatched_sizes": True}):
        try:
            getattr(diffusers, name).from_pretrained(folder, **options)
        except ValueError as error:
            print(str(error).partition(" - ")[0])
try:
    diffusers.FluxPipeline.from_pretrained(folder.rpartition("/")[0])
except ValueError as error:
    print(str(error).partition(" - ")[0])
assert not any(module.startswith("compressor") for module in sys.modules)
"""


def test_plain_diffusers_without_us_refuses_and_never_makes_weights_up(saved):
    given = []
    for kind in ("sd3", "sd2", "flux"):
        loaded, folder = saved(kind)
        given.append([loaded.family.component_class, str(folder / tiny.NETWORK[kind])])
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_US, json.dumps(given)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["Unknown quantization type, got compressor.shrunk"] * 7


@KINDS
def test_plain_diffusers_with_our_method_loads_the_same_bits(kind, saved, tmp_path):
    loaded, folder = saved(kind)
    cls = getattr(diffusers, loaded.family.component_class)
    plain = cls.from_pretrained(folder / tiny.NETWORK[kind])
    assert same(plain, loaded.module)
    assert tiny.computes_alike(loaded.module, plain, inputs(loaded))
    plain.save_pretrained(tmp_path)
    assert same(cls.from_pretrained(tmp_path), loaded.module)
    assert plain.to(torch.float64).dtype == torch.float64
    with pytest.raises(ValueError, match="`low_cpu_mem_usage` cannot be False"):
        cls.from_pretrained(folder / tiny.NETWORK[kind], low_cpu_mem_usage=False, ignore_mismatched_sizes=True)


def test_a_whole_pipeline_loads_with_plain_diffusers(saved):
    loaded, folder = saved("sd2")
    plain: Any = diffusers.DiffusionPipeline.from_pretrained(  # type: ignore[attr-defined]
        folder, safety_checker=None, feature_extractor=None
    )
    assert same(plain.unet, loaded.module)


def test_what_we_loaded_and_diffusers_saved_loads_either_way(saved, tmp_path):
    loaded, folder = saved("sd2")
    compressor.load(folder).save_pretrained(tmp_path)
    plain: Any = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "unet")  # type: ignore[attr-defined]
    assert same(plain, loaded.module)
    assert same(pipeline.load(Model(source=str(tmp_path)), "cpu").module, loaded.module)


def test_a_manifest_of_an_earlier_removal_is_not_believed(saved, tmp_path):
    pipe = compressor.load(saved("sd3")[1])
    group = next(g for g in find_groups(pipe.transformer, saved("sd3")[0].family) if g.kind == "neurons")
    remove(group, [0])
    pipe.save_pretrained(tmp_path)  # which does not know of it
    with pytest.raises(
        CompressorError, match=r"ff\.net.*: should have the shape .* as quantization_config says, found "
    ):
        pipeline.load(Model(source=str(tmp_path)), "cpu")


def test_our_loader_does_without_the_table_of_diffusers(saved, monkeypatch):
    loaded, folder = saved("sd3")
    monkeypatch.delitem(auto.AUTO_QUANTIZER_MAPPING, shrunk.METHOD)
    monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, shrunk.METHOD)
    with pytest.raises(ValueError, match=r"Unknown quantization type, got compressor\.shrunk"):
        diffusers.SD3Transformer2DModel.from_pretrained(folder / "transformer")  # type: ignore[attr-defined]
    assert same(checkpoint.load(folder, "cpu").module, loaded.module)


def put(path: str, value: object) -> Callable[[dict[str, Any]], None]:
    """Sets one value of a manifest; `block|attn.heads` and the like are keys below one another."""

    def change(manifest: dict[str, Any]) -> None:
        *owners, last = path.split("|")
        for owner in owners:
            manifest = manifest.setdefault(owner, {})
        manifest[last] = value

    return change


LAST = "transformer_blocks.1"
TAMPERED = {
    "a shape that grows": (
        put(f"shapes|{LAST}.attn.to_q.weight", [32, 16]),
        rf"shapes: {LAST}.attn.to_q.weight: size 0 should be from 1 to 16, found 32",
    ),
    "a shape that grows where nothing is removed": (
        put("shapes|proj_out.weight", [17, 16]),
        "shapes: proj_out.weight: size 0 should be 16, which heads and neurons do not change, found 17",
    ),
    "a shape that shrinks where nothing is removed": (
        put("shapes|proj_out.bias", [8]),
        "shapes: proj_out.bias: size 0 should be 16, which heads and neurons do not change, found 8",
    ),
    "an empty shape": (
        put(f"shapes|{LAST}.ff.net.2.weight", [16, 0]),
        f"shapes: {LAST}.ff.net.2.weight: size 1 should be from 1 to 64, found 0",
    ),
    "another rank": (
        put(f"shapes|{LAST}.ff.net.2.weight", [16]),
        f"shapes: {LAST}.ff.net.2.weight: should be 2 whole numbers, found [16]",
    ),
    "a size that is no number": (
        put(f"shapes|{LAST}.ff.net.2.weight", [16, True]),
        f"shapes: {LAST}.ff.net.2.weight: should be 2 whole numbers, found [16, True]",
    ),
    "a parameter that does not exist": (
        put(f"shapes|{LAST}.attn.to_z.weight", [8, 16]),
        f"shapes: {LAST}.attn.to_z.weight: the network has no such parameter",
    ),
    "shapes of another kind": (put("shapes", []), "shapes: should be a JSON object, found list"),
    "a number that grows": (
        put(f"attributes|{LAST}|attn.heads", 3),
        f"attributes: {LAST}.attn.heads: should be a whole number from 1 to 2, found 3",
    ),
    "no heads": (
        put(f"attributes|{LAST}|attn.heads", 0),
        f"attributes: {LAST}.attn.heads: should be a whole number from 1 to 2, found 0",
    ),
    "half a head": (
        put(f"attributes|{LAST}|attn.heads", 0.5),
        f"attributes: {LAST}.attn.heads: should be a whole number from 1 to 2, found 0.5",
    ),
    "true": (
        put(f"attributes|{LAST}|attn.heads", True),
        f"attributes: {LAST}.attn.heads: should be a whole number from 1 to 2, found True",
    ),
    "an attribute that is not on the list": (
        put(f"attributes|{LAST}|attn.processor", 1),
        f"attributes: {LAST}.attn.processor: is no number of heads or neurons that the family's tables list",
    ),
    "an attribute that runs code": (
        put(f"attributes|{LAST}|attn.__class__", 1),
        f"attributes: {LAST}.attn.__class__: is no number of heads or neurons that the family's tables list",
    ),
    "a block that does not exist": (
        put("attributes|transformer_blocks.7|attn.heads", 1),
        "attributes: transformer_blocks.7.attn.heads: is no number of heads or neurons that the family's tables list",
    ),
    "attributes of another kind": (
        put(f"attributes|{LAST}", 1),
        f"attributes: {LAST}: should be a JSON object, found int",
    ),
    "another class": (put("class", "os"), "class: should be SD3Transformer2DModel, found 'os'"),
    "another family's class": (
        put("class", "FluxTransformer2DModel"),
        "class: should be SD3Transformer2DModel, found 'FluxTransformer2DModel'",
    ),
    "another format": (put("format", 2), ": should be of format 1, found 2; update the package"),
    "a key too many": (
        put("import", "os"),
        ": should have the keys attributes, class, format, quant_method, shapes; differs in 'import'",
    ),
    "a key too few": (
        lambda manifest: manifest.pop("shapes"),
        ": should have the keys attributes, class, format, quant_method, shapes; differs in 'shapes'",
    ),
    "heads that do not fit the shapes": (
        put(f"attributes|{LAST}|attn.heads", 2),
        f"attributes: {LAST}.attn.heads: should be 1, as the shapes say, found 2",
    ),
    "half a head in every shape": (
        lambda manifest: [
            put(f"shapes|{LAST}.attn.{name}.{part}", [12, 16] if part == "weight" else [12])(manifest)
            for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
            for part in ("weight", "bias")
        ],
        f"shapes do not fit each other: {LAST}.attn.to_q: should have a multiple of 8 rows, whole heads, found 12",
    ),
    "a bias that does not fit its weight": (
        put(f"shapes|{LAST}.ff.net.0.proj.bias", [5]),
        f"shapes do not fit each other: {LAST}.ff.net.0.proj: should have a bias of ",
    ),
    "columns that do not fit the rows": (
        put(f"shapes|{LAST}.ff.net.2.weight", [16, 5]),
        f"shapes do not fit each other: {LAST}.ff.net.2: should have ",
    ),
}


@pytest.fixture
def tampered(saved, tmp_path) -> Callable[..., Path]:
    """A copy of a saved pipeline with one file changed and its hash made right."""

    def make(change: Callable[[dict[str, Any]], object], kind: str = "sd3") -> Path:
        folder = tmp_path / kind
        shutil.copytree(saved(kind)[1], folder)
        name = f"{tiny.NETWORK[kind]}/config.json"
        config = json.loads((folder / name).read_text())
        change(config)
        (folder / name).write_text(json.dumps(config))
        rehash(folder, name)
        return folder

    return make


def rehash(folder: Path, name: str) -> None:
    record = json.loads((folder / "compression.json").read_text())
    record["files"][name] = checkpoint.sha256(folder / name)
    (folder / "compression.json").write_text(json.dumps(record))


@pytest.mark.parametrize("name", TAMPERED)
def test_a_manifest_is_refused_that_has(name, tampered):
    change, words = TAMPERED[name]
    folder = tampered(lambda config: change(config["quantization_config"]))
    start = f"{folder / 'transformer' / 'config.json'}: quantization_config"
    for load in (compressor.load, lambda folder: pipeline.open_folder(Model(source=str(folder))).twin()):
        with pytest.raises(CompressorError) as caught:
            load(folder)
        assert str(caught.value).startswith(start)
        assert words in str(caught.value)
    with pytest.raises(CompressorError) as caught:  # diffusers' way is no way around
        diffusers.SD3Transformer2DModel.from_pretrained(folder / "transformer")  # type: ignore[attr-defined]
    assert words in str(caught.value)


def test_a_manifest_that_is_gone_is_no_dense_network(tampered):
    folder = tampered(lambda config: config.pop("quantization_config"))
    with pytest.raises(CompressorError, match=r"diffusers cannot load this pipeline: .* expected shape"):
        compressor.load(folder)


def test_a_config_of_another_class_is_refused(tampered):
    folder = tampered(lambda config: config.update(_class_name="FluxTransformer2DModel"))
    with pytest.raises(
        CompressorError, match=r"_class_name: should be SD3Transformer2DModel, found 'FluxTransformer2DModel'$"
    ):
        compressor.load(folder)


def test_a_network_of_a_class_that_no_family_knows_is_refused_by_diffusers_way():
    config = auto.DiffusersAutoQuantizer.from_dict({"quant_method": shrunk.METHOD})
    quantizer: Any = auto.DiffusersAutoQuantizer.from_config(config)
    with pytest.raises(CompressorError, match="no family knows the network class 'Linear'; known: "):
        quantizer.preprocess_model(nn.Linear(1, 1))


def test_a_family_is_of_one_class():
    with pytest.raises(CompressorError, match=r"family 'flux' is of FluxTransformer2DModel, found Linear$"):
        shrunk.rebuild(nn.Linear, {}, {}, registry.load("family", "flux"))


@pytest.mark.parametrize("harm", ["shape", "missing", "more", "twice", "damaged"])
def test_weights_that_are_not_those_of_the_manifest_are_refused(harm, tampered):
    folder = tampered(lambda config: None)
    name = "transformer/diffusion_pytorch_model.safetensors"
    file, layer = folder / name, "transformer_blocks.0.attn.to_q.weight"
    tensors = load_file(file)
    if harm == "shape":
        tensors[layer] = torch.zeros(len(tensors[layer]) + 8, 16)
        words = f"{file}: {layer}: should have the shape "
    elif harm == "missing":
        del tensors[layer]
        words = f"{file.parent}: its weights lack 1 of its tensors, first {layer}"
    elif harm == "more":
        tensors["more"] = torch.zeros(1)
        words = f"{file}: more: should be a tensor of the network, once; the network has no 'more'"
    else:
        save_file({layer: tensors[layer]}, file.parent / "more.safetensors")
        words = f"{file.parent / 'more.safetensors'}: {layer}: should be a tensor of the network, once; found it twice"
    if harm == "damaged":
        (file.parent / "more.safetensors").write_bytes(b"x" * 20)
        words = f"{file.parent / 'more.safetensors'}: truncated or damaged safetensors file: "
    save_file(tensors, file, metadata={"format": "pt"})
    rehash(folder, name)
    with pytest.raises(CompressorError) as caught:
        compressor.load(folder)
    assert str(caught.value).startswith(words)


def test_weights_that_lack_a_tensor_are_refused_by_diffusers_way_too(tampered):
    folder = tampered(lambda config: None)
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    del tensors["proj_out.bias"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CompressorError, match=r"its weights lack 1 of its tensors, first proj_out\.bias$"):
        diffusers.SD3Transformer2DModel.from_pretrained(folder / "transformer")  # type: ignore[attr-defined]


def test_weights_of_another_shape_are_not_made_up_by_diffusers_way(tampered):
    folder = tampered(lambda config: None)
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["proj_out.bias"] = torch.zeros(8)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CompressorError, match=r"its weights lack 1 of its tensors, first proj_out\.bias$"):
        diffusers.SD3Transformer2DModel.from_pretrained(  # type: ignore[attr-defined]
            folder / "transformer", ignore_mismatched_sizes=True
        )


def test_a_removal_that_no_table_knows_is_not_saved(tmp_path):
    loaded = tiny.load("sd3")
    broken: Any = copy.deepcopy(loaded.module)
    broken.proj_out.weight = nn.Parameter(broken.proj_out.weight[:8].detach())
    broken.proj_out.bias = nn.Parameter(broken.proj_out.bias[:8].detach())
    pipe = copy.copy(loaded.pipe)
    pipe.transformer = broken
    odd = Pipeline(pipe, loaded.folder, broken, loaded.targets, loaded.stored, loaded.dtype)
    with pytest.raises(CompressorError, match=r"which heads and neurons do not change, found 8$"):
        checkpoint.save(odd, tmp_path / "out", RECORD)
    assert not list(tmp_path.iterdir())
