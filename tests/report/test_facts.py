import dataclasses
import json

import pytest

from compressor.errors import CompressorError
from compressor.report import Report, read, write
from compressor.report.facts import sparsity

from .conftest import make_row, make_shrunk_rows


def test_a_report_comes_back_from_its_json_as_it_was(report: Report, tmp_path):
    write(report, None, tmp_path)
    assert read(tmp_path / "report.json") == report


def test_what_left_comes_back_from_the_json_too(mixed: Report, tmp_path):
    write(mixed, None, tmp_path)
    assert read(tmp_path / "report.json") == mixed


def test_a_layer_that_lost_rows_or_columns_knows_its_shape_before():
    rows = make_shrunk_rows()
    assert [row.before for row in rows] == [(192, 192), (192, 192), (768, 192), (192, 768)]
    assert [row.lost_rows for row in rows] == [True, False, True, False]
    assert make_row().before == (50, 20)
    assert not make_row().lost_rows


def test_weights_that_left_and_zeros_among_the_rest_are_gone():
    row = make_row(removed=250, asked=500, zeros=150)
    assert row.gone == 400
    assert row.sparsity == 0.4
    assert sparsity([row]) == (0.5, 0.4)


def test_the_json_has_the_order_of_the_fields_and_never_changes(report: Report):
    assert report.dump() == report.dump()
    assert list(json.loads(report.dump())) == [field.name for field in dataclasses.fields(Report)]


def test_a_layers_sparsity_is_written_beside_its_counts(report: Report):
    assert [row["sparsity"] for row in json.loads(report.dump())["layers"]] == [0.5] * len(report.layers)


def test_numbers_that_json_lacks_survive_it(report: Report, tmp_path):
    rows = tuple(make_row(error=error) for error in (float("inf"), float("nan"), None, 0.5))
    write(dataclasses.replace(report, layers=rows), None, tmp_path)
    text = (tmp_path / "report.json").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    back = [row.error for row in read(tmp_path / "report.json").layers]
    assert back[0] == float("inf")
    assert str(back[1]) == "nan"
    assert back[2:] == [None, 0.5]


def test_sparsity_of_layers_counts_weights_not_layers():
    rows = (make_row(parameters=300, asked=100, zeros=90), make_row(parameters=100, asked=100, zeros=100))
    assert sparsity(rows) == (200 / 400, 190 / 400)
    assert sparsity(()) == (0, 0)


def test_another_json_is_refused_with_what_it_lacks(tmp_path):
    file = tmp_path / "report.json"
    file.write_text('{"recipe": {}}')
    with pytest.raises(CompressorError) as error:
        read(file)
    assert str(error.value) == f"{file}: should be a report of `compressor run`, but versions: Field required"


def test_a_file_that_is_no_json_is_refused(tmp_path):
    file = tmp_path / "report.json"
    file.write_text("<html>")
    with pytest.raises(CompressorError, match=r"should be a report of `compressor run`, but the file: Invalid JSON"):
        read(file)


def test_the_folder_is_made_and_old_files_are_replaced(report: Report, tmp_path):
    folder = tmp_path / "a" / "b"
    write(report, None, folder)
    write(dataclasses.replace(report, device="another"), None, folder)
    assert read(folder / "report.json").device == "another"
    assert sorted(path.name for path in folder.iterdir()) == ["report.html", "report.json"]
