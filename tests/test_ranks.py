"""Runs that several processes share, as torchrun starts them: gloo on the CPU."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from compressor_obs_diff import layers
from compressor_obs_diff.granularities import Unstructured
from compressor_obs_diff.weightings import LogDecrease
from compressor_onnx import ONNX
from safetensors.torch import load_file
from torch import Tensor

from compressor import cli, pipeline, prepare, recipe
from compressor.calibration import Calibration, Moments
from compressor.calibration.packages import cut, deal
from compressor.errors import CompressorError
from compressor.ranks import Ranks, joined, sources
from compressor.recipe import Calibration as Options
from compressor.recipe import Model
from compressor.run import run
from compressor.structure import Target, find_groups
from tests import tiny
from tests.processes import Ended, together

HEADS = {"heads": 0.5, "neurons": 0.5, "multiple": 1, "keep_first": 0, "keep_last": 0}
CALIBRATION: dict[str, Any] = {
    "prompts": list(tiny.PROMPTS[:5]),
    "steps": 2,
    "batch": 2,
    "packages": 2,
    "height": tiny.SIDE,
    "width": tiny.SIDE,
}
BOTH = [
    {"obs_diff": {"sparsity": 0.5}, "targets": {"include": ["attention"]}},
    {"magnitude": {"sparsity": 0.5}, "targets": {"include": ["feed_forward"]}},
]
Found = dict[str, dict[str, Tensor | None]]


def gather(folder: Path, options: dict[str, Any], kind: Any, deal_out: bool) -> tuple[list[Found], dict[str, Any]]:
    """What the processes that share a calibration have of the moments of each package; in one process, all."""
    if "RANK" not in os.environ:
        return _gather(Ranks(), folder, options, kind, deal_out)
    with joined() as shared:
        found = _gather(shared, folder, options, kind, deal_out)
        shared.leave()
    return found


def _gather(
    ranks: Ranks, folder: Path, options: dict[str, Any], kind: Any, deal_out: bool
) -> tuple[list[Found], dict[str, Any]]:
    loaded = pipeline.load(Model(source=str(folder)), "cpu")
    checked = Options.model_validate({"guidance": 3.0, **CALIBRATION, **options})
    calibration = Calibration(
        loaded, tiny.traced(loaded), checked, options.get("prompts", CALIBRATION["prompts"]), 0, tiny.quiet(), ranks
    )
    found = []
    for package in calibration.packages(loaded.targets, kind, tiny.no_workspace, deal_out=deal_out):
        moments = calibration.collect(package, kind, LogDecrease())
        found.append({name: plain for group in moments for name, plain in _plain(group, moments[group]).items()})
    facts = calibration.facts
    counts = {"forwards": facts.forwards, "differentiated": facts.differentiated, "tokens": facts.tokens}
    return found, {**counts, "warnings": facts.warnings}


def _plain(name: str, moments: Moments) -> Found:
    sums = ("squares_I", "total_I", "second_II", "tokens", "skipped", "weight")
    found = {name: {each: getattr(moments, each) for each in sums}}
    for target, other in moments.gradients.items():
        found[f"gradients of {target}"] = {each: getattr(other, each) for each in ("second_BKK", "tokens", "skipped")}
    return found


@pytest.mark.parametrize(
    ("count", "batch", "tokens", "deal_out"),
    [(2, 2, 1.0, True), (2, 2, 0.5, False), (4, 1, 0.5, True)],
    ids=["two", "two, not dealt", "four"],
)
def test_moments_are_those_of_one_process_up_to_the_order_of_summation(count, batch, tokens, deal_out, tmp_path):
    options = {"batch": batch, "tokens": tokens}
    given = (tiny.folder("sd3"), options, "gradients", deal_out)
    expected, facts = gather(*given)
    ended = together(count, gather, *given, folder=tmp_path)
    assert [process.code for process in ended] == [0] * count, ended
    for number, package in enumerate(expected):
        shares = [process.result[0][number] for process in ended]
        owned = [name for share in shares for name in share]
        assert sorted(owned) == sorted(package) if deal_out else sorted(owned) == sorted([*package] * count)
        for share in shares:
            for name, sums in share.items():
                for each, tensor in sums.items():
                    whole = package[name][each]
                    assert tensor is not None
                    assert whole is not None
                    if not tensor.is_floating_point():
                        assert torch.equal(tensor, whole), (name, each)
                    assert (tensor - whole).double().norm() <= 1e-5 * whole.double().norm(), (name, each)
    for process in ended:
        assert process.result[1] == facts


def write(folder: Path, prune: list[dict], kind: str = "sd3", **changes: object) -> Path:
    folder.mkdir(exist_ok=True)
    data = {
        "model": str(tiny.folder(kind)),
        "device": "cpu",
        "calibration": CALIBRATION,
        "prune": prune,
        "report": {"images": 3, "steps": 1, "metrics": ["pairs"]},
        "output": str(folder / "out"),
    }
    file = folder / "r.yaml"
    file.write_text(yaml.safe_dump(data | changes))
    return file


def command(*arguments: str) -> None:
    """What `compressor` does with these arguments."""
    cli.main(arguments)


def start(count: int, *arguments: object, **changes: Any) -> list[Ended]:
    return together(count, command, *map(str, arguments), **changes)


def torchrun(count: int, *arguments: object) -> subprocess.Popen[str]:
    line = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count), "-m", "compressor"]
    everything = os.environ | {"OMP_NUM_THREADS": "1"}
    line += map(str, arguments)
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=everything)


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    try:
        stdout, stderr = process.communicate(timeout=100)
    finally:
        process.kill()
    return process.returncode, stdout, stderr


def hold_against_one(one: Path, more: Path, count: int, branching: str = "nothing") -> None:
    """Fails unless two results are the same up to the order of summation.

    Args:
        one: the folder of the run by one process.
        more: of that by several.
        count: how many.
        branching: layers with this word in their name are solved by ADMM, which rounding may lead to other zeros (noise
            of 6e-8 in a Hessian did, for three seeds of six): only how many there are is held, and roughly the error.
    """
    found, expected = (
        load_file(folder / "out" / "transformer" / "diffusion_pytorch_model.safetensors") for folder in (more, one)
    )
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        if branching in name:
            continue
        assert torch.equal(tensor == 0, found[name] == 0), name
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-4)
    shared, alone = (json.loads((folder / "out" / "report.json").read_text()) for folder in (more, one))
    assert shared["calibration"] == alone["calibration"]
    for a, b in zip(alone["layers"], shared["layers"], strict=True):
        assert (a["name"], a["zeros"], a["removed"]) == (b["name"], b["zeros"], b["removed"])
        assert (a["error"] is None) == (b["error"] is None)
        assert (a["error"] or 0.0) == pytest.approx(b["error"] or 0.0, rel=0.5 if branching in a["name"] else 1e-3)
    if alone["structure"]:
        assert shared["structure"]["groups"] == alone["structure"]["groups"]
    for figure, value in alone["metrics"]["pairs"].items() if branching == "nothing" else ():
        assert shared["metrics"]["pairs"][figure] == pytest.approx(value, rel=1e-2, abs=1e-4)
    assert shared["device"] == f"{alone['device']}, {count} processes"
    assert shared["warnings"] == alone["warnings"]
    assert shared["times"].keys() == alone["times"].keys()


SPREAD = {"damping": 1.0, "sparsity": 0.5, "spread": 0.2, "solver": "admm", "objective": "network"}


TWO = [
    {"wanda": {"sparsity": 0.5}, "targets": {"include": ["attention"]}},
    {"obs_diff": SPREAD, "targets": {"include": ["feed_forward"]}},
]


@pytest.mark.parametrize(
    ("count", "prune", "calibration", "branching"),
    [
        (2, TWO, {"tokens": 0.5}, ".ff"),
        (4, [{"obs_diff": {"granularity": {"structured": HEADS}, "damping": 1.0}}], {"batch": 1}, "nothing"),
    ],
    ids=["norms and spread", "heads"],
)
def test_several_processes_make_what_one_makes(count, prune, calibration, branching, tmp_path):
    alone = write(tmp_path / "one", prune, calibration=CALIBRATION | calibration)
    run(recipe.load(str(alone)), tiny.quiet())
    file = write(tmp_path / "more", prune, calibration=CALIBRATION | calibration)
    first, *others = start(count, "run", file, folder=tmp_path / "told")
    assert first.code == 0, first.stderr
    out = tmp_path / "more" / "out"
    assert first.stdout == f"result: {out}\nreport: {out / 'report.html'}\n"
    assert first.stderr.count("drawing, dense ...") == 1
    assert [(other.code, other.stdout, other.stderr) for other in others] == [(0, "", "")] * (count - 1)
    hold_against_one(tmp_path / "one", tmp_path / "more", count, branching)


def test_the_command_of_the_docs_does_the_same(tmp_path):
    run(recipe.load(str(write(tmp_path / "one", BOTH))), tiny.quiet())
    code, stdout, stderr = finish(torchrun(2, "run", write(tmp_path / "more", BOTH)))
    assert code == 0, stderr
    out = tmp_path / "more" / "out"
    assert stdout == f"result: {out}\nreport: {out / 'report.html'}\n"
    hold_against_one(tmp_path / "one", tmp_path / "more", 2)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": -1}, "seed: should be at least 0, found -1"),
        ({"device": "cuda:1"}, "error: device: should be auto, cuda or cpu for 2 processes, found 'cuda:1'"),
        ({"output": "."}, "error: output: . holds the current folder and would be replaced; choose another folder"),
        (
            {"calibration": CALIBRATION | {"prompts": ["a cat"]}},
            "error: calibration: there should be a prompt for each of 2 processes, found 1; start fewer processes",
        ),
    ],
    ids=["recipe", "device", "rank 0 alone", "prompts"],
)
def test_an_error_is_told_once_and_ends_all(changes, words, tmp_path):
    ended = start(2, "run", write(tmp_path, BOTH, **changes), folder=tmp_path / "told")
    assert [process.code for process in ended] == [1, 1]
    assert "".join(process.stderr for process in ended).count(words) == 1
    assert "".join(process.stderr for process in ended).count("error: ") == 1
    assert not (tmp_path / "out").exists()


def changed_in(rank: str, change: Callable[[], None], *arguments: str) -> None:
    if os.environ["RANK"] == rank:
        change()
    cli.main(arguments)


def fail_to_solve() -> None:
    def fail(*_arguments: object) -> None:
        raise CompressorError("the second one fails")

    layers.prune_package = fail


def fail_to_program() -> None:
    def fail(*_arguments: object) -> None:
        raise ZeroDivisionError("a defect")

    layers.prune_package = fail


def be_killed() -> None:
    layers.prune_package = lambda *_arguments: os.kill(os.getpid(), signal.SIGKILL)


def be_told_to_end() -> None:
    layers.prune_package = lambda *_arguments: os.kill(os.getpid(), signal.SIGTERM)


def leave_a_layer_out() -> None:
    def slow(_self: Unstructured, target: Target, _tokens: int) -> str | None:
        return "slow" if target.name.endswith("0.attn.to_q") else None

    pytest.MonkeyPatch().setattr(Unstructured, "leaves_out", slow)


def be_another_checkout() -> None:
    prepare.versions = lambda: {"torch": "1.0"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (fail_to_solve, "error: the second one fails\n"),
        (fail_to_program, "ZeroDivisionError: a defect\n"),
        (be_killed, "error: another process of this job ended without a word; was it killed?\n"),
        (
            be_told_to_end,
            "error: this process was told to end, as torchrun does when another one of the job was killed\n",
        ),
        (be_another_checkout, "error: the version of "),
        (leave_a_layer_out, "error: the layers of prune[0] should be the same for all processes, found 15 ("),
    ],
    ids=lambda change: getattr(change, "__name__", ""),
)
def test_an_error_in_another_process_than_the_first_is_told_and_ends_all(change, words, tmp_path):
    file = write(tmp_path, BOTH, report={"images": 0})
    ended = together(2, changed_in, "1", change, "run", str(file), folder=tmp_path / "told")
    assert [process.code for process in ended] == [1, -signal.SIGKILL if change is be_killed else 1]
    told = "".join(process.stderr for process in ended)
    assert told.count(words) == 1
    assert told.count("rror: ") == 1
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


def fail_to_export() -> None:
    def fail(*_arguments: object) -> None:
        raise CompressorError("no export")

    pytest.MonkeyPatch().setattr(ONNX, "export", fail)


def test_rank_0_fails_alone_once_the_others_have_left(tmp_path):
    prune = [{"magnitude": {"sparsity": 0.5}}]
    file = write(tmp_path, prune, report={"images": 0}, calibration=None, export=["onnx"])
    first, second = together(2, changed_in, "0", fail_to_export, "run", str(file), folder=tmp_path / "told")
    assert (first.code, second.code, second.stderr) == (1, 0, "")
    assert first.stderr.endswith(f"errors:\nonnx: no export\nthe pruned pipeline is kept in {tmp_path / 'out'}\n")
    assert (tmp_path / "out" / "compression.json").is_file()


def test_ctrl_c_ends_all_and_leaves_nothing(tmp_path):
    calibration = {"prompts": ["a cat"] * 100, "steps": 50, "batch": 1, "packages": 2}
    file = write(tmp_path, BOTH, calibration=calibration, report={"images": 0})
    ended = start(
        2,
        "run",
        file,
        folder=tmp_path / "told",
        interrupt=lambda told: told.exists() and "calibrating, package 1 of 2 ..." in told.read_text(),
    )
    assert [process.code for process in ended] == [130, 130]
    assert "".join(process.stderr for process in ended).count("interrupted: nothing was kept") == 1
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


def test_other_commands_are_refused_once(tmp_path):
    first, second = start(2, "compare", "quickstart", folder=tmp_path)
    assert first.stderr == (
        "error: compare: should be started as one process, found 2 under torchrun; several may share a run\n"
    )
    assert (first.code, second.code, second.stderr) == (1, 0, "")


def test_fewer_batches_than_processes_are_told():
    loaded = tiny.load("sd3")
    told = Calibration(
        loaded,
        tiny.traced(loaded),
        Options.model_validate(CALIBRATION),
        CALIBRATION["prompts"],
        0,
        tiny.quiet(),
        Ranks(3, 4),
    )
    assert told.facts.warnings == [
        "4 processes share 3 batches of up to 2 prompts: some have nothing to sample; a smaller calibration.batch "
        "would give all of them some"
    ]


def test_processes_that_differ_are_told_in_what(monkeypatch):
    ranks = Ranks(0, 2)
    monkeypatch.setattr(ranks, "gather", lambda mine: [mine, ("b", {"the version of torch": "2"})])
    monkeypatch.setattr("platform.node", lambda: "a")
    ranks.agree({"the version of torch": "2"})
    with pytest.raises(CompressorError) as caught:
        ranks.agree({"the version of torch": "1"})
    assert str(caught.value) == (
        "the version of torch should be the same for all processes, found 1 for process 0 on a and 2 for process 1 on b"
    )
    with pytest.raises(
        CompressorError, match=r"seed of the recipe should be .* found 7 for process 0 on a and none for"
    ):
        ranks.agree({"the version of torch": "2", "seed of the recipe": 7})


def test_a_process_without_a_gpu_beside_one_with_a_gpu_is_told(monkeypatch):
    ranks = Ranks(0, 2)
    monkeypatch.setattr(ranks, "gather", lambda mine: [mine, ("b", {"the kind of device": "cuda"})])
    with pytest.raises(
        CompressorError, match=r"the kind of device should be .* found cpu for process 0 .* and cuda for"
    ):
        ranks.device("cpu")


def test_source_files_are_told_apart_by_what_is_in_them(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "package_of_a_test").mkdir()
    (tmp_path / "package_of_a_test" / "__init__.py").write_text("A = 1\n")
    words = "the source files of package_of_a_test"
    before = sources(["package_of_a_test"])
    assert before.keys() == {words}
    (tmp_path / "package_of_a_test" / "other.py").write_text("B = 1\n")
    assert sources(["package_of_a_test"]) != before
    (tmp_path / "package_of_a_test" / "other.py").unlink()
    assert sources(["package_of_a_test"]) == before


def test_fewer_gpus_than_processes_are_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(CompressorError) as caught:
        Ranks(1, 2).device("cuda")
    assert str(caught.value) == (
        "device: there should be a GPU for each process, found 1; start as many processes as GPUs"
    )


@pytest.mark.parametrize("kind", list(tiny.KINDS))
def test_each_layer_is_dealt_to_one_process_and_what_runs_side_by_side_stays_together(kind):
    loaded = tiny.load(kind)
    (package,) = cut(loaded.targets, tiny.traced(loaded), "second", 1, None, tiny.no_workspace)
    shares = [deal(package, rank, 3) for rank in range(3)]
    assert sorted(group.name for share in shares for group in share.groups) == sorted(g.name for g in package.groups)
    for rank, share in enumerate(shares):
        mine = [group.name for group, owner in zip(share.every, share.owners, strict=True) if owner == rank]
        assert [group.name for group in share.groups] == mine
    units = [{target.unit for group in share.groups for target in group.targets} for share in shares]
    assert all(units)
    owners = {t.name: rank for rank, share in enumerate(shares) for group in share.groups for t in group.targets}
    for heads in find_groups(loaded.module, loaded.family):
        assert len({owners[consumer.name] for consumer in heads.consumers}) == 1
    assert not units[0] & units[1] | units[0] & units[2] | units[1] & units[2]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize(
    "options",
    [{"sparsity": 0.5}, {"granularity": {"structured": HEADS}}],
    ids=["zeros", "heads"],
)
def test_two_gpus_make_what_one_makes(options, tmp_path):
    prune = [{"obs_diff": {**options, "damping": 1.0}}]
    run(recipe.load(str(write(tmp_path / "one", prune, device="cuda:0"))), tiny.quiet())
    file = write(tmp_path / "more", prune, device="cuda")
    ended = start(2, "run", file, folder=tmp_path / "told")
    assert [process.code for process in ended] == [0, 0], ended
    hold_against_one(tmp_path / "one", tmp_path / "more", 2)
