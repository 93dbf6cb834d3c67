"""The exporter `onnx`: what it writes, what it proves, and every message that it has."""

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import onnxscript
import pytest
import torch
from compressor_onnx import ONNX, opsets
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from onnx import TensorProto, helper, numpy_helper
from pydantic import ValidationError

from compressor import registry
from compressor.errors import CompressorError
from compressor.onnx_files import check, graph, mend, pieces
from compressor.onnx_files.pieces import Shape
from compressor.onnx_files.writing import TOLERANCES
from compressor.sparsity import holds
from compressor.structure import find_targets, sd3
from tests.exporters import networks

pytestmark = pytest.mark.usefixtures("traced_once")

INPUTS = {  # as optimum-onnx's ORTUnet and ORTTransformer feed them
    "sd3": ["hidden_states", "encoder_hidden_states", "pooled_projections", "timestep"],
    "flux": [
        *("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep"),
        *("img_ids", "txt_ids", "guidance"),
    ],
    "sd2": ["sample", "timestep", "encoder_hidden_states"],
    "sdxl": ["sample", "timestep", "encoder_hidden_states", "text_embeds", "time_ids"],
}

MOST = next(opset for opset in range(18, 99) if opsets.explain(opset + 1))
"""The highest operator set that can be had here; `test_pieces.py` writes files in it."""


def run(pipeline, folder: Path, **options):
    """The exported model as read again, the record of the checks, and where the file is."""
    before = {name: tensor.clone() for name, tensor in pipeline.module.state_dict().items()}
    export = ONNX(**options).export(pipeline, folder)
    after = pipeline.module.state_dict()
    assert all(
        torch.equal(after[name], tensor) and after[name].dtype == tensor.dtype for name, tensor in before.items()
    )
    file = folder / pipeline.component_name / "model.onnx"
    component = Path(pipeline.component_name)
    assert export.files == (component / "config.json", component / "model.onnx")
    checks = json.loads(json.dumps(export.checks))[pipeline.component_name]
    assert len(checks["numeric"]) == 2
    assert all(0 < entry["relative_l2"] <= TOLERANCES[checks["dtype"]] for entry in checks["numeric"])
    linears = find_targets(pipeline.module, pipeline.family, adaln=True)
    assert checks["mapped"] == checks["targets"] == len(linears)
    return SimpleNamespace(model=ir.load(file), checks=checks, file=file, pipeline=pipeline)


@pytest.fixture(scope="module")
def sparse_sd3(tmp_path_factory):
    """SD3.5-medium's kind, 2:4, float32."""
    return run(networks.prune(networks.pipeline_of(networks.sd35_medium())), tmp_path_factory.mktemp("sd3"))


@pytest.fixture
def label():
    return "transformer/model.onnx"


def signature(model: ir.Model) -> dict[str, tuple[str, str]]:
    return {str(v.name): (str(v.dtype), str(v.shape)) for v in (*model.graph.inputs, *model.graph.outputs)}


def types(model: ir.Model) -> set[str]:
    values = [value for node in model.graph for value in node.outputs]
    return {str(value.dtype) for value in (*values, *model.graph.initializers.values())}


def test_sd3_keeps_2_of_4_in_every_layer(sparse_sd3):
    assert signature(sparse_sd3.model) == {
        "hidden_states": ("FLOAT", "[batch,4,height,width]"),
        "encoder_hidden_states": ("FLOAT", "[batch,sequence,24]"),
        "pooled_projections": ("FLOAT", "[batch,40]"),
        "timestep": ("FLOAT", "[batch]"),
        "out_hidden_states": ("FLOAT", "[batch,4,height,width]"),
    }
    assert sparse_sd3.checks["sparse"] == {
        target.name: {"pattern": "2:4", "holds": True} for target in sparse_sd3.pipeline.targets
    }
    assert "transformer_blocks.0.attn2.to_q" in sparse_sd3.checks["sparse"]
    assert sparse_sd3.checks["opset"] == sparse_sd3.model.opset_imports[""]
    assert sparse_sd3.checks["reference"] == "torch.float32 on the CPU"


def test_sd3_without_norms_in_float16_agrees_with_torch_in_float32(tmp_path):
    out = run(networks.pipeline_of(networks.sd3_medium()), tmp_path, dtype="float16", height=12, width=8, sequence=5)
    assert list(signature(out.model)) == [*INPUTS["sd3"], "out_hidden_states"]
    assert signature(out.model)["hidden_states"] == ("FLOAT16", "[batch,4,height,width]")
    assert signature(out.model)["timestep"] == ("FLOAT", "[batch]")  # 987.6 is no float16
    assert out.checks["sparse"] == {}
    assert out.checks["reference"] == "torch.float32 on the CPU"
    assert out.checks["tolerance"] == 1e-2
    assert [entry["shape"] for entry in out.checks["numeric"]] == [
        {"batch": 2, "height": 12, "width": 8, "sequence": 5},
        {"batch": 3, "height": 14, "width": 4, "sequence": 10},
    ]


def test_flux_has_no_float64_and_ties_positions_to_latents(tmp_path):
    out = run(networks.prune(networks.pipeline_of(networks.flux_dev()), 1, 4), tmp_path, dtype="float16")
    assert list(signature(out.model)) == [*INPUTS["flux"], "out_hidden_states"]
    assert signature(out.model)["hidden_states"] == ("FLOAT16", "[batch,height_width,16]")
    assert signature(out.model)["img_ids"] == ("FLOAT", "[height_width,3]")
    assert signature(out.model)["txt_ids"] == ("FLOAT", "[sequence,3]")
    assert signature(out.model)["guidance"] == ("FLOAT", "[batch]")
    assert "DOUBLE" not in types(out.model)
    assert {entry["pattern"] for entry in out.checks["sparse"].values()} == {"1:4"}


def test_the_unet_of_sd2_takes_one_time_for_all_samples(tmp_path):
    out = run(networks.pipeline_of(networks.sd2_flat()), tmp_path)  # as in test_exports.py and test_tensorrt.py
    assert list(signature(out.model)) == [*INPUTS["sd2"], "out_sample"]
    assert signature(out.model)["timestep"] == ("FLOAT", "[]")
    assert signature(out.model)["out_sample"] == ("FLOAT", "[batch,4,height,width]")
    assert out.checks["sparse"] == {}


def test_the_unet_of_sdxl_joins_times_and_text_in_float16(tmp_path):
    out = run(networks.prune(networks.pipeline_of(networks.sdxl())), tmp_path, dtype="float16")
    assert list(signature(out.model)) == [*INPUTS["sdxl"], "out_sample"]
    assert signature(out.model)["text_embeds"] == ("FLOAT16", "[batch,40]")
    assert signature(out.model)["time_ids"] == ("FLOAT", "[batch,6]")
    assert len(out.checks["sparse"]) == len(out.pipeline.targets) == 10


@pytest.mark.slow
@pytest.mark.parametrize("make", ["sd35_medium", "sd3_medium", "flux_dev", "sd2", "sdxl"])
@pytest.mark.parametrize(
    ("stored", "written", "reference"),
    [
        (torch.float32, "float32", "torch.float32"),
        (torch.float32, "float16", "torch.float32"),
        (torch.float16, "float16", "torch.float16"),
        (torch.float16, "float32", "torch.float32"),
        (torch.bfloat16, "float32", "torch.float32"),
    ],
)
def test_every_family_agrees_in_every_dtype(make, stored, written, reference, tmp_path):
    network = torch.nn.Module.to(getattr(networks, make)(), stored)
    out = run(networks.prune(networks.pipeline_of(network)), tmp_path, dtype=written)
    assert out.checks["reference"] == f"{reference} on the CPU"
    assert len(out.checks["sparse"]) == len(out.pipeline.targets)
    assert "DOUBLE" not in types(out.model)


@pytest.mark.parametrize(
    "shape",
    [
        Shape(1, 2, 2, 1),  # one of everything
        Shape(1, 6, 10, 3),  # odd numbers of patches: the crop of positions begins at a rounded place
        Shape(4, 14, 16, 40),
        Shape(5, 16, 2, 24),  # all the rows there are positions for
    ],
    ids=str,
)
def test_the_file_runs_at_any_shape(sparse_sd3, shape, label):
    runtime = check.load(sparse_sd3.file, label)
    piece = pieces.network(sparse_sd3.pipeline)
    assert check.compare(runtime, piece.module, piece, shape, torch.float32, 2e-5, label)["relative_l2"] < 2e-6


def test_the_file_names_no_folder_of_this_machine(sparse_sd3):
    data = sparse_sd3.file.read_bytes()
    assert b"site-packages" not in data
    assert str(Path.cwd()).encode() not in data
    assert str(Path.home()).encode() + b"/" not in data


def test_the_config_beside_the_file_is_the_components(sparse_sd3):
    config = json.loads((sparse_sd3.file.parent / "config.json").read_text())
    assert {k: config[k] for k in ("_class_name", "num_layers", "pos_embed_max_size")} == {
        "_class_name": "SD3Transformer2DModel",
        "num_layers": 2,
        "pos_embed_max_size": 8,
    }
    assert "_name_or_path" not in config


def test_a_copy_shares_weights_that_need_no_cast_and_leaves_the_network_as_it_was():
    network = networks.sd3_medium().train()
    same, half = graph.copy_of(network, torch.float32), graph.copy_of(network, torch.float16)
    pairs = list(zip(network.parameters(), same.parameters(), half.parameters(), strict=True))
    assert all(a.data_ptr() == b.data_ptr() for a, b, _ in pairs)
    assert all(c.dtype is torch.float16 and torch.equal(a.half(), c) for a, _, c in pairs)
    assert all(a.dtype is torch.float32 and a.requires_grad for a, _, _ in pairs)
    assert network.training
    assert not same.training
    assert not half.training


def test_example_inputs_leave_the_global_random_numbers_alone():
    piece = pieces.network(networks.pipeline_of(networks.sd3_medium()))
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    graph.example(piece, piece.module, Shape(2, 4, 4, 3), torch.float32, seed=0)
    assert torch.equal(torch.rand(4), expected)


def test_neighbours_in_a_batch_are_at_different_times():
    piece = pieces.network(networks.pipeline_of(networks.sd3_medium()))
    inputs = graph.example(piece, piece.module, Shape(3, 4, 4, 3), torch.float16, seed=0)
    time = inputs[("timestep",)]
    assert time.tolist() == [500.0, 437.5, 375.0]
    assert time.dtype is torch.float32
    assert inputs[("hidden_states",)].dtype is torch.float16


def test_floor_division_is_pythons():
    for dividend in range(-9, 10):
        for divisor in (1, 2, 3, 4):
            found = mend.floor_divide(np.array(dividend), np.array(divisor))
            assert int(found) == dividend // divisor


def test_torchs_own_floor_division_still_rounds_towards_zero():
    """Once this fails, `mend.floor_divide` can go."""
    from onnxscript.function_libs.torch_lib.ops.core import operator_floordiv

    found: Any = operator_floordiv(np.array(-7), np.array(2))  # pyright: ignore[reportArgumentType]
    assert int(found) == -3


def damage(file: Path, folder: Path, change) -> Path:
    """A copy of the file after `change(model)`."""
    model = onnx.load(file)
    change(model)
    copy_ = folder / "model.onnx"
    onnx.save(model, copy_)
    return copy_


def set_weight(model: onnx.ModelProto, name: str, value: float) -> None:
    tensor = next(t for t in model.graph.initializer if t.name == name)
    array = numpy_helper.to_array(tensor).copy()
    array.reshape(-1)[0] = value
    tensor.CopyFrom(numpy_helper.from_array(array, name))


SHAPE = Shape(2, 8, 6, 5)


def compare(file, out, label, *, shape=SHAPE, tolerance=2e-5, dtype=torch.float32, network=None):
    network = network or out.pipeline.module
    piece = pieces.network(out.pipeline)
    return check.compare(check.load(file, label), network, piece, shape, dtype, tolerance, label)


def test_one_wrong_weight_in_the_file_is_found(sparse_sd3, tmp_path, label):
    file = damage(sparse_sd3.file, tmp_path, lambda m: set_weight(m, "network.pos_embed.proj.bias", 3.0))
    with pytest.raises(
        CompressorError,
        match=r"^transformer/model\.onnx: onnxruntime differs from torch by a relative L2 of \d\.\d\de-0\d at "
        r"batch 2, height 8, width 6, sequence 5; should be at most 2e-05$",
    ):
        compare(file, sparse_sd3, label)


def test_a_tolerance_that_is_not_met_is_told_with_its_figures(sparse_sd3, label):
    with pytest.raises(CompressorError, match=r"relative L2 of \d\.\d\de-07 at batch 2, .*; should be at most 1e-09$"):
        compare(sparse_sd3.file, sparse_sd3, label, tolerance=1e-9)


def test_an_output_that_is_not_finite_is_told(sparse_sd3, tmp_path, label):
    file = damage(sparse_sd3.file, tmp_path, lambda m: set_weight(m, "network.proj_out.bias", float("inf")))
    with pytest.raises(CompressorError) as error:
        compare(file, sparse_sd3, label)
    assert str(error.value) == f"{label}: output at {SHAPE} is not finite, in torch it is"


def identity(file: Path, source: str, dtype: int, sizes: dict[str, tuple]) -> Path:
    """A file whose output is one of its inputs, scaled out of float16's range."""
    big = helper.make_node("Mul", [source, source], ["squared"])
    again = helper.make_node("Mul", ["squared", "squared"], ["fourth"])
    out = helper.make_node("Exp", ["fourth"], ["out"])
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT if name == "timestep" else dtype, shape)
        for name, shape in sizes.items()
    ]
    outputs = [helper.make_tensor_value_info("out", dtype, None)]
    made = helper.make_model(
        helper.make_graph([big, again, out], "identity", inputs, outputs),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=10,
    )
    onnx.save(made, file)
    return file


SIZES = {
    "hidden_states": ("b", 4, "h", "w"),
    "encoder_hidden_states": ("b", "s", 24),
    "pooled_projections": ("b", 40),
    "timestep": ("b",),
}


def test_overflow_in_float16_advises_float32(sparse_sd3, tmp_path, label):
    file = identity(tmp_path / "model.onnx", "hidden_states", TensorProto.FLOAT16, SIZES)
    with pytest.raises(
        CompressorError, match=r"not finite, in torch it is; float16 overflows in this network, export it as float32$"
    ):
        compare(file, sparse_sd3, label, dtype=torch.float16)


def test_an_output_of_another_shape_is_told(sparse_sd3, tmp_path, label):
    file = identity(tmp_path / "model.onnx", "pooled_projections", TensorProto.FLOAT, SIZES)
    with pytest.raises(CompressorError) as error:
        compare(file, sparse_sd3, label)
    assert str(error.value) == f"{label}: output at {SHAPE} has the shape (2, 40), should have (2, 4, 8, 6) as in torch"


def test_a_file_that_onnxruntime_cannot_load_is_told(tmp_path, label):
    (tmp_path / "model.onnx").write_bytes(b"no protobuf")
    with pytest.raises(
        CompressorError, match=r"^transformer/model\.onnx: onnxruntime cannot load it: .*failed:Protobuf"
    ):
        check.load(tmp_path / "model.onnx", label)


def test_a_file_that_onnxruntime_cannot_run_is_told(sparse_sd3, tmp_path, label):
    sizes = SIZES | {"pooled_projections": ("b", 39)}
    file = identity(tmp_path / "model.onnx", "hidden_states", TensorProto.FLOAT, sizes)
    with pytest.raises(
        CompressorError,
        match=r"^transformer/model\.onnx: onnxruntime cannot run it at batch 2, .*: \[ONNXRuntimeError\]",
    ):
        compare(file, sparse_sd3, label)


def weight_of(model: ir.Model, name: str) -> ir.Value:
    """The initializer of a linear that is written as MatMul."""
    scope = f"'network.{name}', '"
    node = next(n for n in model.graph if n.op_type == "MatMul" and scope in n.metadata_props[mend.SCOPES])
    value = node.inputs[1]
    assert value is not None
    return value


def test_a_layer_whose_2_of_4_is_lost_in_the_file_is_named(sparse_sd3, tmp_path, label):
    from compressor.onnx_files import sparse

    name = "transformer_blocks.1.ff.net.0.proj"
    weight = weight_of(sparse_sd3.model, name)
    assert weight.const_value is not None
    shuffled_IO = np.random.default_rng(0).permutation(weight.const_value.numpy(), axis=0)
    assert not holds(torch.from_numpy(shuffled_IO.T.copy()), 2, 4)

    def shuffle(model):
        tensor = next(t for t in model.graph.initializer if t.name == weight.name)
        tensor.CopyFrom(numpy_helper.from_array(shuffled_IO, weight.name))

    file = damage(sparse_sd3.file, tmp_path, shuffle)
    with pytest.raises(CompressorError) as error:
        sparse.verify(file, sparse_sd3.pipeline.targets, label)
    assert str(error.value) == (
        f"{label}: {name}: keeps 2 of 4 inputs in torch and not in the file along the reduction axis; "
        "sparse kernels would not take it"
    )


def test_a_sparse_layer_that_the_file_lacks_is_named(sparse_sd3, tmp_path, label):
    from compressor.onnx_files import sparse

    name = sparse_sd3.pipeline.targets[0].name

    def forget(model):
        for node in model.graph.node:
            for entry in node.metadata_props:
                entry.value = entry.value.replace(f"'network.{name}'", "'network.another'")

    file = damage(sparse_sd3.file, tmp_path, forget)
    with pytest.raises(CompressorError) as error:
        sparse.verify(file, sparse_sd3.pipeline.targets, label)
    assert str(error.value) == (
        f"{label}: {name}: should be a MatMul or Gemm with a constant weight that keeps 2 of 4, found no such node"
    )


def test_a_dense_layer_that_the_file_lacks_is_only_counted(sparse_sd3, tmp_path, label):
    from compressor.onnx_files import sparse

    dense = networks.pipeline_of(networks.sd35_medium()).targets

    def forget(model):
        for node in model.graph.node:
            for entry in node.metadata_props:
                entry.value = entry.value.replace(f"'network.{dense[0].name}'", "'network.another'")

    file = damage(sparse_sd3.file, tmp_path, forget)
    assert sparse.verify(file, dense, label) == {"targets": 25, "mapped": 24, "sparse": {}}


def test_an_opset_other_than_asked_is_an_error(sparse_sd3, label):
    written = sparse_sd3.checks["opset"]
    assert check.opset(sparse_sd3.file, written, label) == check.opset(sparse_sd3.file, None, label) == written
    with pytest.raises(CompressorError) as error:
        check.opset(sparse_sd3.file, 28, label)
    assert str(error.value) == (
        f"{label}: opset should be 28 as asked, torch {torch.__version__} wrote {written}; "
        f"ask for {written} or leave opset out"
    )


class Undecided(SD3Transformer2DModel):
    """A network that torch cannot trace."""

    def forward(self, hidden_states, *args, **rest):  # pyright: ignore[reportIncompatibleMethodOverride]
        if hidden_states.sum() > 0:
            hidden_states = -hidden_states
        return super().forward(hidden_states, *args, **rest)


def test_a_network_that_torch_cannot_export_is_told_in_one_line(tmp_path):
    network = networks.sd3_medium()
    network.__class__ = Undecided
    pipeline = networks.pipeline_of(network)
    with pytest.raises(CompressorError) as error:
        ONNX(opset=20).export(pipeline, tmp_path)
    message = str(error.value)
    assert message.startswith(
        "torch cannot export this Undecided at batch 2, height 16, width 16, sequence 24, opset 20: "
    )
    assert "data-dependent" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (
            "sd3_medium",
            {"height": 7},
            "height 7 does not suit this SD3Transformer2DModel; should be a multiple of 2, at least 4",
        ),
        (
            "sd3_medium",
            {"width": 18},
            "width 18 does not suit this SD3Transformer2DModel; should be a multiple of 2, at least 4 and at most 16",
        ),
        ("sd2", {"width": 2}, "width 2 does not suit this UNet2DConditionModel; should be a multiple of 2, at least 4"),
    ],
)
def test_a_shape_that_the_network_does_not_take_is_refused(make, options, message, tmp_path):
    with pytest.raises(CompressorError) as error:
        ONNX(**options).export(networks.pipeline_of(getattr(networks, make)()), tmp_path)
    assert str(error.value) == message


def test_the_other_shape_differs_in_every_size_and_stays_within_the_positions():
    piece = pieces.network(networks.pipeline_of(networks.sd3_medium()))
    for height in (4, 14, 16):
        for width in (4, 6, 16):
            shape = graph.traced_shape(piece, 2, height, width, 5)
            other = graph.other_shape(piece, shape)
            assert other.batch != shape.batch
            assert other.height != shape.height
            assert other.width != shape.width
            assert other.sequence != shape.sequence
            assert 2 <= other.height <= 16
            assert 2 <= other.width <= 16


class Configured(torch.nn.Module):
    """A config, and the only linear that a network of SD3's family cannot lack."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = config
        self.norm_out = torch.nn.ModuleDict({"linear": torch.nn.Linear(1, 1)})


def test_the_default_shape_is_small_whatever_the_models_size():
    def of(**config: Any) -> pieces.Piece:
        loaded: Any = SimpleNamespace(component_name="", module=Configured(config), family=sd3.FAMILY)
        return pieces.network(loaded)

    large = of(sample_size=128, patch_size=2, pos_embed_max_size=192)
    assert graph.traced_shape(large, 2, None, None, 24) == Shape(2, 32, 32, 24)
    oblong = of(sample_size=(24, 96), block_out_channels=(1, 2, 3, 4))
    assert graph.traced_shape(oblong, 2, None, None, 24) == Shape(2, 24, 32, 24)
    unsaid = of(patch_size=1)
    assert graph.traced_shape(unsaid, 2, None, None, 24) == Shape(2, 32, 32, 24)


def test_missing_packages_are_named_with_how_to_install_them(monkeypatch, tmp_path):
    assert ONNX().available() is None
    found = {"onnx": object()}
    monkeypatch.setattr("compressor_onnx.find_spec", found.get)
    expected = 'onnx needs onnxruntime, onnxscript; pip install "diffusion-compressor[onnx]"'
    assert ONNX().available() == expected
    with pytest.raises(CompressorError) as error:
        ONNX().export(networks.pipeline_of(networks.sd3_medium()), tmp_path)
    assert str(error.value) == expected


def test_its_options_are_read_without_importing_torch_or_onnx():
    script = (
        "import sys, compressor_onnx as c; c.ONNX(dtype='float16').available(); "
        "print([m for m in ('torch', 'numpy', 'onnx', 'onnxruntime', 'onnxscript') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_it_is_found_by_its_entry_point():
    assert registry.load("exporter", "onnx") is ONNX


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "should be 'float32', 'float16' or 'bfloat16'"),
        ({"components": []}, "at least 1 item"),
        ({"components": ["vae"]}, "should be 'transformer', 'unet', 'text_encoder'"),
        ({"dtype": "bfloat16"}, "onnxruntime's CPU provider, which proves every file, takes no bfloat16"),
        ({"opset": 17}, "greater than or equal to 18"),
        ({"opset": 40}, f"should be 18 to {MOST}, which onnxscript {onnxscript.__version__} and onnxruntime "),
        ({"batch": 1}, "greater than or equal to 2"),
        ({"tolerance": 0.0}, "greater than 0"),
        ({"tolerance": float("nan")}, "finite number"),
        ({"hight": 8}, "unknown key; did you mean 'height'?"),
    ],
)
def test_options_without_a_meaning_are_refused(options, message):
    with pytest.raises(ValidationError) as error:
        ONNX.model_validate(options)
    assert message in str(error.value)


def test_the_highest_opset_that_is_offered_is_taken_and_the_next_is_not():
    assert MOST >= 23
    assert ONNX(opset=MOST).opset == MOST
    with pytest.raises(ValidationError) as error:
        ONNX(opset=MOST + 1)
    assert error.value.errors()[0]["msg"] == (
        f"Value error, should be 18 to {MOST}, which onnxscript {onnxscript.__version__} and onnxruntime "
        f"{onnxruntime.__version__} know, found {MOST + 1}; torch's own default if left out"
    )


def test_an_opset_that_onnxruntime_does_not_load_is_not_offered(monkeypatch):
    load = onnxruntime.InferenceSession

    def older(model, *rest):
        if onnx.load_model_from_string(model).opset_import[0].version > 20:
            raise RuntimeError("under development")
        return load(model, *rest)

    monkeypatch.setattr(onnxruntime, "InferenceSession", older)
    assert opsets.explain(20) is None
    assert str(opsets.explain(21)).startswith("should be 18 to 20, which ")


def test_an_opset_is_taken_as_it_is_where_it_cannot_be_tried_or_was_written_elsewhere(monkeypatch):
    assert ONNX.model_validate_json('{"opset": 40}').opset == 40  # a manifest's
    monkeypatch.setattr("compressor_onnx.find_spec", lambda _: None)
    assert ONNX(opset=40).opset == 40


def test_the_stated_tolerances_are_those_in_the_help():
    text = ONNX.model_fields["tolerance"].description or ""
    assert "2e-5 for float32 and 1e-2 for float16" in text
    assert TOLERANCES["float32"] == 2e-5
    assert TOLERANCES["float16"] == 1e-2


def test_weights_beside_the_file_are_checked_and_listed_and_move_with_it(tmp_path, monkeypatch, label):
    monkeypatch.setattr("torch.onnx._internal.exporter._onnx_program._LARGE_MODEL_THRESHOLD", 0)  # as above 2 GB
    pipeline = networks.prune(networks.pipeline_of(networks.sd3_medium()))
    export = ONNX(dtype="float16").export(pipeline, tmp_path)
    assert [str(file) for file in export.files] == [
        "transformer/config.json",
        "transformer/model.onnx",
        "transformer/model.onnx.data",
    ]
    assert len(export.checks["transformer"]["sparse"]) == len(pipeline.targets)
    shutil.move(tmp_path / "transformer", tmp_path / "moved")
    runtime = check.load(tmp_path / "moved" / "model.onnx", label)
    check.compare(runtime, pipeline.module, pieces.network(pipeline), SHAPE, torch.float16, 1e-2, label)


@pytest.mark.slow
def test_a_network_above_two_gigabytes_is_written_beside_its_file_and_proved(tmp_path):
    """Protobuf ends at 2 GB; this takes some 12 GB of memory and 3 GB of the disk."""
    network = SD3Transformer2DModel(
        num_layers=7,
        attention_head_dim=64,
        num_attention_heads=24,
        joint_attention_dim=4096,
        caption_projection_dim=1536,
        pooled_projection_dim=2048,
    ).eval()
    weights = sum(tensor.numel() for tensor in (*network.parameters(), *network.buffers()))
    pipeline = networks.prune(networks.pipeline_of(network))
    export = ONNX().export(pipeline, tmp_path)
    data = tmp_path / "transformer" / "model.onnx.data"
    assert data.relative_to(tmp_path) in export.files
    assert data.stat().st_size > 2**31
    assert data.stat().st_size == pytest.approx(4 * weights, rel=0.01)
    checks = export.checks["transformer"]
    assert all(entry["relative_l2"] <= 2e-5 for entry in checks["numeric"])
    assert len(checks["sparse"]) == len(pipeline.targets)
    assert ONNX().verify(pipeline, tmp_path)["transformer"]["numeric"] == checks["numeric"]


def test_a_network_in_training_mode_is_exported_for_inference(sparse_sd3):
    assert not sparse_sd3.pipeline.module.training
    network = copy.deepcopy(sparse_sd3.pipeline.module).train()
    assert not graph.copy_of(network, torch.float32).training
