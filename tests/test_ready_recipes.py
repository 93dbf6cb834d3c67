"""The recipes for published models: each is planned at the model's real size, from its config alone."""

from pathlib import Path

import pytest
from click.testing import CliRunner
from test_plan import FLUX, SD3_MEDIUM, SD21, SD35_LARGE, SD35_MEDIUM, SDXL, write

from compressor import recipe
from compressor.cli import main
from compressor.plan import Plan, plan
from compressor.plugin import Structured

pytestmark = pytest.mark.usefixtures("looked_at_once")

MODELS = {
    "sd2": ("StableDiffusionPipeline", SD21, 768),
    "sdxl": ("StableDiffusionXLPipeline", SDXL, 1024),
    "sd3": ("StableDiffusion3Pipeline", SD3_MEDIUM, 1024),
    "flux": ("FluxPipeline", FLUX, 1024),
}
"""Pipeline class, config of the network and the side of a picture in pixels, by the first word of a recipe's name."""
PURPOSES = ("unstructured-50", "2-4-tensorrt", "structured-20", "structured-30")
BEST = [f"best-{family}" for family in MODELS]
READY = [name for name in recipe.shipped() if not recipe.load(name).model.source.startswith("builtin:")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("models")
    return {name: write(place / name, pipeline, config) for name, (pipeline, config, _) in MODELS.items()}


@pytest.fixture(scope="module")
def others(tmp_path_factory) -> dict[str, Path]:
    """SD3.5, for which the recipes of SD3 say what to change."""
    place = tmp_path_factory.mktemp("others")
    sizes = {"large": SD35_LARGE, "medium": SD35_MEDIUM}
    return {name: write(place / name, "StableDiffusion3Pipeline", config) for name, config in sizes.items()}


def family_of(name: str) -> str:
    return name.removeprefix("best-").partition("-")[0]


def planned(name: str, folders: dict[str, Path]) -> Plan:
    return plan(recipe.load(name, (f"model.source={folders[family_of(name)]}",)))


def test_there_is_one_for_every_family_and_purpose():
    assert {f"{family}-{purpose}" for family in MODELS for purpose in PURPOSES} | set(BEST) <= set(READY)


@pytest.mark.parametrize("name", READY)
def test_a_ready_recipe_passes_check_and_says_what_it_is_for(name):
    done = CliRunner().invoke(main, ["check", name])
    assert (done.exit_code, done.output) == (0, f"{name}: ok\n")
    listed = CliRunner().invoke(main, ["recipes"]).output.splitlines()
    line = next(line for line in listed if line.split()[0] == name)
    assert len(line.split()) > 5
    assert recipe.load(name).output == f"out/{name}"


@pytest.mark.parametrize(
    "name", [name for name in READY if "structured-20" not in name and "structured-30" not in name]
)
def test_a_ready_recipe_that_leaves_shapes_alone_makes_the_zeros_it_is_called_by(name, folders):
    found = planned(name, folders)
    entry = found.entries[0]
    assert sum(layer.zeros for layer in entry.layers) == sum(layer.weights for layer in entry.layers) // 2
    assert found.parameters_after == found.parameters
    assert found.prompts == 100


@pytest.mark.parametrize("name", [name for name in READY if name.endswith(("structured-20", "structured-30"))])
def test_a_ready_structured_recipe_removes_the_share_it_is_called_by_in_aligned_widths(name, folders):
    found = planned(name, folders)
    entry = found.entries[0]
    share = int(name[-2:]) / 100
    for kind in ("heads", "neurons"):
        groups = [group for group in entry.groups if group.kind == kind]
        left = sum(group.after for group in groups) / sum(group.before for group in groups)
        assert left == pytest.approx(1 - share, abs=0.02)
    assert all(group.after % 64 == 0 for group in entry.groups if group.kind == "neurons")
    gone = sum(layer.removed for layer in entry.layers) / sum(layer.weights for layer in entry.layers)
    assert 0.6 * share < gone < share + 0.02  # the first and the last block stay whole, and so do some sides of layers
    assert found.parameters - found.parameters_after >= sum(layer.removed for layer in entry.layers)
    options = recipe.load(name).prune[0].pruner
    assert isinstance(getattr(options, "granularity", None), Structured)


@pytest.mark.parametrize("name", BEST)
def test_the_best_recipes_name_what_the_readme_recommends(name):
    pruner = recipe.load(name).prune[0].pruner
    given = {key: getattr(pruner, key) for key in ("solver", "refit", "objective", "spread")}
    assert given == {"solver": "admm", "refit": True, "objective": "network", "spread": 0.2}
    readme = Path(__file__).parents[1] / "README.md"
    assert "solver: admm, refit: true, objective: network, spread: 0.2}" in readme.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", READY)
def test_a_ready_recipe_exports_pictures_of_the_size_that_the_model_draws(name):
    exporters = {type(exporter).__name__: exporter for exporter in recipe.load(name).export}
    assert ("TensorRT" in exporters) == ("unstructured" not in name and name not in BEST)
    for profile in getattr(exporters.get("TensorRT"), "profiles", ()):
        side = MODELS[family_of(name)][2]
        assert {profile.height.opt, profile.width.opt} == {side}


@pytest.mark.parametrize(
    ("name", "model", "guidance"),
    [
        *((name, "large", 3.5) for name in READY if "sd3" in name),
        ("sd3-structured-30", "medium", 4.5),
        ("sd3-2-4-tensorrt", "medium", 4.5),
    ],
)
def test_the_recipes_of_sd3_suit_sd35_with_the_changes_that_they_name(name, model, guidance, others):
    text = recipe.shipped()[name].read_text(encoding="utf-8")
    assert "# SD3.5: stabilityai/stable-diffusion-3.5-large or -medium, bfloat16 here" in text
    assert " 3.5 or 4.5 in both places" in text.replace("\n  #", "")
    changes = [f"model.source={others[model]}", "model.dtype=bfloat16"]
    changes += [f"{where}.guidance={guidance}" for where in ("calibration", "report")]
    tensorrt = [i for i, exporter in enumerate(recipe.load(name).export) if type(exporter).__name__ == "TensorRT"]
    assert bool(tensorrt) == ("bfloat16 here and in tensorrt" in text)
    found = plan(recipe.load(name, (*changes, *(f"export.{i}.tensorrt.dtype=bfloat16" for i in tensorrt))))
    assert found.warnings == ()
    (entry,) = found.entries
    second = [layer for layer in entry.layers if ".attn2." in layer.name]
    if "structured-" in name and not name.endswith("-50"):
        share = int(name[-2:]) / 100
        for kind, count in (("heads", 38 if model == "large" else 24), ("neurons", 9728 if model == "large" else 6144)):
            groups = [group for group in entry.groups if group.kind == kind]
            assert {group.before for group in groups} == {count}
            left = sum(group.after for group in groups) / sum(group.before for group in groups)
            assert left == pytest.approx(1 - share, abs=0.02)
            assert all(group.after % (2 if kind == "heads" else 128) == 0 for group in groups)
        assert bool(second) == (model == "medium")
    else:
        assert sum(layer.zeros for layer in entry.layers) == sum(layer.weights for layer in entry.layers) // 2
        blocks = 38 if model == "large" else 24
        attention = 0 if "2-4" in name else 8 * blocks - 1  # the last block gives no text
        assert len(entry.layers) == attention + 4 * blocks - 2
