"""The JSON Schema that editors complete from agrees with what recipes are."""

from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from compressor import located_yaml, recipe, registry

BASE = "model: builtin:shapes\ncalibration: {prompts: [a]}\nprune: [{obs_diff: {sparsity: 0.5}}]\noutput: out\n"


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    return recipe.schema()


def accepts(schema: dict[str, Any], data: Any) -> bool:
    return jsonschema.Draft202012Validator(schema).is_valid(data)


def test_it_is_a_json_schema(schema):
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"


def test_it_accepts_every_recipe_that_comes_with_the_package(schema):
    for path in recipe.shipped().values():
        data = located_yaml.read(path).data
        errors = [error.message for error in jsonschema.Draft202012Validator(schema).iter_errors(data)]
        assert not errors, path.name


def test_it_accepts_a_recipe_with_every_default_spelled_out(schema):
    for name in recipe.shipped():
        assert accepts(schema, recipe.load(name).dump())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model", {"source": "a/b", "dtype": "float16"}),
        ("calibration", {"prompts": "p.txt", "memory": "8GiB"}),
        ("calibration", {"prompts": {"file": "p.csv", "column": "c"}, "memory": 10**9}),
        ("calibration", {"prompts": "builtin:shapes", "packages": 3}),
        ("prune", ["magnitude"]),
        ("prune", [{"obs_diff": {"sparsity": 0.5}, "targets": {"include": ["query"]}}]),
        ("prune", [{"wanda": {"granularity": {"n_m": {"keep": 2, "of": 4}}}}]),
        ("prune", [{"wanda": {"granularity": "n_m"}}]),
        ("prune", [{"wanda": {"granularity": "unstructured", "sparsity": 0.5}}]),
        ("export", ["onnx", {"onnx": {"dtype": "float16"}}]),
        ("report", {"metrics": ["pairs"], "prompts": ["a"]}),
    ],
)
def test_it_accepts_the_short_and_the_long_forms(schema, key, value):
    assert accepts(schema, {**yaml.safe_load(BASE), key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("modle", "x"),
        ("model", 5),
        ("model", {"sorce": "x"}),
        ("seed", -1),
        ("calibration", {"prompts": "p.txt", "memory": "8 gigs"}),
        ("calibration", {"prompts": 5}),
        ("calibration", {}),
        ("prune", []),
        ("prune", ["magnitud"]),
        ("prune", [{"obs_diff": {"sparsity": 50}}]),
        ("prune", [{"obs_dif": {"sparsity": 0.5}}]),
        ("prune", [{"obs_diff": {"sparsty": 0.5}}]),
        ("prune", [{"obs_diff": {"sparsity": 0.5}, "wanda": {"sparsity": 0.5}}]),
        ("prune", [{"targets": {"include": ["query"]}}]),
        ("prune", [{"wanda": {"granularity": {"n_m": {"keep": 0, "of": 4}}}}]),
        ("export", ["onxx"]),
        ("export", [{"onnx": {"dtype": "int3"}}]),
        ("output", None),
    ],
)
def test_it_refuses_what_the_recipe_refuses(schema, key, value):
    assert not accepts(schema, {**yaml.safe_load(BASE), key: value})


def test_it_names_every_installed_plugin_with_its_options_and_says_what_they_are(schema):
    entry = schema["$defs"]["Pruning"]["properties"]
    for name in registry.find("pruner"):
        assert set(entry[name]["properties"]) == set(registry.load("pruner", name).model_fields)
        assert all(option.get("description") for option in entry[name]["properties"].values())
        assert entry[name]["description"]
    text = str(schema)
    for kind in ("exporter", "metric", "granularity", "weighting"):
        for name in registry.find(kind):
            assert f"'{name}'" in text


def test_every_key_of_a_recipe_is_described(schema):
    for title, definition in {"Recipe": schema, **schema["$defs"]}.items():
        for key, field in definition["properties"].items():
            described = field.get("description") or "$ref" in field or any("$ref" in kind for kind in field["anyOf"])
            assert described, f"{title}.{key}"


def test_the_file_that_the_command_prints_is_this_schema(schema, tmp_path):
    from click.testing import CliRunner

    from compressor.cli import main

    done = CliRunner().invoke(main, ["schema"])
    assert done.exit_code == 0
    Path(tmp_path / "schema.json").write_text(done.output)
    assert yaml.safe_load(done.output) == schema
