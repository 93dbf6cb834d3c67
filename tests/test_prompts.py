"""Prompts from lists, files, tables and built-in pipelines, and the drawing of some of them."""

import pytest

from compressor import prompts
from compressor.errors import CompressorError
from compressor.recipe import Prompts


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def read(**source: object) -> tuple[str, ...]:
    return prompts.read(Prompts.model_validate(source), "calibration")


@pytest.mark.parametrize(
    ("name", "content", "column", "found"),
    [
        ("p.txt", "a red dog\n\n  a cat \nlast", None, ("a red dog", "a cat", "last")),
        ("p.txt", "\ufeffone\r\ntwo\r\n", None, ("one", "two")),
        ("p.prompts", "größer, höher\n犬\n", None, ("größer, höher", "犬")),
        ("p.txt", "a,b\n", None, ("a,b",)),
        ("p.csv", "id,text\n1,a dog\n2,\n3,a cat\n", "text", ("a dog", "a cat")),
        ("p.csv", 'id,text\n1,"a dog, red\nand big"\n', "text", ("a dog, red\nand big",)),
        ("p.csv", "id,text\n1\n2,a\n3,b,too many\n", "text", ("a", "b")),
        ("p.CSV", "\ufefftext\na\n", "text", ("a",)),
        ("p.tsv", "id\ttext\n1\ta, b\n", "text", ("a, b",)),
    ],
)
def test_files_are_read_without_blank_lines_and_marks(tmp_path, name, content, column, found):
    (tmp_path / name).write_bytes(content.encode())
    given = {"file": name} if column is None else {"file": name, "column": column}
    assert read(**given) == found


@pytest.mark.parametrize(
    ("name", "content", "column", "message"),
    [
        ("p.txt", b"", None, "prompts: p.txt holds no prompts; should hold at least one"),
        ("p.txt", b" \n\n\t\n", None, "prompts: p.txt holds no prompts; should hold at least one"),
        ("p.txt", b"a", "text", "prompts: column 'text' needs a .csv or .tsv file, found p.txt"),
        ("p.csv", b"id,text\n1,a\n", None, "prompts: p.csv is a table; column should say which of id, text"),
        ("p.csv", b"id,text\n1,a\n", "txt", "prompts: p.csv has no column 'txt'; it has id, text"),
        ("p.csv", b"id,text\n", "text", "prompts: p.csv (column 'text') holds no prompts; should hold at least one"),
        ("p.csv", b"", "text", "prompts: p.csv is empty; should be a table with a line of column names"),
        ("p.csv", b"", None, "prompts: p.csv is empty; should be a table with a line of column names"),
        ("p.txt", b"caf\xe9", None, "prompts: p.txt is not UTF-8 text: unexpected end of data at byte 3"),
        ("p.txt", b"\x89PNG\r\n", None, "prompts: p.txt is not UTF-8 text: invalid start byte at byte 0"),
    ],
)
def test_what_cannot_be_used_is_named(tmp_path, name, content, column, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CompressorError) as caught:
        read(**({"file": name} if column is None else {"file": name, "column": column}))
    assert str(caught.value) == message


def test_a_file_that_is_missing_or_a_folder_is_named(tmp_path):
    with pytest.raises(CompressorError, match=r"^prompts: no such file: none\.txt$"):
        read(file="none.txt")
    (tmp_path / "folder").mkdir()
    with pytest.raises(CompressorError, match=r"^prompts: folder cannot be read: Is a directory$"):
        read(file="folder")


def test_a_list_may_not_be_blank():
    assert read(texts=("a", " ", "b ")) == ("a", "b")
    with pytest.raises(
        CompressorError, match=r"^prompts: the recipe's list holds no prompts; should hold at least one$"
    ):
        read(texts=())


def test_a_built_in_pipeline_has_captions_to_calibrate_with_and_others_to_judge_by():
    source = Prompts(builtin="shapes")
    calibration, evaluation = prompts.read(source, "calibration"), prompts.read(source, "evaluation")
    assert len(calibration) >= 100
    assert len(evaluation) >= 256
    assert not set(calibration) & set(evaluation)


def test_captions_for_models_of_the_world_are_many_and_different():
    source = Prompts(builtin="captions")
    calibration, evaluation = prompts.read(source, "calibration"), prompts.read(source, "evaluation")
    assert len(calibration) == len(set(calibration)) >= 200
    assert len(evaluation) == len(set(evaluation)) >= 64
    assert not set(calibration) & set(evaluation)
    assert all(text == text.strip() and text.isascii() for text in calibration + evaluation)


def test_unknown_built_in_prompts_are_named():
    with pytest.raises(CompressorError) as caught:
        read(builtin="shape")
    assert str(caught.value) == (
        "no built-in prompts named 'shape'; did you mean 'shapes'? known: captions, shapes, shapes-flux, shapes-unet"
    )


def test_drawing_is_decided_by_the_seed_and_never_repeats():
    every = tuple(f"prompt {i}" for i in range(50))
    drawn = prompts.draw(every, 20, 3)
    assert drawn == prompts.draw(every, 20, 3)
    assert drawn != prompts.draw(every, 20, 4)
    assert len(set(drawn)) == 20
    assert set(drawn) <= set(every)


def test_all_are_drawn_where_there_are_too_few():
    assert sorted(prompts.draw(("b", "a"), 100, 0)) == ["a", "b"]
