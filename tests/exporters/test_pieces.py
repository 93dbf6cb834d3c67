"""Text encoders and both halves of the autoencoder as ONNX files, and what of a pipeline cannot be one."""

import ast
import json
import logging
import shutil
from types import SimpleNamespace
from typing import Any

import onnx_ir as ir
import pytest
import torch
from compressor_onnx import ONNX
from torch import nn

from compressor.errors import CompressorError
from compressor.onnx_files import check, graph, mend, pieces, writing
from compressor.onnx_files.writing import Settings
from tests import tiny
from tests.exporters.test_onnx import MOST

pytestmark = pytest.mark.usefixtures("traced_once")

diffusers: Any = tiny.diffusers
transformers: Any = tiny.transformers


def around(**models: Any) -> Any:
    """A pipeline of a tiny SD3 network and these models."""
    loaded = tiny.load("sd3")
    pipe = SimpleNamespace(**models)
    folder = SimpleNamespace(components=("transformer", *models), pipeline_class="StableDiffusion3Pipeline")
    stored: dict[str, Any] = {name: {} for name in models}
    return SimpleNamespace(
        pipe=pipe,
        folder=folder,
        stored=stored,
        module=loaded.module,
        family=loaded.family,
        targets=loaded.targets,
        component_name="transformer",
    )


def write(piece: pieces.Piece, folder, dtype: str = "float32") -> tuple[dict[str, Any], ir.Model]:
    file = folder / piece.name / "model.onnx"
    file.parent.mkdir()
    settings = Settings(dtype)
    done = writing.write(piece, settings, file) | writing.prove(piece, settings, file)
    return done, ir.load(file)


def piece_of(name: str, **models: Any) -> pieces.Piece:
    made, _ = pieces.find(around(**models), [name])
    assert len(made) == 1
    return made[0]


def layers(model: ir.Model) -> set[str]:
    """The modules that the file's nodes say they come from."""
    scopes = [ast.literal_eval(node.metadata_props.get(mend.SCOPES, "[]")) for node in model.graph]
    return {name.removeprefix("network.") for found in scopes for name in found}


def linears(module: nn.Module, under: str = "") -> set[str]:
    kinds = (nn.Linear, nn.Conv2d)
    return {name for name, layer in module.named_modules() if isinstance(layer, kinds) and name.startswith(under)}


def test_clip_with_a_projection_gives_the_projected_end_first_then_all_states(tmp_path):
    module = tiny.load("sd3").pipe.text_encoder
    checks, model = write(piece_of("text_encoder", text_encoder=module), tmp_path)
    tokens = ["batch", "sequence", tiny.TEXT_WIDTH]
    assert {k: v["shape"] for k, v in checks["outputs"].items()} == {
        "text_embeds": ["batch", tiny.TEXT_WIDTH],
        "last_hidden_state": tokens,
        **{f"hidden_states.{i}": tokens for i in range(3)},
    }
    assert checks["inputs"] == {"input_ids": {"dtype": "int64", "shape": ["batch", "sequence"]}}
    assert [entry["shape"] for entry in checks["numeric"]] == [
        {"batch": 2, "sequence": tiny.CLIP_TOKENS},
        {"batch": 3, "sequence": tiny.CLIP_TOKENS - 1},
    ]
    assert max(entry["relative_l2"] for entry in checks["numeric"]) < 2e-6
    assert layers(model) >= linears(module)


def test_clip_without_a_projection_gives_the_state_at_the_end_after_the_last_states(tmp_path):
    module = tiny.load("flux").pipe.text_encoder
    checks, _ = write(piece_of("text_encoder", text_encoder=module), tmp_path, "float16")
    assert list(checks["outputs"])[:3] == ["last_hidden_state", "pooler_output", "hidden_states.0"]
    assert checks["outputs"]["pooler_output"] == {"dtype": "float16", "shape": ["batch", tiny.TEXT_WIDTH]}
    assert 1e-5 < max(entry["relative_l2"] for entry in checks["numeric"]) < 2e-3


def test_t5_in_float16_keeps_its_last_projections_in_float32(tmp_path):
    module = tiny.load("flux").pipe.text_encoder_2
    checks, model = write(piece_of("text_encoder_3", text_encoder_3=module), tmp_path, "float16")
    assert checks["outputs"] == {
        "last_hidden_state": {"dtype": "float16", "shape": ["batch", "sequence", tiny.TEXT_WIDTH]}
    }
    assert max(entry["relative_l2"] for entry in checks["numeric"]) < 2e-3
    assert layers(model) >= linears(module)
    copied = graph.copy_of(module, torch.float16)
    kept = {name for name, weight in copied.named_parameters() if weight.dtype is torch.float32}
    assert kept == {"encoder.block.0.layer.1.DenseReluDense.wo.weight"}


@pytest.mark.parametrize("half", ["vae_encoder", "vae_decoder"])
def test_a_half_of_the_autoencoder_has_its_own_layers_alone(half, tmp_path):
    module = tiny.load("sd3").pipe.vae
    checks, model = write(piece_of(half, vae=module), tmp_path)
    given, found = checks["inputs"], {name: out["shape"] for name, out in checks["outputs"].items()}
    if half == "vae_encoder":
        assert given["sample"]["shape"] == ["batch", 3, "height", "width"]
        assert found == {"latent_parameters": ["batch", 8, "height / 2", "width / 2"]}
    else:
        assert given["latent_sample"]["shape"] == ["batch", 4, "height", "width"]
        assert found == {"sample": ["batch", 3, "height * 2", "width * 2"]}
    part = half.removeprefix("vae_")
    assert layers(model) >= linears(module, f"{part}.")
    other = {"encoder": "decoder", "decoder": "encoder"}[part]
    assert not any(name.startswith(f"{other}.") for name in layers(model))
    file = tmp_path / half / "model.onnx"
    taken = file.stat().st_size
    assert taken <= writing.bytes_of([piece_of(half, vae=module)], Settings()) < 3 * taken  # more names than weights


def test_an_autoencoder_that_must_not_be_halved_stays_in_float32():
    forced, free = (piece_of("vae_decoder", vae=module) for module in (tiny._vae(4), _relaxed(tiny._vae(4))))
    assert [Settings("float16").dtype_of(piece) for piece in (forced, free)] == ["float32", "float16"]
    assert [Settings("bfloat16").dtype_of(piece) for piece in (forced, free)] == ["bfloat16", "bfloat16"]


def _relaxed(vae: Any) -> Any:
    vae.register_to_config(force_upcast=False)
    return vae


def test_bfloat16_is_written_and_onnxruntimes_cpu_provider_does_not_take_it(tmp_path):
    piece = piece_of("text_encoder", text_encoder=tiny._t5())
    file = tmp_path / "text_encoder" / "model.onnx"
    file.parent.mkdir()
    written = writing.write(piece, Settings("bfloat16"), file)
    assert written["outputs"]["last_hidden_state"]["dtype"] == "bfloat16"
    with pytest.raises(CompressorError) as error:
        check.load(file, "text_encoder/model.onnx")
    assert str(error.value) == (
        "text_encoder/model.onnx: computes in bfloat16, which onnxruntime's CPU provider does not take; "
        "export it as float16 or float32"
    )


@pytest.mark.parametrize("opset", [18, *(pytest.param(opset, marks=pytest.mark.slow) for opset in (21, 23)), MOST])
def test_every_piece_is_in_the_operator_set_asked_for(opset, tmp_path):
    piece = piece_of("text_encoder", text_encoder=tiny._t5())
    file = tmp_path / "text_encoder" / "model.onnx"
    file.parent.mkdir()
    settings = Settings(opset=opset)
    assert writing.write(piece, settings, file)["opset"] == opset
    assert max(entry["relative_l2"] for entry in writing.prove(piece, settings, file)["numeric"]) < 2e-6


def test_an_opset_that_torch_cannot_write_is_refused_without_chatter(tmp_path, capfd, caplog):
    levels = {name: logging.getLogger(name).level for name in graph._CHATTER}
    piece = piece_of("text_encoder", text_encoder=tiny._t5())
    (tmp_path / "text_encoder").mkdir()
    with pytest.raises(
        CompressorError, match=r"^text_encoder/model\.onnx: opset should be 99 as asked, torch .* wrote "
    ):
        writing.write(piece, Settings(opset=99), tmp_path / "text_encoder" / "model.onnx")
    assert capfd.readouterr() == ("", "")
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
    assert {name: logging.getLogger(name).level for name in graph._CHATTER} == levels


def test_a_model_that_cannot_be_written_is_named_with_those_that_can():
    bert = transformers.BertModel(
        transformers.BertConfig(
            vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
        )
    )
    made, left_out = pieces.find(around(text_encoder=bert, vae=tiny._vae(4)))
    assert [piece.name for piece in made] == ["transformer", "vae_encoder", "vae_decoder"]
    reason = (
        "a BertModel cannot be written as ONNX yet; "
        "known: CLIPTextModel, CLIPTextModelWithProjection, T5EncoderModel, AutoencoderKL"
    )
    assert left_out == {"text_encoder": reason}
    with pytest.raises(CompressorError) as error:
        pieces.find(around(text_encoder=bert), ["transformer", "text_encoder"])
    assert str(error.value) == f"components: no 'text_encoder' to export: {reason}"


def test_a_component_that_the_pipeline_lacks_is_told_with_those_it_has():
    with pytest.raises(CompressorError) as error:
        pieces.find(around(vae=tiny._vae(4)), ["unet"])
    assert str(error.value) == (
        "components: no 'unet' to export: StableDiffusion3Pipeline has transformer, vae_encoder, vae_decoder"
    )


def test_components_come_in_the_pipelines_order():
    made, left_out = pieces.find(around(vae=tiny._vae(4)), ["vae_decoder", "transformer"])
    assert [piece.name for piece in made] == ["transformer", "vae_decoder"]
    assert left_out == {}


def test_a_full_disk_is_told_before_anything_is_written(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    loaded = tiny.load("sd3")
    with pytest.raises(CompressorError) as error:
        ONNX(components=("vae_decoder",)).export(loaded, tmp_path)
    assert str(error.value) == (
        f"the files of vae_decoder need 150 kB on the disk of {tmp_path}, found 1.00 kB free; nothing was written"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_weights_above_2_gb_lie_beside_the_file_and_agree(tmp_path):
    """Some 2.3 GB of float32: takes two minutes on a busy machine, and as much of disk."""
    torch.manual_seed(0)
    module = diffusers.SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=7,
        attention_head_dim=64,
        num_attention_heads=24,
        joint_attention_dim=64,
        caption_projection_dim=1536,
        pooled_projection_dim=64,
        pos_embed_max_size=8,
    ).eval()
    assert sum(weight.numel() for weight in module.parameters()) * 4 > 2**31
    loaded = around()
    loaded.module, loaded.targets = module, ()
    piece = pieces.network(loaded)
    checks, _ = write(piece, tmp_path)
    assert max(entry["relative_l2"] for entry in checks["numeric"]) < 2e-5
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "transformer").iterdir()}
    assert sizes["model.onnx"] < 2**23
    assert sizes["model.onnx.data"] > 2**31
    assert writing.bytes_of([piece], Settings()) == pytest.approx(sum(sizes.values()), rel=0.01)
    assert json.dumps(checks)
