"""Results on disk: written whole or not at all, held against their hashes, never in the place of what is not ours."""

import json
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel

import compressor
from compressor import checkpoint, pipeline, recipe
from compressor import output as places
from compressor.errors import CompressorError
from compressor.output import claim
from compressor.progress import Progress
from compressor.recipe import Model
from compressor.run import run
from compressor.units import size
from tests import tiny

pytestmark = pytest.mark.usefixtures("looked_at_once")
RECORD = {"recipe": {"export": []}}


@pytest.fixture
def loaded() -> pipeline.Pipeline:
    return tiny.load("sd3")


@pytest.fixture
def result(loaded, tmp_path) -> Path:
    """A saved result and nothing beside it."""
    folder = tmp_path / "place" / "out"
    folder.parent.mkdir()
    checkpoint.save(loaded, folder, RECORD)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """While it lasts, no file can grow beyond a size, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def damaging(monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], None]) -> None:
    """From now on, what is written is damaged before it is proved."""
    write = checkpoint._write

    def damaged(pipeline: pipeline.Pipeline, target: Path) -> None:
        write(pipeline, target)
        damage(target)

    monkeypatch.setattr(checkpoint, "_write", damaged)


def test_weights_that_do_not_reload_as_they_were_are_named_and_nothing_is_kept(loaded, tmp_path, monkeypatch):
    def zero_the_end(target: Path) -> None:
        file = target / "transformer" / "diffusion_pytorch_model.safetensors"
        file.write_bytes(file.read_bytes()[:-400] + bytes(400))

    damaging(monkeypatch, zero_the_end)
    words = (
        r"^the saved transformer does not reload as it was: it differs in \d+ tensors?, [\w.]+ first; nothing was kept$"
    )
    with pytest.raises(CompressorError, match=words):
        checkpoint.save(loaded, tmp_path / "out", RECORD)
    assert list(tmp_path.iterdir()) == []


def test_a_config_with_which_the_same_weights_compute_something_else_is_told(tmp_path, monkeypatch):
    def halve_the_heads(target: Path) -> None:
        file = target / "unet" / "config.json"
        config = json.loads(file.read_text())
        file.write_text(json.dumps(config | {"attention_head_dim": [1, 2]}))

    damaging(monkeypatch, halve_the_heads)
    words = r"^the saved unet does not reload as it was: one forward differs by up to [\d.e-]+; nothing was kept$"
    with pytest.raises(CompressorError, match=words):
        checkpoint.save(tiny.load("sd2"), tmp_path / "out", RECORD)
    assert list(tmp_path.iterdir()) == []


def test_what_is_saved_loads_with_plain_diffusers_as_the_same_bits(loaded, result):
    plain = SD3Transformer2DModel.from_pretrained(result / "transformer")
    for name, tensor in loaded.module.state_dict().items():
        assert torch.equal(plain.state_dict()[name], tensor)
    assert not list(result.rglob("*.bin"))
    assert [path.name for path in result.parent.iterdir()] == ["out"]


def test_it_is_a_folder_that_others_may_read(result):
    assert result.stat().st_mode & 0o777 == 0o755


def test_the_record_has_the_hash_of_every_other_file(result):
    record = json.loads((result / "compression.json").read_text())
    assert set(record["files"]) == set(contents(result)) - {"compression.json"}
    assert checkpoint.verify(result) == record


def test_no_file_says_where_the_model_came_from(result):
    source = str(tiny.folder("sd3").parent)
    for name, content in contents(result).items():
        assert source.encode() not in content, name
        assert b"_name_or_path" not in content, name


def test_saving_leaves_the_network_as_it_was_computed():
    network = pipeline.load(Model(source=str(tiny.folder("sd3", torch.float16)), dtype="float32"), "cpu")
    before = {name: tensor.clone() for name, tensor in network.module.state_dict().items()}
    undo = checkpoint._cast_to_stored(network, "transformer")
    assert network.module.state_dict()["proj_out.weight"].dtype == torch.float16
    undo()
    after = network.module.state_dict()
    assert all(
        after[name].dtype == tensor.dtype and torch.equal(after[name], tensor) for name, tensor in before.items()
    )


def test_a_result_is_stored_in_the_dtype_of_its_source(tmp_path):
    network = pipeline.load(Model(source=str(tiny.folder("sd3", torch.float16))), "cpu")
    assert network.dtype == torch.float32
    checkpoint.save(network, tmp_path / "out", RECORD)
    source = tiny.folder("sd3", torch.float16)
    for file in ("transformer/diffusion_pytorch_model", "text_encoder/model", "vae/diffusion_pytorch_model"):
        size, expected = ((folder / f"{file}.safetensors").stat().st_size for folder in (tmp_path / "out", source))
        assert size == pytest.approx(expected, rel=0.02)


def test_a_network_that_gives_values_that_are_not_finite_is_not_kept(loaded, tmp_path):
    loaded.module.proj_out.weight.data.fill_(float("inf"))
    with pytest.raises(CompressorError, match=r"^the (saved|pruned) transformer .*; nothing was kept$"):
        checkpoint.save(loaded, tmp_path / "out", RECORD)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:-7]), "damaged or changed: should have sha256 "),
        (lambda file: file.write_bytes(b"\xff" + file.read_bytes()[1:]), "damaged or changed: should have sha256 "),
        (Path.unlink, "missing; compression.json lists it"),
    ],
    ids=["truncated", "changed", "missing"],
)
@pytest.mark.parametrize("name", ["transformer/diffusion_pytorch_model.safetensors", "model_index.json"])
def test_a_file_that_is_not_as_it_was_written_is_named(result, harm, words, name):
    harm(result / name)
    with pytest.raises(CompressorError) as caught:
        compressor.load(result)
    assert str(caught.value).startswith(f"{result / name}: {words}")


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "vae/../../secret", "."])
def test_a_record_that_names_a_file_outside_is_refused(result, name):
    (result.parent / "secret").write_text("x")
    record = json.loads((result / "compression.json").read_text())
    record["files"][name] = checkpoint.sha256(result.parent / "secret")
    (result / "compression.json").write_text(json.dumps(record))
    with pytest.raises(CompressorError) as caught:
        checkpoint.verify(result)
    assert str(caught.value) == f"{result}/compression.json: names a file outside its folder: {name}"


def test_a_link_that_leaves_the_folder_is_refused(result):
    config = result / "vae" / "config.json"
    shutil.move(config, result.parent / "config.json")
    config.symlink_to(result.parent / "config.json")
    with pytest.raises(CompressorError, match=r"names a file outside its folder: vae/config\.json$"):
        checkpoint.verify(result)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": 1, "files": []}', '{"files": {}}', "\ud800"])
def test_a_damaged_record_is_named(tmp_path, text):
    (tmp_path / "compression.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(CompressorError, match=r"compression\.json: damaged: "):
        checkpoint.verify(tmp_path)


def test_a_record_of_another_format_is_named(tmp_path):
    (tmp_path / "compression.json").write_text('{"format": 2, "files": {}}')
    with pytest.raises(
        CompressorError, match=r"compression\.json: should be of format 1, found 2; update the package$"
    ):
        checkpoint.verify(tmp_path)


def test_a_folder_without_a_record_is_no_result(tmp_path):
    with pytest.raises(CompressorError) as caught:
        compressor.load(tmp_path)
    assert str(caught.value) == f"{tmp_path}: should be a result of `compressor run`, found no compression.json"


def test_saving_again_replaces_the_whole_result(loaded, result):
    (result / "report.html").write_text("old")
    (result / "onnx").mkdir()
    checkpoint.save(loaded, result, {**RECORD, "more": 1})
    assert json.loads((result / "compression.json").read_text())["more"] == 1
    assert not (result / "report.html").exists()
    assert [path.name for path in result.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("size", [100, 10_000, 60_000])
def test_a_full_disk_leaves_the_old_result_and_nothing_else(loaded, result, size):
    before = contents(result)
    with largest_file(size), pytest.raises(CompressorError) as caught:
        checkpoint.save(loaded, result, RECORD)
    assert str(caught.value).startswith(f"the result cannot be written to {result}: ")
    assert "File too large" in str(caught.value)
    assert str(caught.value).endswith(f"; the earlier result in {result} is intact")
    assert contents(result) == before
    assert [path.name for path in result.parent.iterdir()] == ["out"]


def test_a_full_disk_leaves_nothing_where_there_was_nothing(loaded, tmp_path):
    with largest_file(10_000), pytest.raises(CompressorError, match=r"File too large[^;]*$"):
        checkpoint.save(loaded, tmp_path / "out", RECORD)
    assert not list(tmp_path.iterdir())


def test_a_disk_without_room_is_found_out_before_the_work(loaded, result, monkeypatch):
    needed = sum(file.stat().st_size for file in result.rglob("*.safetensors"))
    for free, enough in ((0.8 * needed, False), (1.1 * needed, True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _path, free=free: SimpleNamespace(free=int(free)))
        if enough:
            checkpoint.check_space(loaded, result, {})
        else:
            with pytest.raises(
                CompressorError,
                match=r"^output: .*/out needs [\d.]+ kB on its disk \(the result [\d.]+ kB\), found [\d.]+ kB free; "
                r"nothing was begun$",
            ):
                checkpoint.check_space(loaded, result, {})


def test_the_exports_need_room_too_for_which_the_earlier_result_makes_way(loaded, result, tmp_path, monkeypatch):
    needed = sum(file.stat().st_size for file in result.rglob("*.safetensors"))
    earlier = sum(file.stat().st_size for file in result.rglob("*") if file.is_file())
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(free=2 * needed))
    checkpoint.check_space(loaded, tmp_path / "new", {"onnx": int(0.9 * needed)})
    with pytest.raises(CompressorError) as caught:
        checkpoint.check_space(loaded, tmp_path / "new", {"onnx": 2 * needed, "tensorrt": 9000})
    assert " (the result " in str(caught.value)
    assert f", onnx {size(2 * needed)}, tensorrt 9.00 kB), found {size(2 * needed)} free" in str(caught.value)
    checkpoint.check_space(loaded, result, {"onnx": needed + int(0.9 * earlier)})
    with pytest.raises(CompressorError, match=r"on its disk"):
        checkpoint.check_space(loaded, result, {"onnx": 2 * needed + earlier})


@pytest.mark.parametrize(
    ("module", "step"), [(checkpoint, "_write"), (checkpoint, "_prove"), (places, "_swap"), (checkpoint, "sha256")]
)
def test_an_interrupt_while_saving_leaves_the_old_result_and_nothing_else(loaded, result, monkeypatch, module, step):
    before = contents(result)

    def interrupt(*_args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, step, interrupt)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(loaded, result, RECORD)
    assert contents(result) == before
    assert [path.name for path in result.parent.iterdir()] == ["out"]


def test_an_interrupt_while_the_folders_change_places_comes_after_it(loaded, result, monkeypatch):
    import signal

    swap = places._swap

    def interrupted_swap(new: Path, output: Path) -> None:
        signal.raise_signal(signal.SIGINT)
        swap(new, output)

    monkeypatch.setattr(places, "_swap", interrupted_swap)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(loaded, result, {**RECORD, "more": 1})
    assert checkpoint.verify(result)["more"] == 1
    assert [path.name for path in result.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("failing", [2, 3])
def test_a_swap_that_fails_loses_neither_result(loaded, result, monkeypatch, failing):
    before, rename, calls = contents(result), Path.rename, 0

    def broken(self: Path, target: Path) -> Path:
        nonlocal calls
        calls += 1
        if calls in (2, failing):  # 1: the old one aside, 2: the new one in its place, 3: the old one back
            raise OSError(30, "Read-only file system", str(self))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", broken)
    with pytest.raises(OSError, match="Read-only file system"):
        checkpoint.save(loaded, result, {**RECORD, "more": 1})
    kept = result if failing == 2 else next(result.parent.glob(".out.*/out"))
    assert contents(kept) == before
    assert len(list(result.parent.iterdir())) == 1


def test_a_result_behind_a_link_is_replaced_where_it_lies(loaded, result):
    link = result.parent.parent / "link"
    link.symlink_to(result)
    claim(link, None, overwrite=False)
    checkpoint.save(loaded, link, {**RECORD, "more": 1})
    assert link.is_symlink()
    assert checkpoint.verify(result)["more"] == 1


def test_a_new_or_empty_folder_and_an_earlier_result_may_be_written(result, tmp_path):
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "new" / "deep", tmp_path / "empty", result):
        claim(folder, tiny.folder("sd3"), overwrite=False)
    assert checkpoint.verify(result)


def test_a_folder_that_is_not_ours_is_refused_unless_told_otherwise(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(CompressorError) as caught:
        claim(tmp_path / "mine", None, overwrite=False)
    assert str(caught.value) == (
        f"output: {tmp_path}/mine exists and is no earlier result, or not only that: it holds thesis.txt; "
        "choose another folder, or give --overwrite to replace it and all that it holds"
    )
    claim(tmp_path / "mine", None, overwrite=True)
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_a_folder_of_ours_in_which_someone_put_a_file_is_refused(result):
    for ours in ("report.html", "report.json"):
        (result / ours).write_text("x")
    claim(result, None, overwrite=False)
    (result / "recipe.yaml").write_text("x")
    with pytest.raises(CompressorError, match=r"or not only that: it holds recipe\.yaml; "):
        claim(result, None, overwrite=False)
    (result / "recipe.yaml").rename(result / "transformer" / "notes.txt")
    with pytest.raises(CompressorError, match=r"or not only that: it holds transformer/notes\.txt; "):
        claim(result, None, overwrite=False)


def test_what_exporters_wrote_is_ours(loaded, tmp_path):
    checkpoint.save(loaded, tmp_path / "out", {"recipe": {"export": [{"onnx": {}}]}})
    (tmp_path / "out" / "onnx" / "transformer").mkdir(parents=True)
    (tmp_path / "out" / "onnx" / "transformer" / "model.onnx").write_text("x")
    claim(tmp_path / "out", None, overwrite=False)


def test_a_folder_with_a_record_of_another_program_is_refused(tmp_path):
    (tmp_path / "compression.json").write_text('{"level": 9}')
    with pytest.raises(CompressorError, match=r"it holds compression\.json; "):
        claim(tmp_path, None, overwrite=False)


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_folders_of_the_user_and_of_the_model_are_never_replaced(tmp_path, monkeypatch, overwrite):
    for name in ("here/deeper", "home", "models/one"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / "deeper")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    source = tmp_path / "models" / "one"
    for output, name in (
        (Path("."), "the current folder"),
        (Path(".."), "the current folder"),
        (Path(""), "the current folder"),
        (tmp_path / "here", "the current folder"),
        (tmp_path / "home", "the home folder"),
        (source, "the model that is read"),
        (tmp_path / "models" / "two" / ".." / "one", "the model that is read"),
        (tmp_path / "models", "the model that is read"),
        (Path("/"), "the model that is read"),
    ):
        with pytest.raises(CompressorError) as caught:
            claim(output, source, overwrite)
        assert str(caught.value) == f"output: {output} holds {name} and would be replaced; choose another folder"


def test_an_output_that_cannot_be_written_is_found_out_before_the_work(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CompressorError) as caught:
        claim(tmp_path / "file", None, overwrite=True)
    assert str(caught.value) == f"output: {tmp_path}/file is a file; should be a folder to write"
    with pytest.raises(CompressorError, match=r"file cannot be written: (File exists|Not a directory)$"):
        claim(tmp_path / "file" / "out", None, overwrite=True)
    with pytest.raises(CompressorError, match=r"^output: /proc cannot be written: No such file or directory$"):
        claim(Path("/proc/out"), None, overwrite=True)


def test_the_same_recipe_gives_the_same_bytes(tmp_path):
    text = {
        "model": str(tiny.folder("sd3")),
        "calibration": {"prompts": ["a cat", "a red dog"], "steps": 2, "packages": 2},
        "prune": [{"obs_diff": {"sparsity": 0.5}}],
        "report": {"images": 0},
    }
    found = []
    for name in ("first", "second"):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({**text, "output": str(tmp_path / name)}))
        run(recipe.load(tmp_path / f"{name}.yaml"), Progress())
        found.append({k: v for k, v in contents(tmp_path / name).items() if not k.startswith("report.")})
    assert found[0] == found[1]
    assert "compression.json" in found[0]
