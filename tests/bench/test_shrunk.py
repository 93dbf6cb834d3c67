"""The benchmark `shrunk` on tiny models: real networks, the widths that are told, ratios of one run, every message."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import click.testing
import pytest
import torch

from compressor import registry
from compressor.bench import forwards, models, networks, results, shrunk, timing
from compressor.bench.models import MODELS, KnownModel
from compressor.bench.settings import Settings, conditions
from compressor.bench.timing import Times
from compressor.cli import main
from compressor.structure import find_groups

PUBLISHED = {  # parameters
    "sd2.1": 865_910_724,
    "sdxl": 2_567_463_684,
    "sd3-medium": 2_028_328_000,
    "sd3.5-large": 8_056_627_520,
    "flux-dev": 11_901_408_320,
}
TINY = {
    "tiny-sd3": KnownModel(
        "tiny-sd3",
        "sd3",
        {
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 4,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "joint_attention_dim": 16,
            "caption_projection_dim": 32,
            "pooled_projection_dim": 16,
            "pos_embed_max_size": 8,
            "qk_norm": "rms_norm",
        },
        ("num_layers",),
        tokens=5,
    ),
    "tiny-flux": KnownModel(
        "tiny-flux",
        "flux",
        {
            "in_channels": 16,
            "num_layers": 1,
            "num_single_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "joint_attention_dim": 16,
            "pooled_projection_dim": 16,
            "guidance_embeds": True,
            "axes_dims_rope": (2, 2, 4),
        },
        ("num_layers", "num_single_layers"),
        tokens=5,
    ),
}


@pytest.fixture(autouse=True)
def _tiny_models(monkeypatch, tmp_path):
    monkeypatch.setattr(models, "MODELS", MODELS | TINY)
    monkeypatch.chdir(tmp_path)


def call(*arguments: str) -> click.testing.Result:
    found = click.testing.CliRunner().invoke(main, ["bench", "shrunk", *arguments])
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        raise found.exception
    return found


def built(name: str, dtype: torch.dtype = torch.float32, device: str = "meta", layers: int | None = None):
    model = models.find(name)
    family = registry.load("family", model.family)
    return family, networks.build(model, family, layers, torch.device(device), dtype)


def kept(name: str, **changes: Any) -> dict[str, int]:
    family, network = built(name)
    given = {"heads": 0.3, "neurons": 0.3, "multiple": 64, "keep_ends": True} | changes
    return networks.kept_counts(find_groups(network, family), **given)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_known_model_has_as_many_parameters_as_the_published_one(name):
    assert networks.parameters(built(name)[1]) == PUBLISHED[name]


@pytest.mark.parametrize("name", ["sdxl", "flux-dev"])
def test_layers_shortens_every_part(name):
    family, network = built(name, layers=1)
    short = {group.block for group in find_groups(network, family)}
    assert len(short) == {"sdxl": 11, "flux-dev": 2}[name]


def test_widths_are_multiples_and_their_sum_is_as_the_ratio_asks():
    for multiple, step in ((64, 1), (128, 2)):
        counts = kept("sd3-medium", multiple=multiple)
        heads = [n for name, n in counts.items() if name.endswith("heads")]
        neurons = [n for name, n in counts.items() if ".ff.neurons" in name]
        assert heads[0] == heads[-1] == 24
        assert neurons[0] == neurons[-1] == 6144
        assert all(n % step == 0 for n in heads)
        assert all(n % multiple == 0 for n in neurons)
        assert sum(heads[1:-1]) == pytest.approx(0.7 * 22 * 24, abs=step)
        assert sum(neurons[1:-1]) == pytest.approx(0.7 * 22 * 6144, abs=multiple)


def test_a_multiple_of_one_leaves_every_block_what_the_published_code_does():
    # 24 - int(24 * 0.3) and 6144 - int(6144 * 0.3)
    assert set(kept("sd3-medium", multiple=1, keep_ends=False).values()) == {17, 4301}
    assert set(kept("sd3.5-large", multiple=1, keep_ends=False).values()) == {27, 6810}


def test_a_shrunk_network_is_a_real_one_of_the_widths_told():
    family, dense = built("tiny-sd3", device="cpu")
    counts = kept("tiny-sd3", heads=0.5, neurons=0.5, multiple=8)
    smaller = networks.shrink(dense, family, counts)
    assert {group.name: group.count for group in find_groups(smaller, family)} == counts
    assert networks.parameters(smaller) < networks.parameters(dense)
    inner: Any = smaller.get_submodule("transformer_blocks.1")
    assert (inner.attn.heads, inner.attn.to_q.out_features, inner.ff.net[2].in_features) == (2, 16, 64)
    given = networks.inputs(models.find("tiny-sd3"), family, smaller, 2, 64)
    (out,) = smaller(**given, return_dict=False)
    assert out.shape == (2, 4, 8, 8)


def test_the_plan_says_what_the_networks_are():
    found = conditions(Settings(("tiny-sd3",), size=64, multiples=(8,)))
    family, plans = shrunk._plans(found.models[0], Settings(("tiny-sd3",), size=64, multiples=(8,)))
    _, dense = built("tiny-sd3", device="cpu")
    smaller = networks.shrink(dense, family, plans[0].kept)
    assert plans[0].parameters == networks.parameters(smaller)
    assert plans[0].dense_parameters == networks.parameters(dense)
    assert plans[0].operations < plans[0].dense_operations


def test_compiled_forwards_compute_what_eager_ones_do(monkeypatch):
    pieces = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: pieces.append((self, options)))
    family, network = built("tiny-flux", device="cpu")
    given = networks.inputs(models.find("tiny-flux"), family, network, 1, 32)
    by_blocks = forwards.compiled(network, family, "blocks", given)
    assert len(pieces) == 3
    assert all(options == {"dynamic": False, "fullgraph": True, "backend": "inductor"} for _, options in pieces)
    assert all(piece is not block for piece, _ in pieces for block in network.modules())
    parameters = {id(parameter) for parameter in network.parameters()}
    assert all(id(parameter) in parameters for piece, _ in pieces for parameter in piece.parameters())
    pieces.clear()
    whole = forwards.compiled(network, family, "network", given)
    assert [type(piece) for piece, _ in pieces] == [type(network)]
    (expected,) = forwards.eager(network, given)()
    assert torch.equal(by_blocks()[0], expected)
    assert torch.equal(whole()[0], expected)


def test_calls_are_timed_in_turns_and_in_both_orders():
    seen: list[str] = []
    calls = {name: partial(seen.append, name) for name in "ds"}
    times = timing.in_turns(calls, repeats=3, in_a_row=2, warmups=1, device=torch.device("cpu"))
    assert seen == [*"ds", *"ddss", *"ssdd", *"ddss"]
    assert all(len(found.seconds) == len(found.host) == 3 for found in times.values())
    assert Times((3.0, 1.0, 2.0), (0.0,) * 3).median == 2.0


def test_the_table_and_the_file_have_each_network_against_dense_of_the_same_turns(monkeypatch):
    fake = iter([(4.0, 1.0), (3.0, 2.0)])  # a row each: dense, shrunk

    def in_turns(calls, repeats, in_a_row, warmups, device):
        for run in calls.values():
            run()
        dense, smaller = next(fake)
        return {"dense": Times((dense,) * repeats, (0.5,) * repeats), "shrunk": Times((smaller,), (0.25,))}

    monkeypatch.setattr(shrunk, "in_turns", in_turns)
    options = ["--heads", "0.5", "--neurons", "0.25", "--multiple", "8", "--multiple", "1", "--size", "64"]
    found = call("tiny-sd3", *options, "--repeats", "2", "--output", "deep/er.json", "--threads", "1")
    assert found.exit_code == 0, found.stderr
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in found.stdout.splitlines() if "|" in line]
    assert rows[0] == list(results.COLUMNS)
    assert [row[:5] for row in rows[2:]] == [
        ["tiny-sd3", "8", "eager", "2 of 4", "96 of 128"],
        ["tiny-sd3", "1", "eager", "2 of 4", "96 of 128"],
    ]
    assert [row[-3:] for row in rows[2:]] == [["4000 ms", "1000 ms", "4.00x"], ["3000 ms", "2000 ms", "1.50x"]]
    assert "64 x 64 pixels, batch 2, float32; 50 % of heads, 25 % of neurons removed but in" in found.stdout
    assert "medians of 2 turns, dense and shrunk, 1 forward in a row" in found.stdout
    with open("deep/er.json") as file:
        data = json.load(file)
    assert data["settings"]["multiples"] == [8, 1]
    assert data["versions"]["torch"] == torch.__version__
    first = data["rows"][0]
    assert (first["ratio"], first["seconds"], first["dense_seconds"]) == (4.0, 1.0, 4.0)
    assert first["dense_times"] == {"seconds": [4.0, 4.0], "host": [0.5, 0.5]}
    assert first["kept"]["transformer_blocks.1.attn.heads"] == 2
    assert first["of"]["transformer_blocks.1.attn.heads"] == 4
    assert first["parameters"] < first["dense_parameters"]


def test_what_was_measured_before_a_failure_is_in_the_file(monkeypatch):
    def in_turns(calls, repeats, in_a_row, warmups, device):
        monkeypatch.setattr(shrunk, "in_turns", None)  # fails at the next row
        return {name: Times((1.0,), (1.0,)) for name in calls}

    monkeypatch.setattr(shrunk, "in_turns", in_turns)
    with pytest.raises(TypeError):
        call("tiny-sd3", "--multiple", "8", "--multiple", "1", "--size", "64", "--output", "b.json")
    with open("b.json") as file:
        assert [row["multiple"] for row in json.load(file)["rows"]] == [8]


@pytest.mark.usefixtures("traced_once")
def test_onnxruntime_times_files_that_the_exporter_proved():
    pytest.importorskip("onnxruntime")
    found = call(
        *("tiny-sd3", "--runtime", "onnxruntime", "--layers", "1", "--no-keep-ends", "--size", "64", "--batch", "1"),
        *("--heads", "0.5", "--neurons", "0.5", "--multiple", "8", "--repeats", "1", "--threads", "1"),
    )
    assert found.exit_code == 0, found.stderr
    assert "| tiny-sd3 | 8 | onnxruntime | 2 of 4 | 64 of 128 |" in found.stdout
    assert "onnxruntime 1." in found.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "",
            f"should name at least one model; known: {', '.join(MODELS | TINY)}",
        ),
        ("sd3-medum", "no model named 'sd3-medum'; did you mean 'sd3-medium'?"),
        ("tiny-sd3 --size 72", "size: should be a multiple of 16 pixels for tiny-sd3, found 72"),
        ("tiny-sd3 --size 144", "size: should be a multiple of 16 pixels and at most 128 for tiny-sd3, found 144"),
        (
            "tiny-sd3 --size 64 --heads 0.9",
            "transformer_blocks.1.attn.heads: a ratio should leave at least 1 of 4, found 0.9, which leaves none; "
            "remove at most 0.75",
        ),
        (
            "tiny-sd3 --size 64 --heads 0 --neurons 0",
            "heads 0.0 and neurons 0.0 in multiples of 64 leave everything as it is; should remove something",
        ),
        (
            "tiny-sd3 --size 64 --layers 2",
            "the first and the last block are kept, which are all of 2; should be more layers, or --no-keep-ends",
        ),
        (
            "tiny-sd3 --size 64 --runtime onnxruntime --dtype float16",
            "dtype: should be float32 with onnxruntime, found float16",
        ),
        (
            "tiny-sd3 --size 64 --runtime onnxruntime --compile blocks",
            "compile: has no effect with onnxruntime, found 'blocks'; leave it out",
        ),
        ("tiny-sd3 --size 64 --output .", "output: should be a file to write, found the folder ."),
    ],
)
def test_a_mistake_is_told_in_one_sentence(arguments, message):
    found = call(*arguments.split())
    assert (found.exit_code, found.stderr.splitlines()[-1]) == (1, f"error: {message}")
