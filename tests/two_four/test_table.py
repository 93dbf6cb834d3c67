"""The table of `compressor probe`: written, read, asked by `n_m`, by the runtime and by the recipe's plan."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from compressor_obs_diff.granularities import NM

from compressor import plan_table, recipe, report, run
from compressor.errors import CompressorError
from compressor.plan import plan
from compressor.structure import find_targets
from compressor.two_four import table
from compressor.two_four.choice import Tabled, chosen, explain
from compressor.two_four.product import Timed, unfit
from compressor.two_four.table import Row, Table
from tests import tiny

pytestmark = pytest.mark.usefixtures("looked_at_once")
VERSIONS = {"torch": "2.11.0", "cusparselt": "0.8.0"}


def made(rows: list[Row]) -> Table:
    return Table("compressor probe x", "NVIDIA X", "bfloat16", 16, VERSIONS, tuple(rows))


def row(tokens: int, inputs: int, outputs: int, ratio: float | None, batch: int = 1) -> Row:
    if ratio is None:
        return Row("m", batch, tokens, inputs, outputs, 1, "a", (1.0,), note="too small")
    return Row("m", batch, tokens, inputs, outputs, 1, "a", (ratio, 9.0, 0.1), (1.0,) * 3, (3, 1, -1), 1e-3)


def test_a_table_is_read_as_it_was_written(tmp_path: Path):
    file = tmp_path / "probe.json"
    given = made([row(8, 4, 4, 1.5), row(8, 4, 8, None, batch=2)])
    table.write(given, file)
    assert table.read(file) == given
    assert given.batches == (1, 2)
    assert [entry["ratio"] for entry in json.loads(file.read_text())["rows"]] == [1.5, None]
    assert given.rows[0].spread == (0.1, 9.0)
    found = given.find(8, 4, 8)
    assert found is not None
    assert (found.note, found.ratio, found.spread) == ("too small", None, None)
    assert given.find(8, 8, 4) is None


def test_what_is_no_table_is_named(tmp_path: Path):
    file = tmp_path / "probe.json"
    with pytest.raises(CompressorError) as caught:
        table.read(file)
    assert str(caught.value) == (
        f"{file}: no such table of what 2:4 gains; `compressor probe RECIPE --output {file}` measures it on a GPU"
    )
    with pytest.raises(CompressorError) as caught:
        table.read(tmp_path)
    assert str(caught.value) == f"{tmp_path}: should be a table of `compressor probe`, but: Is a directory"
    file.write_text("{}")
    with pytest.raises(CompressorError) as caught:
        table.read(file)
    assert str(caught.value) == f"{file}: should be a table of `compressor probe`, but command: Field required"
    table.write(Table(**{**vars(made([])), "format": 9}), file)
    with pytest.raises(CompressorError) as caught:
        table.read(file)
    assert str(caught.value) == f"{file}: should be of format 1, found 9; measure it again"


def test_a_kernel_is_taken_if_it_gains_enough_and_a_table_of_another_machine_is_refused():
    asked = Tabled(made([row(8, 4, 4, 1.5), row(8, 4, 8, None)]), "p.json", 1.4)
    assert (asked(8, 4, 4, True), asked(8, 4, 8, True)) == ((3, 1, -1), None)
    assert Tabled(asked.table, "p.json", 1.6)(8, 4, 4, True) is None
    with pytest.raises(CompressorError) as caught:
        asked(9, 4, 4, True)
    assert str(caught.value) == (
        "p.json: has no row for 9 x 4 x 4 (tokens x inputs x outputs); measure this size and batch with `compressor "
        "probe`, or leave --probe out"
    )
    dtype = getattr(torch, asked.table.dtype)
    asked.check("NVIDIA X", VERSIONS, dtype)
    with pytest.raises(CompressorError) as caught:
        asked.check("NVIDIA X", VERSIONS, torch.float64)
    assert str(caught.value) == (
        f"p.json: should be measured in float64 as the network is, found {asked.table.dtype}; run `compressor probe "
        "--dtype float64`, or leave --probe out"
    )
    for device, versions, words in (
        ("NVIDIA Y", VERSIONS, "the GPU of this machine, NVIDIA Y, found NVIDIA X"),
        ("NVIDIA X", VERSIONS | {"torch": "3"}, "the torch of this machine, 3, found 2.11.0"),
        ("NVIDIA X", VERSIONS | {"cusparselt": "1"}, "the cusparselt of this machine, 1, found 0.8.0"),
    ):
        with pytest.raises(CompressorError) as caught:
            asked.check(device, versions, dtype)
        assert str(caught.value) == (
            f"p.json: should be measured with {words}; run `compressor probe` here, or leave --probe out"
        )


def test_what_was_measured_is_told_in_words():
    assert explain(Timed((2e-6,), (1e-6,), (1, 1, 1), 0.0)) == "dense 2.0 µs, 2:4 1.0 µs, 2.00x"
    assert explain(Timed((2e-6,), note="no kernel")) == "dense 2.0 µs, no 2:4 product: no kernel"
    assert chosen(Timed((2e-6,), note="no kernel"), 1.0) is None
    assert unfit(77, 1024, 1024) == "not tried below 256 tokens, inputs and outputs"
    assert unfit(256, 260, 1024) == "cuSPARSELt needs inputs and outputs that are multiples of 32"
    assert unfit(256, 1024, 1024) == ""


def shapes_of_tiny() -> dict[str, tuple[int, int, int]]:
    loaded = tiny.load("sd3")
    seen = tiny.traced(loaded)
    targets = find_targets(loaded.module, loaded.family)
    return {target.name: (seen.tokens[target.name], target.inputs, target.outputs) for target in targets}


def recipe_file(folder: Path, options: dict, pruner: str = "magnitude") -> Path:
    file = folder / "recipe.yaml"
    data = {
        "model": str(tiny.folder("sd3")),
        "calibration": {"prompts": ["a", "b"], "steps": 1, "batch": 2, "height": tiny.SIDE, "width": tiny.SIDE},
        "prune": [{pruner: {"granularity": {"n_m": options}}}],
        "report": {"images": 0},
        "output": str(folder / "out"),
    }
    file.write_text(yaml.safe_dump(data))
    return file


@pytest.mark.parametrize("pruner", ["magnitude", "wanda", "obs_diff"])
def test_layers_that_gain_less_stay_dense_for_every_pruner(pruner: str, tmp_path: Path):
    shapes = shapes_of_tiny()
    gaining = {name for name, (_, inputs, outputs) in shapes.items() if outputs > inputs}
    assert 0 < len(gaining) < len(shapes)
    rows = [
        row(2 * tokens, inputs, outputs, 1.2 if outputs > inputs else 1.01 if inputs > outputs else None, batch=2)
        for tokens, inputs, outputs in dict.fromkeys(shapes.values())
    ]
    table.write(made(rows), tmp_path / "probe.json")  # beside the recipe, wherever the command is run
    loaded = recipe.load(recipe_file(tmp_path, {"only_where_faster": 1.05}, pruner))
    planned = plan(loaded)
    assert {layer.name for layer in planned.entries[0].layers} == gaining
    left = planned.entries[0].left_out
    assert set(left) == set(shapes) - gaining
    assert any(reason.endswith("2:4 is 1.01x as fast, should be 1.05x") for reason in left.values())
    assert any(reason.endswith("no 2:4 product: too small") for reason in left.values())
    text = plan_table.as_text(planned, layers=True)
    assert f"warning: prune[0]: {len(left)} layers of {len(shapes)} stay as they are: " in text
    name, reason = next(iter(left.items()))
    assert any(line.split() == [*name.split(), *f"stays as it is; {reason}".split()] for line in text.splitlines())

    output = run.run(loaded, tiny.quiet())
    told = report.read(output / "report.json")
    assert told.left_out == left
    assert [warning for warning in told.warnings if "stay as they are" in warning]
    before = dict(tiny.load("sd3").module.named_parameters())
    from compressor import checkpoint

    after = dict(checkpoint.load(output, "cpu").module.named_parameters())
    for name in shapes:
        same = torch.equal(before[f"{name}.weight"], after[f"{name}.weight"])
        assert same is (name in left)


@pytest.mark.parametrize(
    ("options", "rows", "message"),
    [
        (
            {"only_where_faster": 1.05},
            None,
            "prune[0]: probe.json: no such table of what 2:4 gains; `compressor probe RECIPE --output probe.json` "
            "measures it on a GPU",
        ),
        (
            {"only_where_faster": 1.05},
            [row(1, 4, 4, 1.5), row(2, 4, 4, 1.5, batch=4)],
            "prune[0]: n_m.batch: should say which batch of FILE counts, one of 1, 4",
        ),
        (
            {"only_where_faster": 1.05, "batch": 4},
            [row(1, 4, 4, 1.5), row(2, 4, 4, 1.5, batch=4)],
            "prune[0]: NAME: FILE has no row for SHAPE (tokens x inputs x outputs); `compressor probe RECIPE --batch 4 "
            "--output FILE` measures it on a GPU",
        ),
    ],
)
def test_a_missing_table_batch_or_shape_is_one_error(options, rows, message, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "probe.json"
    if rows is not None:
        table.write(made(rows), file)
    name, (tokens, inputs, outputs) = next(iter(shapes_of_tiny().items()))
    with pytest.raises(CompressorError) as caught:
        plan(recipe.load(recipe_file(tmp_path, options)))
    expected = message.replace("FILE", str(file)).replace("NAME", name)
    assert str(caught.value) == expected.replace("SHAPE", f"{4 * tokens} x {inputs} x {outputs}")


def test_a_table_by_which_nothing_gains_is_an_error(tmp_path: Path):
    shapes = dict.fromkeys(shapes_of_tiny().values())
    table.write(made([row(*shape, 0.5) for shape in shapes]), tmp_path / "probe.json")
    with pytest.raises(CompressorError) as caught:
        plan(recipe.load(recipe_file(tmp_path, {"only_where_faster": 1.05})))
    assert str(caught.value).startswith(
        f"prune[0]: leaves all {len(shapes_of_tiny())} layers as they are, so that nothing is to be done; "
    )
    assert str(caught.value).endswith("2:4 is 0.50x as fast, should be 1.05x")


def test_without_the_option_no_table_is_read():
    target = find_targets(tiny.load("sd3").module, tiny.load("sd3").family)[0]
    assert NM(probe="probe.json").leaves_out(target, 8) is None
    assert (NM().keep, NM().of) == (2, 4)
