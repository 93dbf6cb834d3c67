"""YAML with the line of every key, read by the rules of YAML 1.2, and overrides from the command line."""

import pytest

from compressor.errors import CompressorError
from compressor.located_yaml import Located, describe, dotted, read


@pytest.fixture
def text_of(tmp_path, monkeypatch):
    """Reads a text as the file `r.yaml` of the current folder."""
    monkeypatch.chdir(tmp_path)

    def from_text(text: str | bytes) -> Located:
        (tmp_path / "r.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
        return read("r.yaml")

    return from_text


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no", "no"),
        ("yes", "yes"),
        ("on", "on"),
        ("Off", "Off"),
        ("y", "y"),
        ("true", True),
        ("False", False),
        ("2:4", "2:4"),
        ("1:30:00", "1:30:00"),
        ("1e-3", 1e-3),
        ("1E3", 1e3),
        (".5", 0.5),
        ("1.", 1.0),
        ("-1.5e+2", -150.0),
        ("010", 10),
        ("+7", 7),
        ("0", 0),
        ("0x10", "0x10"),
        ("1_000", "1_000"),
        (".inf", float("inf")),
        ("8GiB", "8GiB"),
        ("2020-01-01", "2020-01-01"),
        ("null", None),
        ("~", None),
        ("", None),
        ("'5'", "5"),
        ("e3", "e3"),
        ("builtin:shapes", "builtin:shapes"),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text_of, text, value):
    found = text_of(f"key: {text}\n").data["key"]
    assert found == value
    assert type(found) is type(value)


def test_every_place_has_the_line_of_its_key_or_of_the_nearest_one_around_it(text_of):
    source = text_of("# one\nmodel: x\n\nprune:\n  - a:\n      b: 1\n  - c\n")
    assert source.where(("model",)) == "r.yaml:2"
    assert source.where(("prune", 0, "a", "b")) == "r.yaml:6"
    assert source.where(("prune", 1)) == "r.yaml:7"
    assert source.where(("prune", 0, "a", "missing", 3)) == "r.yaml:5"
    assert source.where(("nowhere",)) == "r.yaml:2"


def test_an_alias_has_the_value_it_stands_for(text_of):
    assert text_of("a: &x [1, 2]\nb: *x\n").data == {"a": [1, 2], "b": [1, 2]}


LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcde", "bcdef", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "r.yaml: should be a mapping with the keys of a recipe, found nothing"),
        ("# nothing\n", "r.yaml: should be a mapping with the keys of a recipe, found nothing"),
        ("- a\n", "r.yaml: should be a mapping with the keys of a recipe, found a list"),
        ("hello", "r.yaml: should be a mapping with the keys of a recipe, found 'hello'"),
        ("a:\n\tb: 1\n", "r.yaml:2: not YAML: found character '\\t' that cannot start any token"),
        ("a: [b\nc: 1", "r.yaml:2: not YAML: expected ',' or ']', but got ':'"),
        ("a: *b\n", "r.yaml:1: not YAML: found undefined alias 'b'"),
        (
            "a: 1\n---\nb: 2\n",
            "r.yaml:2: not YAML: expected a single document in the stream but found another document",
        ),
        ("a: \0\n", "r.yaml: not YAML: unacceptable character #x0000: special characters are not allowed"),
        ("a: " + "[" * 3000, "r.yaml: not YAML that can be read: nested too deep"),
        (b"a: caf\xe9\n", "r.yaml: is not UTF-8 text: invalid continuation byte at byte 6"),
        ("a: 1\nb: 2\na: 3\n", "r.yaml:3: a: this key stands twice, first at r.yaml:1"),
        ("a:\n  - b: 1\n    b: 2\n", "r.yaml:3: a[0].b: this key stands twice, first at r.yaml:2"),
        ("a: &x {b: 1}\nc: {<<: *x}\n", "r.yaml:2: a key should be a word, found '<<'"),
        ("? [a, b]\n: 1\n", "r.yaml:1: a key should be a word, found a list"),
        ("a:\n  5: 1\n", "r.yaml:2: a key should be a word, found '5'"),
        (
            "a: !!python/object/apply:os.system [ls]\n",
            "r.yaml:1: a: a recipe has no use for the tag 'tag:yaml.org,2002:python/object/apply:os.system'",
        ),
        ("a:\n  b: !new x\n", "r.yaml:2: a.b: a recipe has no use for the tag '!new'"),
        ("a: &x [*x]\n", "r.yaml:1: a[0]: an alias here stands for something that holds it"),
        ("a: &x {b: {c: *x}}\n", "r.yaml:1: a.b.c: an alias here stands for something that holds it"),
        ("a: " + "9" * 5000, "r.yaml:1: a: cannot be read as a whole number"),
        ("a: !!float abc\n", "r.yaml:1: a: cannot be read as a number"),
        ("a: !!bool maybe\n", "r.yaml:1: a: cannot be read as true or false"),
    ],
)
def test_what_is_not_a_recipe_is_refused_by_name_and_line(text_of, text, message):
    with pytest.raises(CompressorError) as caught:
        text_of(text)
    assert str(caught.value) == message


def test_aliases_of_aliases_do_not_fill_the_memory(text_of):
    with pytest.raises(CompressorError, match=r"^r\.yaml:1: .*: more than 100,000 values, aliases included$"):
        text_of(LAUGHS)


def test_a_missing_file_and_a_folder_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CompressorError, match=r"^none\.yaml: no such file$"):
        read("none.yaml")
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(CompressorError, match=r"^folder\.yaml: cannot be read: Is a directory$"):
        read("folder.yaml")


def test_a_byte_order_mark_is_no_part_of_the_first_key(text_of):
    assert text_of("\ufeffa: 1\n").data == {"a": 1}


RECIPE = "model: x\nprune:\n  - obs_diff:\n      sparsity: 0.5\n  - wanda\nexport: []\n"


@pytest.mark.parametrize(
    ("assignment", "place", "value"),
    [
        ("prune.0.obs_diff.sparsity=0.6", ("prune", 0, "obs_diff", "sparsity"), 0.6),
        ("prune.1=magnitude", ("prune", 1), "magnitude"),
        ("model=a=b", ("model",), "a=b"),
        ("output=", ("output",), None),
        ("calibration.prompts=[a, b]", ("calibration", "prompts"), ["a", "b"]),
        ("calibration.deeper.still=no", ("calibration", "deeper", "still"), "no"),
    ],
)
def test_an_override_sets_its_value_and_is_the_origin_of_it(text_of, assignment, place, value):
    source = text_of(RECIPE)
    source.set(assignment)
    found = source.data
    for key in place:
        found = found[key]
    assert found == value
    origin = f"--set {assignment.partition('=')[0]}"
    assert source.where(place) == origin
    assert source.where((*place, "inside")) == origin


def test_an_override_does_not_move_its_neighbours(text_of):
    source = text_of(RECIPE)
    source.set("prune.0.obs_diff.damping=0.1")
    assert source.where(("prune", 0, "obs_diff", "sparsity")) == "r.yaml:4"
    assert source.where(("prune", 0, "obs_diff")) == "r.yaml:3"


def test_what_an_override_made_on_the_way_has_it_as_origin(text_of):
    source = text_of(RECIPE)
    source.set("calibration.steps=5")
    assert source.where(("calibration", "prompts")) == "--set calibration.steps"


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("seed", "--set seed: should be KEY.KEY=VALUE, as in prune.0.obs_diff.sparsity=0.6"),
        ("=5", "--set =5: should be KEY.KEY=VALUE, as in prune.0.obs_diff.sparsity=0.6"),
        (
            "seed=[1",
            "--set seed=[1: the value is not YAML: expected ',' or ']', but got '<stream end>'",
        ),
        ("prune.2=x", "--set prune.2=x: prune has no item '2'; should be from 0 to 1"),
        ("prune.obs_diff=x", "--set prune.obs_diff=x: prune has no item 'obs_diff'; should be from 0 to 1"),
        ("prune.²=x", "--set prune.²=x: prune has no item '²'; should be from 0 to 1"),
        ("prune.-1=x", "--set prune.-1=x: prune has no item '-1'; should be from 0 to 1"),
        ("export.0=x", "--set export.0=x: export has no item '0'; it is empty"),
        ("model.source=x", "--set model.source=x: model should be a mapping, found 'x'"),
        (
            "prune.0.obs_diff.sparsity.a=1",
            "--set prune.0.obs_diff.sparsity.a=1: prune[0].obs_diff.sparsity should be a mapping, found 0.5",
        ),
    ],
)
def test_an_override_that_cannot_be_applied_is_named(text_of, assignment, message):
    with pytest.raises(CompressorError) as caught:
        text_of(RECIPE).set(assignment)
    assert str(caught.value) == message


def test_places_are_written_as_in_python():
    assert dotted(("prune", 0, "obs_diff", "sparsity")) == "prune[0].obs_diff.sparsity"
    assert dotted(()) == ""


@pytest.mark.parametrize(
    ("value", "words"),
    [(True, "true"), (None, "nothing"), ("a", "'a'"), (1.5, "1.5"), ([1], "a list"), ({}, "a mapping")],
)
def test_values_are_described_as_they_stand_in_yaml(value, words):
    assert describe(value) == words
