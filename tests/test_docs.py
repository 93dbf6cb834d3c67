"""The documentation says what the code does: its tables, recipes, examples, names and links are held against it."""

from __future__ import annotations

import functools
import re
import sys
import tomllib
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import annotated_types
import jsonschema
import pytest
import yaml
from compressor_tensorrt.profiles import Profile, Range
from pydantic.fields import FieldInfo

from compressor import recipe, registry
from compressor.errors import CompressorError
from compressor.options import Options
from compressor.registry import Choice
from tests import tiny

ROOT = Path(__file__).parent.parent
PAGES = {path.name: path for path in [*sorted((ROOT / "docs").glob("*.md")), *sorted(ROOT.glob("*.md"))]}
OWN = ("architecture.md", "conventions.md", "recipes.md", "plugins.md", "obs-diff.md", "CONTRIBUTING.md")
RECIPE_CLASSES = {
    "The whole": recipe.Recipe,
    "`model`": recipe.Model,
    "`calibration`": recipe.Calibration,
    "Prompts": recipe.Prompts,
    "`prune`": recipe.Pruning,
    "`targets`": recipe.Targets,
    "`report`": recipe.Report,
    "Profile": Profile,
    "Range": Range,
}
OUR_KINDS = [kind for kind in registry.KINDS if kind != "family"]
OUR_PLUGINS = {
    f"`{name}`": registry.load(kind, name)
    for kind in OUR_KINDS
    for name, entry in registry.find(kind).items()
    if entry.dist and entry.dist.name == "diffusion-compressor"
}


@dataclass(frozen=True)
class Fence:
    page: str
    line: int
    language: str
    title: str | None
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def fences(page: str) -> list[Fence]:
    found: list[Fence] = []
    lines: list[str] | None = None
    language, title, start = "", None, 0
    for number, line in enumerate(PAGES[page].read_text(encoding="utf-8").splitlines(), start=1):
        if not line.startswith("```"):
            if lines is not None:
                lines.append(line)
        elif lines is None:
            language, _, rest = line[3:].partition(" ")
            match = re.fullmatch(r'title="(.+)"', rest.strip())
            title, lines, start = match[1] if match else None, [], number
        else:
            found.append(Fence(page, start, language, title, "\n".join(lines) + "\n"))
            lines = None
    assert lines is None, f"{page}:{start}: a fence is not closed"
    return found


def sections(page: str) -> dict[str, str]:
    """Text by heading."""
    parts = re.split(r"^#{1,6} +(.+)$", PAGES[page].read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def type_of(field: FieldInfo) -> str:
    """A field's type as the tables of docs/recipes.md put it."""
    return _bounded(_type(field.annotation, field.metadata), field.metadata)


def default_of(field: FieldInfo) -> str:
    """A field's default as the tables of docs/recipes.md put it."""
    if field.is_required():
        return "required"
    if field.default is None:
        return "none"
    if isinstance(field.default, bool):
        return f"`{field.default}`".lower()
    if isinstance(field.default, tuple):
        return f"`[{', '.join(field.default)}]`"
    if isinstance(field.default, bool):
        return f"`{str(field.default).lower()}`"
    return "its own defaults" if isinstance(field.default, Options) else f"`{field.default}`"


def _type(annotation: object, metadata: list[object]) -> str:
    for mark in metadata:
        if isinstance(mark, Choice):
            return f"{'an' if mark.kind[0] in 'aeiou' else 'a'} {mark.kind}"
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is recipe.Bytes:
        return "size"
    if origin is typing.Annotated:
        return _bounded(_type(args[0], list(args[1:])), list(args[1:]))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type(arg, []) for arg in args if arg is not type(None))
    if origin is tuple:
        item = _type(args[0], [])
        return f"list of {item}" if not item[0].islower() or item == "text" else f"list of {item.split()[1]}s"
    if origin is typing.Literal:
        return ", ".join(f"`{arg}`" for arg in args)
    if isinstance(annotation, type) and issubclass(annotation, Options):
        return annotation.__name__
    assert isinstance(annotation, type)
    return {"str": "text", "int": "whole number", "float": "number", "bool": "true or false"}[annotation.__name__]


def _bounded(text: str, metadata: list[object]) -> str:
    for mark in metadata:
        for kind, sign in (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<")):
            if type(mark) is getattr(annotated_types, kind.capitalize()):
                text += f", {sign} {getattr(mark, kind)}"
    return text


@functools.cache
def schema() -> jsonschema.Draft202012Validator:
    """Of recipes, with the plugins of `extras`."""
    jsonschema.Draft202012Validator.check_schema(found := recipe.schema())
    return jsonschema.Draft202012Validator(found)


@pytest.fixture
def extras(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The example package of docs/plugins.md, installed as pip would: its files, and a dist-info with its plugins."""
    site = tmp_path_factory.mktemp("site")
    project = ""
    for fence in fences("plugins.md"):
        if fence.language == "toml":
            project += fence.text
        elif fence.title:
            file = site / fence.title
            file.parent.mkdir(exist_ok=True)
            file.write_text(fence.text, encoding="utf-8")
    data = tomllib.loads(project)["project"]
    info = site / f"{data['name'].replace('-', '_')}-{data['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {data['name']}\nVersion: {data['version']}\n")
    groups = data["entry-points"].items()
    text = "".join(f"[{g}]\n" + "".join(f"{k} = {v}\n" for k, v in entries.items()) for g, entries in groups)
    (info / "entry_points.txt").write_text(text)
    monkeypatch.syspath_prepend(str(site))
    yield site
    for name in [name for name in sys.modules if name.partition(".")[0] == "compressor_extras"]:
        del sys.modules[name]


@pytest.mark.parametrize(("heading", "cls"), [*RECIPE_CLASSES.items(), *OUR_PLUGINS.items()], ids=str)
def test_the_recipe_page_gives_type_and_default_of_every_option(heading: str, cls: type[Options]) -> None:
    text = sections("recipes.md")[heading]
    for name, field in cls.model_fields.items():
        key = "PRUNER" if cls is recipe.Pruning and name == "pruner" else name
        row = re.search(rf"^\| `{key}` \| (.+?) \| (.+?) \| (.+) \|$", text, re.MULTILINE)
        assert row, f"{heading}: no row for {name}"
        assert (row[1], row[2]) == (type_of(field), default_of(field)), f"{heading}: {name}"
    rows = set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)) - {"PRUNER"}
    assert rows <= set(cls.model_fields), f"{heading}: rows for options that do not exist"


def test_every_option_has_a_description_for_editors_to_show() -> None:
    for cls in [*RECIPE_CLASSES.values(), *OUR_PLUGINS.values()]:
        for name, field in cls.model_fields.items():
            assert field.description, f"{cls.__name__}.{name}"


@pytest.mark.parametrize("fence", [f for p in PAGES for f in fences(p) if f.language == "yaml"], ids=str)
def test_recipes_in_the_documentation_are_valid(fence: Fence, extras: Path, tmp_path: Path) -> None:
    data = yaml.safe_load(fence.text)
    if not isinstance(data, dict) or set(data) - set(recipe.Recipe.model_fields) or fence.text.startswith("# wrong"):
        pytest.skip("not (part of) a recipe")
    whole = {"model": "builtin:shapes", "calibration": {"prompts": ["a"]}, "prune": ["magnitude"], "output": "out"}
    if "prune" in data and "output" in data:
        text = fence.text
    elif not {"calibration", "report"} & set(data) and "prune" not in data:
        text = fence.text + "\n" + yaml.safe_dump({k: v for k, v in whole.items() if k not in data})
    else:
        text = yaml.safe_dump({k: v for k, v in whole.items() if k not in data}) + fence.text
    text = text.replace("prune: [magnitude]", "prune: [{magnitude: {sparsity: 0.5}}]")
    text = text.replace("prune:\n- magnitude\n", "prune:\n- magnitude: {sparsity: 0.5}\n")
    file = tmp_path / "recipe.yaml"
    file.write_text(text, encoding="utf-8")
    recipe.load(file)
    schema().validate(yaml.safe_load(text))


def test_wrong_recipes_in_the_documentation_give_the_messages_that_follow_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = 0
    for page in OWN:
        every = fences(page)
        for fence, answer in pairwise(every):
            if fence.text.startswith("# wrong.yaml"):
                (tmp_path / "wrong.yaml").write_text(fence.text, encoding="utf-8")
                with pytest.raises(CompressorError) as caught:
                    recipe.load("wrong.yaml")
                assert str(caught.value) == answer.text.removeprefix("errors:\n").strip()
                found += 1
    assert found


def test_the_example_plugins_prune_measure_and_export(extras: Path, tmp_path: Path) -> None:
    from compressor.progress import Progress
    from compressor.run import run

    tiny.save("sd3", tmp_path / "sd3")
    (example,) = [f for f in fences("plugins.md") if f.language == "yaml" and "prune" in f.text]
    file = tmp_path / "recipe.yaml"
    file.write_text(example.text, encoding="utf-8")
    calibration = {"prompts": list(tiny.PROMPTS), "steps": 2, "height": tiny.SIDE, "width": tiny.SIDE}
    overrides = {
        "model": str(tmp_path / "sd3"),
        "calibration": calibration,
        "report": {"images": 2, "steps": 2},
        "output": str(tmp_path / "out"),
    }
    assignments = tuple(f"{key}={yaml.safe_dump(value, default_flow_style=True)}" for key, value in overrides.items())
    loaded = recipe.load(file, assignments)
    used = {Choice("pruner").name(entry.pruner) for entry in loaded.prune}
    assert "ria" in used
    output = run(loaded, Progress())
    record = yaml.safe_load((output / "report.json").read_text(encoding="utf-8"))
    layers = [layer for layer in record["layers"] if layer["pruner"] == "ria"]
    assert layers
    assert all(layer["zeros"] == layer["parameters"] // 2 for layer in layers)
    assert set(record["metrics"]["colour"]) == {"shift", "shift_se"}
    assert (output / "masks" / "masks.safetensors").is_file()


def test_every_example_plugin_is_found_and_is_one(extras: Path) -> None:
    for kind in registry.KINDS:
        names = [name for name, e in registry.find(kind).items() if e.dist and e.dist.name == "compressor-extras"]
        assert names, f"docs/plugins.md has no example of a {kind}"
        for name in names:
            registry.load(kind, name)


def test_the_example_family_finds_every_linear_of_the_blocks_and_runs_its_twin(extras: Path) -> None:
    import diffusers
    import torch

    from compressor.structure import find_targets, trace

    family = registry.load("family", "auraflow")
    with torch.device("meta"):
        twin = getattr(diffusers, family.component_class)(
            sample_size=8,
            num_mmdit_layers=1,
            num_single_dit_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=32,
            caption_projection_dim=16,
            pos_embed_max_size=16,
        )
    names = {target.name for target in find_targets(twin, family)}
    linears = {name for name, module in twin.named_modules() if isinstance(module, torch.nn.Linear)}
    assert names == {name for name in linears if re.search(r"_blocks\.\d+\.(attn|ff|ff_context)\.", name)}
    seen = trace(twin, family, height=8, width=8, sequence=5)
    assert seen.shared["joint_transformer_blocks.0.attn.to_v"] == "joint_transformer_blocks.0.attn.to_q"
    assert seen.tokens["single_transformer_blocks.0.attn.to_q"] == 5 + 16 + 8  # text, image, registers


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_the_example_weighting_is_one_in_the_middle_and_smaller_at_the_edges(extras: Path, steps: int) -> None:
    weights = registry.load("weighting", "middle")().weights(tiny.schedule(steps))
    assert len(weights) == steps
    assert weights[0] == weights[-1] == pytest.approx(0.8)
    assert steps < 3 or weights[steps // 2] == 1


def test_the_example_granularity_keeps_one_of_every_group_of_outputs(extras: Path) -> None:
    import torch

    handler = registry.load("granularity", "n_m_outputs")(of=4)
    mask_OI = handler.mask(torch.rand(8, 6), handler.zeros(8, 6, None))
    assert ((~mask_OI).reshape(2, 4, 6).sum(1) == 1).all()
    assert int(mask_OI.sum()) == handler.zeros(8, 6, None)


@pytest.mark.parametrize("page", PAGES)
def test_relative_links_lead_to_files(page: str) -> None:
    text = re.sub(r"^```.*?^```", "", PAGES[page].read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)\s#]+)[^)]*\)", text):
        if "://" not in link and not link.startswith("mailto:"):
            assert (PAGES[page].parent / link).exists(), f"{page}: {link}"


@pytest.mark.parametrize("page", OWN)
def test_functions_and_files_named_in_the_documentation_exist(page: str) -> None:
    import importlib

    text = PAGES[page].read_text(encoding="utf-8")
    for module, name in re.findall(r"`([a-z_]+(?:\.[a-z_]+)*)\.(\w+)\(\)`", text):
        root = "" if module.startswith("compressor") else "compressor."
        assert hasattr(importlib.import_module(f"{root}{module}"), name), f"{page}: {module}.{name}"
    for path in re.findall(r"`((?:compressor|plugins|exporters|recipes|tests|docs)/[\w./-]*)`", text):
        assert "NAME" in path or (ROOT / path).exists(), f"{page}: {path}"


def test_the_layout_in_the_architecture_page_names_every_module_and_no_other() -> None:
    text = sections("architecture.md")["Layout"]
    roots = [ROOT / "compressor", *(ROOT / "plugins").iterdir(), *(ROOT / "exporters").iterdir()]
    files = [
        path
        for root in roots
        for path in root.rglob("*.py")
        if not path.name.startswith("__") and "shapes/train" not in path.as_posix() and root.name != "__pycache__"
    ]
    assert set(re.findall(r"\b(\w+)\.py\b", text)) == {path.stem for path in files}


def test_the_architecture_page_shows_the_floors_that_the_imports_are_held_to() -> None:
    from tests.test_imports import FLOORS

    (block,) = [f for f in fences("architecture.md") if f.title == "floors"]
    shown = [line.partition("#")[0].strip().split(", ") for line in block.text.splitlines()]
    assert [set(floor) for floor in shown] == [set(floor) for floor in reversed(FLOORS)]
