"""Built-in pipelines are found by name, quickly, and never with a damaged file."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from compressor import builtin
from compressor.errors import CompressorError


def test_shapes_is_a_diffusers_folder():
    assert "shapes" in builtin.names()
    assert (builtin.path("shapes") / "model_index.json").is_file()


def test_every_weights_file_has_a_hash():
    root = builtin.path("shapes").parent
    listed = set(json.loads((root / "hashes.json").read_text())["sha256"])
    assert listed == {file.relative_to(root).as_posix() for file in root.rglob("*.safetensors")}


def test_the_whole_folder_is_at_most_sixteen_megabytes():
    assert sum(file.stat().st_size for file in builtin.path("shapes").rglob("*") if file.is_file()) <= 16_000_000


@pytest.mark.parametrize("name", sorted(set(builtin.names()) - {"shapes"}))
def test_each_other_folder_is_at_most_eight_megabytes(name):
    assert sum(file.stat().st_size for file in builtin.path(name).rglob("*") if file.is_file()) <= 8_000_000


@pytest.mark.parametrize("name", builtin.names())
def test_nothing_shipped_is_pickled(name):
    kinds = {file.suffix for file in builtin.path(name).rglob("*") if file.is_file()}
    assert kinds == {".json", ".safetensors"}


@pytest.mark.parametrize("name", builtin.names())
def test_nothing_shipped_says_where_it_was_made(name):
    for file in builtin.path(name).rglob("*.json"):
        text = file.read_text(encoding="utf-8")
        assert "_name_or_path" not in text, file
        assert "/tmp" not in text, file


def test_all_pipelines_share_the_autoencoder_and_the_tokenizer():
    for name in builtin.names():
        for part in ("vae/diffusion_pytorch_model.safetensors", "tokenizer/tokenizer.json"):
            assert (builtin.path(name) / part).read_bytes() == (builtin.path("shapes") / part).read_bytes()


@pytest.mark.parametrize(
    ("ask", "what", "known"),
    [
        (builtin.path, "pipeline", builtin.names()),
        (lambda name: builtin.prompts(name, "calibration"), "prompts", builtin.prompt_names()),
    ],
)
def test_an_unknown_name_lists_the_known_ones(ask, what, known):
    with pytest.raises(CompressorError) as error:
        ask("shape")
    assert str(error.value) == f"no built-in {what} named 'shape'; did you mean 'shapes'? known: {', '.join(known)}"
    with pytest.raises(CompressorError) as error:
        ask("flowers")
    assert str(error.value) == f"no built-in {what} named 'flowers'; known: {', '.join(known)}"


def test_captions_are_prompts_and_no_pipeline():
    assert set(builtin.prompt_names()) - set(builtin.names()) == {"captions"}
    with pytest.raises(CompressorError, match=r"^no built-in pipeline named 'captions'; known: "):
        builtin.path("captions")


def test_the_prompts_are_the_two_lists():
    assert len(builtin.prompts("shapes", "calibration")) == len(builtin.prompts("shapes", "evaluation")) == 1024
    assert not set(builtin.prompts("shapes", "calibration")) & set(builtin.prompts("shapes", "evaluation"))


def _copied(tmp_path: Path) -> Path:
    root = builtin.path("shapes").parent
    copy = tmp_path / "shapes"
    shutil.copytree(root / "pipeline" / "vae", copy / "pipeline" / "vae")
    hashes = json.loads((root / "hashes.json").read_text())
    hashes["sha256"] = {name: value for name, value in hashes["sha256"].items() if "/vae/" in name}
    (copy / "hashes.json").write_text(json.dumps(hashes))
    return copy


def test_a_damaged_file_is_named_with_both_hashes(tmp_path, monkeypatch):
    copy = _copied(tmp_path)
    monkeypatch.setattr(builtin, "_SHAPES", copy)
    assert builtin.path("shapes") == copy / "pipeline"
    file = copy / "pipeline" / "vae" / "diffusion_pytorch_model.safetensors"
    expected = builtin._index(copy)["sha256"]["pipeline/vae/diffusion_pytorch_model.safetensors"]
    file.write_bytes(b"abc")
    with pytest.raises(CompressorError) as error:
        builtin.path("shapes")
    found = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # the published sha256 of "abc"
    assert str(error.value) == (
        f"{file}: weights file is damaged; found sha256 {found}, expected {expected}; install the package anew"
    )
    file.unlink()
    with pytest.raises(CompressorError) as error:
        builtin.path("shapes")
    assert str(error.value) == f"{file}: weights file is missing; expected one with sha256 {expected}"


@pytest.mark.parametrize("content", ["", "{", None])
def test_a_damaged_list_of_hashes_is_named(tmp_path, monkeypatch, content):
    monkeypatch.setattr(builtin, "_SHAPES", tmp_path)
    if content is not None:
        (tmp_path / "hashes.json").write_text(content)
    with pytest.raises(CompressorError) as error:
        builtin.path("shapes")
    assert str(error.value).startswith(f"{tmp_path}/hashes.json: missing or damaged: ")
    assert str(error.value).endswith("; install the package anew")


def test_looking_up_a_name_imports_neither_torch_nor_diffusers():
    code = (
        "import sys; from compressor import builtin; builtin.path('shapes'); builtin.prompts('shapes', 'evaluation');"
        "print(sorted({'torch', 'diffusers', 'transformers'} & set(sys.modules)))"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )
