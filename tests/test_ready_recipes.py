"""The recipes for published models: each is planned at the model's real size, from its config alone."""

from pathlib import Path

import pytest
from click.testing import CliRunner
from test_plan import FLUX, SD3_MEDIUM, SD21, SDXL, write

from compressor import recipe
from compressor.cli import main
from compressor.plan import Plan, plan
from compressor.plugin import Structured

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
    assert given == {"solver": "admm", "refit": True, "objective": "network", "spread": 0.1}
    readme = Path(__file__).parents[1] / "README.md"
    assert "solver: admm, refit: true, objective: network, spread: 0.1}" in readme.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", READY)
def test_a_ready_recipe_exports_pictures_of_the_size_that_the_model_draws(name):
    exporters = {type(exporter).__name__: exporter for exporter in recipe.load(name).export}
    assert ("TensorRT" in exporters) == ("unstructured" not in name and name not in BEST)
    for profile in getattr(exporters.get("TensorRT"), "profiles", ()):
        side = MODELS[family_of(name)][2]
        assert {profile.height.opt, profile.width.opt} == {side}
