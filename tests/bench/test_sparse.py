"""The benchmark `sparse` and `probe` without a GPU: shapes, choice of layers, tables, messages; times are made up."""

from __future__ import annotations

import json
from pathlib import Path

import click.testing
import pytest
import torch

from compressor.bench import models, probe, sparse
from compressor.bench.models import MODELS
from compressor.bench.timing import Times
from compressor.cli import main
from compressor.two_four import product, table
from compressor.two_four.product import Timed
from tests.bench.test_shrunk import TINY
from tests.two_four.conftest import dense_products  # noqa: F401  # a fixture


@pytest.fixture(autouse=True)
def _tiny_models(monkeypatch, tmp_path):
    monkeypatch.setattr(models, "MODELS", MODELS | TINY)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def made_up(monkeypatch, dense_products):  # noqa: F811
    """Twice as fast where there are more outputs than inputs, no product for squares, and else half as fast."""

    def measure(tokens, inputs, outputs, *, bias, dtype, device, turns):
        assert bias
        if inputs == outputs:
            return Timed((2.0,) * turns, note="no kernel")
        sparse_time = 1.0 if outputs > inputs else 4.0
        return Timed((2.0, 3.0, 2.0), (sparse_time,) * 3, (7, 1, -1), 1e-3)

    monkeypatch.setattr(product, "measure", measure)
    monkeypatch.setattr(product, "problem", lambda device: None)
    monkeypatch.setattr(product, "gpu", lambda device: "GPU of a test")
    return dense_products


def call(*arguments: str) -> click.testing.Result:
    found = click.testing.CliRunner().invoke(main, list(arguments))
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        raise found.exception
    return found


def test_shapes_are_tokens_of_all_samples_by_inputs_by_outputs():
    size, found = probe.shapes(probe.Settings(("sd3-medium",), batches=(1, 4)))
    assert size == 1024
    assert [(s.batch, s.tokens, s.inputs, s.outputs) for s in found] == [
        (batch, batch * tokens, inputs, outputs)
        for batch in (1, 4)
        for inputs, outputs in ((1536, 1536), (1536, 6144), (6144, 1536))
        for tokens in (4096, 333)
    ]
    assert sum(s.layers for s in found if s.batch == 1) == 24 * 12 - 3  # the last block's text stream ends in its keys


def test_probe_writes_what_it_prints(made_up):
    found = call("probe", "tiny-sd3", "--size", "64", "--batch", "2", "--batch", "1", "--output", "deep/probe.json")
    assert found.exit_code == 0, found.stderr
    read = table.read("deep/probe.json")
    assert (read.device, read.dtype, read.size, read.batches) == ("GPU of a test", "bfloat16", 64, (1, 2))
    rows = [line for line in found.stdout.splitlines() if line.startswith("| tiny-sd3 | 2 |")]
    assert "| tiny-sd3 | 2 | 32 x 32 x 128 | 4 | 2000000.0 µs | 1000000.0 µs | 2.00x | 2.00 to 3.00 | 1.0e-03 |" in rows
    assert "32 x 32 x 32: no 2:4 product: no kernel" in found.stdout
    row = read.find(32, 32, 128)
    assert row is not None
    assert (row.ratio, row.layers, row.algorithm) == (2.0, 4, (7, 1, -1))
    data = json.loads(Path("deep/probe.json").read_text())
    assert next(row["ratio"] for row in data["rows"] if row["outputs"] == 128) == 2.0


def test_sparse_converts_the_layers_that_gain_and_holds_the_outputs_against_each_other(made_up, monkeypatch):
    def in_turns(calls, repeats, in_a_row, warmups, device):
        outputs = {name: call()[0] for name, call in calls.items()}
        assert not torch.equal(outputs["dense"], outputs["sparse"])  # zeros, and dense weights left as they were
        return {name: Times((3.0,) if name == "dense" else (2.0,), (0.0,)) for name in calls}

    monkeypatch.setattr(sparse, "in_turns", in_turns)
    found = call(
        "bench",
        "sparse",
        "tiny-sd3",
        "--size",
        "64",
        "--compile",
        "no",
        "--dtype",
        "bfloat16",
        "--device",
        "cpu",
        "--output",
        "s.json",
    )
    assert found.exit_code == 0, found.stderr
    data = json.loads(Path("s.json").read_text())
    row = data["rows"][0]
    assert row["converted"] == {"16 x 32 x 128": 4, "5 x 32 x 128": 3}
    assert row["ratio"] == 1.5
    assert row["error"] == 0  # the same dense product stands in for the sparse one
    assert {tokens for tokens, _ in made_up} == {5, 16}
    assert "| tiny-sd3 | 1 | 7 of 45 |" in found.stdout
    assert "| 3000.00 ms | 2000.00 ms | 1.50x | 0.0e+00 |" in found.stdout


def test_a_network_in_which_no_layer_gains_stays_dense(made_up, monkeypatch):
    monkeypatch.setattr(sparse, "in_turns", lambda calls, *_: {name: Times((3.0,), (0.0,)) for name in calls})
    found = call("bench", "sparse", "tiny-sd3", "--size", "64", "--faster", "2.5", "--compile", "no", "--device", "cpu")
    assert "| tiny-sd3 | 1 | 0 of 45 | 0 % | 3000.00 ms | - | no layer gains | - |" in found.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("probe", f"should name a recipe or at least one model; known: {', '.join(MODELS | TINY)}"),
        ("probe sd3-medum", "no model named 'sd3-medum'; did you mean 'sd3-medium'?"),
        ("probe tiny-sd3 --size 72", "size: should be a multiple of 16 pixels for tiny-sd3, found 72"),
        ("probe tiny-sd3 --size 64 --output .", "output: should be a file to write, found the folder ."),
        ("bench sparse", f"should name at least one model; known: {', '.join(MODELS | TINY)}"),
        ("bench sparse tiny-sd3 --size 72", "size: should be a multiple of 16 pixels for tiny-sd3, found 72"),
    ],
)
def test_a_mistake_is_told_in_one_sentence(made_up, arguments, message):
    found = call(*arguments.split())
    assert (found.exit_code, found.stderr.splitlines()[-1]) == (1, f"error: {message}")


@pytest.mark.parametrize(("command", "what"), [("probe", "probe"), ("bench sparse", "bench sparse")])
def test_without_a_gpu_there_is_one_line(command, what):
    found = call(*command.split(), "tiny-sd3", "--size", "64", "--device", "cpu")
    assert found.stderr == f"error: {what} needs an NVIDIA GPU of compute capability 8.0 or later, found cpu\n"
