"""The command line: quick where it can be, calm about mistakes and Ctrl-C, and honest about what it kept."""

import gc
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click.testing
import pytest
import yaml
from PIL import Image

from compressor import checkpoint, recipe
from compressor import run as running
from compressor.cli import main
from compressor.cli.ending import importing
from compressor.errors import CompressorError
from compressor.plugin import Export
from compressor.progress import Progress
from tests import tiny

pytestmark = pytest.mark.usefixtures("looked_at_once")


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def result(tmp_path_factory) -> Path:
    """The result of one run. Not to be changed."""
    folder = tmp_path_factory.mktemp("module")
    written = write(folder / "r.yaml", output=str(folder / "out"))
    running.run(recipe.load(written), Progress())
    return folder / "out"


def write(file: Path | str = "r.yaml", **changes: Any) -> str:
    data = {
        "model": str(tiny.folder("sd3")),
        "calibration": {"prompts": ["a cat", "a red dog"], "steps": 2, "packages": 2},
        "prune": [{"obs_diff": {"sparsity": 0.5}}],
        "report": {"images": 1, "steps": 2},
        "output": "out",
        **changes,
    }
    Path(file).write_text(yaml.safe_dump(data))
    return str(file)


def call(*arguments: str) -> click.testing.Result:
    """Runs a command in this process; what it raises beyond its exit code is raised here."""
    found = click.testing.CliRunner().invoke(main, list(arguments))
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        raise found.exception
    return found


def left_over() -> list[str]:
    return sorted(path.name for path in Path.cwd().iterdir() if path.name != "r.yaml")


def test_the_quick_commands_do_without_the_heavy_libraries():
    write()
    code = (
        "import sys\n"
        "from compressor.cli import main\n"
        "for line in sys.argv[1:]:\n"
        "    try: main(line.split())\n"
        "    except SystemExit as end: assert end.code == 0, (line, end.code)\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'numpy', 'matplotlib', 'PIL', 'onnx', 'rich'}\n"
        "sys.exit(', '.join(sorted(heavy & set(sys.modules))) or 0)\n"
    )
    lines = ["--help", "--version", "run --help", "plugins", "check r.yaml", "recipes", "recipes quickstart", "schema"]
    done = subprocess.run([sys.executable, "-c", code, *lines], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_module_is_the_command():
    done = subprocess.run([sys.executable, "-m", "compressor", "--version"], capture_output=True, text=True, check=True)
    assert "version" in done.stdout


@pytest.mark.parametrize("command", ["run", "plan", "check", "plugins", "recipes", "generate", "doctor", "schema"])
def test_every_command_is_listed_and_has_help(command):
    assert f"\n  {command} " in call("--help").stdout
    found = call(command, "-h")
    assert found.exit_code == 0
    assert len(found.stdout.splitlines()) > 3


def test_check_tells_a_good_recipe_from_a_bad_one():
    assert call("check", write()).stdout == "r.yaml: ok\n"
    write(modle="x", seed=-1)
    found = call("check", "r.yaml")
    assert found.exit_code == 1
    assert found.stdout == ""
    assert found.stderr == (
        "errors:\n"
        "r.yaml:8: modle: unknown key; did you mean 'model'?\n"
        "r.yaml:16: seed: should be at least 0, found -1\n"
    )


def test_check_reads_the_prompts():
    write(calibration={"prompts": "none.txt"})
    found = call("check", "r.yaml")
    assert (found.exit_code, found.stderr) == (1, "error: prompts: no such file: none.txt\n")
    write(report={"prompts": "empty.txt"})
    Path("empty.txt").write_text("\n")
    found = call("check", "r.yaml")
    assert (found.exit_code, found.stderr) == (
        1,
        "error: prompts: empty.txt holds no prompts; should hold at least one\n",
    )
    write(calibration={"prompts": "none.txt"}, report={"prompts": "empty.txt"})
    assert call("check", "r.yaml").stderr == (
        "errors:\nprompts: no such file: none.txt\nprompts: empty.txt holds no prompts; should hold at least one\n"
    )


def test_overrides_are_taken_by_every_command_that_reads_a_recipe():
    write()
    for command in ("check", "plan", "run"):
        found = call(command, "r.yaml", "--set", "prune.0.obs_diff.sparsity=50")
        assert found.exit_code == 1
        assert found.stderr == (
            "error: --set prune.0.obs_diff.sparsity: prune[0].obs_diff.sparsity: should be less than 1, found 50\n"
        )


@pytest.mark.parametrize(
    "arguments", [[], ["prune"], ["run"], ["run", "r.yaml", "--forse"], ["plan", "r.yaml", "more"]]
)
def test_a_call_that_makes_no_sense_is_exit_code_2(arguments):
    found = call(*arguments)
    assert found.exit_code == 2
    assert "Usage: " in found.output


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "nothing"}, "error: model.source: no folder 'nothing', and it is no hub id of the form org/name\n"),
        ({"device": "gpu"}, "error: device: 'gpu' cannot be used: "),
        ({"output": "."}, "error: output: . holds the current folder and would be replaced; choose another folder\n"),
        ({"export": ["onnx", "onnx"]}, "error: r.yaml:1: export names onnx twice; each exporter writes one folder, "),
        (
            {"prune": [{"obs_diff": {"granularity": {"n_m": {"keep": 2, "of": 5}}}}]},
            "error: transformer_blocks.0.attn.to_q: keep 2 of 5 needs a multiple of 5 inputs, found 16; ",
        ),
        (
            {"prune": [{"obs_diff": {"sparsity": 0.5}, "targets": {"include": ["nothing"]}}]},
            "error: prune[0].targets: 'nothing' matches none of the 21 layers; ",
        ),
        (
            {"calibration": {"prompts": ["a"], "height": 18}},
            "error: calibration.height: should be a multiple of 4 pixels, found 18\n",
        ),
    ],
)
def test_a_mistake_is_one_line_without_a_traceback(changes, words):
    found = call("run", write(**changes))
    assert found.exit_code == 1
    lines = [line for line in found.stderr.splitlines(keepends=True) if not line.startswith("loading ")]
    assert len(lines) == 1
    assert lines[0].startswith(words)
    assert left_over() == []


def test_a_folder_that_is_not_ours_is_replaced_only_if_told_so():
    Path("out").mkdir()
    Path("out/thesis.txt").write_text("x")
    found = call("run", write(report={"images": 0}))
    assert found.exit_code == 1
    assert "it holds thesis.txt" in found.stderr
    assert Path("out/thesis.txt").exists()
    found = call("run", "r.yaml", "--overwrite")
    assert found.exit_code == 0
    assert not Path("out/thesis.txt").exists()
    assert call("run", "r.yaml").exit_code == 0  # an earlier result needs no telling


def test_a_run_ends_with_where_the_result_is():
    found = call("run", write())
    assert found.exit_code == 0
    assert found.stdout == "result: out\nreport: out/report.html\n"
    assert checkpoint.verify(Path("out"))
    assert json.loads(Path("out/report.json").read_text())
    assert left_over() == ["out"]


MOMENTS = [
    "loading ",
    "drawing, dense ...",
    "calibrating, package 1",
    "calibrating, package 2",
    "drawing, pruned ...",
    "saving to ",
]


def interrupt_at(monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    say = Progress.say

    def interrupting(self: Progress, text: str) -> None:
        say(self, text)
        if text.startswith(moment):
            raise KeyboardInterrupt

    monkeypatch.setattr(Progress, "say", interrupting)


@pytest.mark.parametrize("moment", MOMENTS)
def test_ctrl_c_before_the_result_keeps_nothing_and_says_so(monkeypatch, moment):
    interrupt_at(monkeypatch, moment)
    found = call("run", write())
    assert found.exit_code == 130
    assert found.stderr.endswith("\ninterrupted: nothing was kept\n")
    assert left_over() == []


def test_ctrl_c_leaves_an_earlier_result_as_it_was(monkeypatch):
    assert call("run", write()).exit_code == 0
    before = {file: file.read_bytes() for file in Path("out").rglob("*") if file.is_file()}
    interrupt_at(monkeypatch, "saving to ")
    found = call("run", "r.yaml", "--set", "seed=1")
    assert found.exit_code == 130
    assert found.stderr.endswith("\ninterrupted: nothing new was kept; the earlier result in out is as it was\n")
    assert {file: file.read_bytes() for file in Path("out").rglob("*") if file.is_file()} == before
    assert left_over() == ["out"]


@pytest.mark.parametrize("moment", ["report", "export"])
def test_ctrl_c_after_the_result_keeps_it_and_says_so(monkeypatch, moment):
    if moment == "export":
        interrupt_at(monkeypatch, "exporting with onnx")
    else:

        def interrupt(*_args: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(running.report, "write", interrupt)
    found = call("run", write(export=["onnx"]))
    assert found.exit_code == 130
    assert found.stderr.endswith("\ninterrupted: the pruned pipeline in out is complete; what was to follow is not\n")
    assert checkpoint.verify(Path("out"))
    assert left_over() == ["out"]
    assert not list(Path("out").rglob("*.onnx"))


def test_ctrl_c_that_a_library_makes_an_error_of_is_still_an_interruption(monkeypatch):
    from compressor_onnx import ONNX

    def export(*_args: object) -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt as error:
            raise CompressorError("torch cannot export this") from error

    monkeypatch.setattr(ONNX, "export", export)
    found = call("run", write(export=["onnx"]))
    assert found.exit_code == 130
    assert found.stderr.endswith("\ninterrupted: the pruned pipeline in out is complete; what was to follow is not\n")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_keeps_the_entries_that_were_compared_and_says_which():
    write(prune=[{"magnitude": {"sparsity": share}} for share in (0.3, 0.4, 0.5)])
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, "loading ")
        found = call("compare", "r.yaml", "--out", "compared")
        assert found.exit_code == 130
        assert found.stderr.endswith("\ninterrupted: nothing was compared\n")
        assert not any(Path("compared").iterdir())
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, "3 of 3: ")
        found = call("compare", "r.yaml", "--out", "compared")
    assert found.exit_code == 130
    assert found.stderr.endswith("\ninterrupted: 2 of 3 entries were compared: compared/compare.md\n")
    kept = json.loads(Path("compared/compare.json").read_text())
    assert [row["pruner"] for row in kept["rows"]] == ["magnitude, sparsity 0.3", "magnitude, sparsity 0.4"]
    assert len(Path("compared/compare.md").read_text().splitlines()) == 4
    assert sorted(path.name for path in Path("compared").iterdir()) == ["compare.json", "compare.md"]


def start_run() -> subprocess.Popen[str]:
    calibration = {"prompts": ["a cat"] * 100, "steps": 50, "batch": 1, "packages": 2}
    command = [sys.executable, "-m", "compressor", "run", write(calibration=calibration, report={"images": 0})]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_garbage_is_not_looked_for_while_a_command_imports():
    assert gc.isenabled()
    with importing():
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(ImportError), importing():
        raise ImportError
    assert gc.isenabled()


def test_a_real_ctrl_c_ends_the_process_with_130_and_leaves_nothing():
    process = start_run()
    try:
        assert process.stderr is not None
        assert any(line.startswith("calibrating, package 1 of 2 ...") for line in process.stderr)
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert stderr.endswith("\ninterrupted: nothing was kept\n")
    assert "Traceback" not in stderr
    assert left_over() == []


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="sees what is being imported in /proc")
def test_a_real_ctrl_c_while_torch_is_imported_ends_the_process_at_once():
    process = start_run()
    try:
        while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert stderr.splitlines()[-1] == "interrupted: nothing was begun"
    assert "Traceback" not in stderr
    assert left_over() == []


def test_a_full_disk_while_the_report_is_written_keeps_the_result(monkeypatch):
    def fill(*_args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(running.report, "write", fill)
    found = call("run", write())
    assert found.exit_code == 1
    assert found.stderr.splitlines()[-1] == (
        "error: the report cannot be written to out: No space left on device; the pruned pipeline there is complete"
    )
    assert checkpoint.verify(Path("out"))


def test_a_failed_export_keeps_the_result_and_no_half_of_the_export(monkeypatch):
    from compressor_onnx import ONNX

    def fail(_self: ONNX, _pipeline: object, folder: Path) -> None:
        (folder / "half").write_text("x")
        raise CompressorError("the file differs from torch")

    monkeypatch.setattr(ONNX, "export", fail)
    found = call("run", write(export=["onnx"]))
    assert found.exit_code == 1
    assert found.stderr.endswith("errors:\nonnx: the file differs from torch\nthe pruned pipeline is kept in out\n")
    assert checkpoint.verify(Path("out"))
    assert not Path("out/onnx").exists()


def test_a_disk_that_fills_while_pictures_are_saved_leaves_no_half_of_one(result, monkeypatch):
    save = Image.Image.save

    def fill(image: Image.Image, path: Path) -> None:
        if path.name == "0001.png":
            path.touch()
            raise OSError(28, "No space left on device")
        save(image, path)

    monkeypatch.setattr(Image.Image, "save", fill)
    found = call("generate", str(result), "--prompt", "a", "--prompt", "b", "--steps", "1", "--out", "images")
    assert found.exit_code == 1
    assert found.stderr.endswith("error: images/0001.png: No space left on device; the pictures before it are whole\n")
    assert [path.name for path in Path("images").iterdir()] == ["0000.png"]


@pytest.mark.parametrize("where", ["export", "manifest"])
def test_a_disk_that_fills_while_exporting_keeps_the_result_and_no_half_of_the_export(monkeypatch, where):
    from compressor_onnx import ONNX

    def fill(*_args: object) -> None:
        raise OSError(28, "No space left on device")

    if where == "export":
        monkeypatch.setattr(ONNX, "export", fill)
    else:
        monkeypatch.setattr(ONNX, "export", lambda _self, _pipeline, _folder: Export(()))
        monkeypatch.setattr(running.exported, "write", fill)
    found = call("run", write(export=["onnx"]))
    assert found.exit_code == 1
    assert found.stderr.endswith(
        "errors:\nonnx: out/onnx: No space left on device\nthe pruned pipeline is kept in out\n"
    )
    assert checkpoint.verify(Path("out"))
    assert not Path("out/onnx").exists()


def test_a_disk_without_room_for_the_exports_is_told_before_anything_is_pruned(monkeypatch):
    from compressor_onnx import ONNX

    monkeypatch.setattr(ONNX, "space", lambda _self, _pipeline: 10**16)
    found = call("run", write(export=["onnx"]))
    assert found.exit_code == 1
    assert re.search(
        r"^error: output: out needs 10000 TB on its disk \(the result [\d.]+ kB, onnx 10000 TB\), found [\d.]+ \wB "
        r"free; nothing was begun$",
        found.stderr,
        re.MULTILINE,
    )
    assert "pruning" not in found.stderr
    assert not Path("out").exists()


def test_what_of_the_loaded_model_cannot_be_exported_is_told_before_anything_is_pruned(monkeypatch):
    from compressor_onnx import ONNX

    def refuse(_self: ONNX, _pipeline: object) -> int:
        raise CompressorError("components: no 'vae_encoder' to export: a Tiny cannot be written as ONNX yet")

    monkeypatch.setattr(ONNX, "space", refuse)
    found = call("run", write(export=["onnx"]))
    assert found.stderr.endswith(
        "error: export[0].onnx.components: no 'vae_encoder' to export: a Tiny cannot be written as ONNX yet\n"
    )
    assert not Path("out").exists()


def test_plan_prints_a_table_or_json():
    table = call("plan", write()).stdout
    assert "family sd3, 21 linears" in table
    assert "transformer_blocks.1.ff.net.2" not in table
    assert "transformer_blocks.1.ff.net.2" in call("plan", "r.yaml", "--layers").stdout
    data = json.loads(call("plan", "r.yaml", "--json").stdout)
    assert data["linears"] == len(data["entries"][0]["layers"]) == 21
    assert data["entries"][0]["forwards"] == 2 * 2 * 1
    assert not Path("out").exists()


def test_plugins_are_listed_by_kind_with_their_origin():
    lines = call("plugins").stdout.splitlines()
    assert "pruner" in lines
    assert any(line.split()[:2] == ["obs_diff", "compressor_obs_diff:OBSDiff"] for line in lines)
    assert any("(diffusion-compressor " in line for line in lines)


def test_recipes_are_listed_and_printed():
    assert "quickstart" in call("recipes").stdout
    text = call("recipes", "quickstart").stdout
    assert yaml.safe_load(text)["model"] == "builtin:shapes"
    found = call("recipes", "quickstrat")
    assert (found.exit_code, found.stderr) == (1, "error: no recipe named 'quickstrat'; did you mean 'quickstart'?\n")


def test_doctor_tells_versions_devices_exporters_and_plugins():
    text = call("doctor").stdout
    for heading in ("versions", "devices", "exporters", "plugins"):
        assert f"{heading}\n" in text
    assert "obs_diff" in text
    assert " torch " in text


def test_doctor_goes_on_where_a_plugin_is_broken(tmp_path, monkeypatch):
    info = tmp_path / "site" / "other-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1\n")
    entries = "[compressor.exporters]\nbroken = nothing_there:X\n[compressor.pruners]\nwanda = nothing_there:X\n"
    (info / "entry_points.txt").write_text(entries)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    found = call("doctor")
    assert found.exit_code == 0
    assert "exporter 'broken' (nothing_there:X of other) cannot be loaded: ModuleNotFoundError" in found.stdout
    assert "two plugins register the pruner 'wanda'" in found.stdout


def test_generate_draws_the_same_pictures_for_the_same_seed(result):
    arguments = ["generate", str(result), "--prompt", "a cat", "--prompt", "a dog", "--steps", "2"]
    for out in ("a", "b"):
        found = call(*arguments, "--out", out)
        assert found.exit_code == 0
        assert found.stdout == f"{out}/0000.png  a cat\n{out}/0001.png  a dog\n"
    assert Path("a/0000.png").read_bytes() == Path("b/0000.png").read_bytes()
    assert Path("a/0000.png").read_bytes() != Path("a/0001.png").read_bytes()
    with Image.open("a/0000.png") as image:
        assert image.size == (16, 16)
    call(*arguments, "--out", "c", "--seed", "1", "--height", "24")
    with Image.open("c/0000.png") as image:
        assert image.size == (16, 24)


def test_generate_reads_prompts_from_a_file(result):
    Path("p.txt").write_text("a cat\n\na dog\n")
    found = call("generate", str(result), "--prompts", "p.txt", "--steps", "1")
    assert found.stdout == "images/0000.png  a cat\nimages/0001.png  a dog\n"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 2, "give --prompt or --prompts"),
        (["--prompt", "a", "--height", "18"], 1, "error: --height: should be a multiple of 4 pixels, found 18"),
        (["--prompt", "a", "--width", "64"], 1, "error: --width: should be at most 32 pixels, found 64"),
        (["--prompts", "none.txt"], 1, "error: prompts: no such file: none.txt"),
        (["--prompt", "a", "--steps", "0"], 2, "Invalid value for '--steps'"),
        (["--prompt", "a", "--seed", "-1"], 2, "Invalid value for '--seed'"),
        (["--prompt", "a", "--device", "gpu"], 1, "error: device: 'gpu' cannot be used"),
        (["--prompt", "a", "--out", "r.yaml"], 1, "error: r.yaml: File exists"),
    ],
)
def test_generate_names_what_is_wrong(result, arguments, code, words):
    write()
    found = call("generate", str(result), *arguments)
    assert found.exit_code == code
    assert words in found.stderr
    assert left_over() == []


def test_generate_needs_a_result(result):
    found = call("generate", str(tiny.folder("sd3")), "--prompt", "a")
    assert found.exit_code == 1
    assert found.stderr.endswith("should be a result of `compressor run`, found no compression.json\n")
    found = call("generate", "nothing", "--prompt", "a")
    assert (found.exit_code, found.stderr) == (
        1,
        "error: nothing: should be a result of `compressor run`, found no compression.json\n",
    )
