"""Plugins are found by entry point, loaded one at a time, and a broken one is a single error that names it."""

import subprocess
import sys
from pathlib import Path

import pytest

from compressor import recipe, registry
from compressor.errors import CompressorError
from compressor.plugin import Pruner

GOOD = '''
"""A pruner of someone else's."""
from compressor.plugin import LayerResult, Pruner


class Zero(Pruner):
    """Sets every weight to zero."""

    strength: int = 1

    def check(self, targets):
        pass

    def zeros(self, target):
        return target.outputs * target.inputs

    def prune(self, component, calibration):
        for target in component.targets:
            target.module.weight.data.zero_()
            yield LayerResult(target.name)


class Half(Pruner):
    """Has no method `prune`."""

    def check(self, targets):
        pass

    def zeros(self, target):
        return 0


text = "no class"
'''


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Puts a distribution on the path that holds one module and names entry points in it."""
    modules = set(sys.modules)

    def distribution(name: str, entries: dict[str, str], source: str = GOOD, group: str = "compressor.pruners") -> None:
        site = tmp_path / name
        info = site / f"{name}-1.2.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
        lines = "\n".join(f"{key} = {value}" for key, value in entries.items())
        (info / "entry_points.txt").write_text(f"[{group}]\n{lines}\n")
        (site / f"{name}_module.py").write_text(source)
        monkeypatch.syspath_prepend(str(site))

    yield distribution
    for name in set(sys.modules) - modules:
        if name.endswith("_module"):
            del sys.modules[name]


def recipe_with(tmp_path: Path, entry: str) -> recipe.Recipe:
    file = tmp_path / "r.yaml"
    file.write_text(f"model: builtin:shapes\nprune: [{entry}]\nreport: {{images: 0}}\noutput: out\n")
    return recipe.load(file)


def test_the_first_party_plugins_take_the_same_door():
    assert set(registry.find("pruner")) >= {"magnitude", "obs_diff", "wanda"}
    assert set(registry.find("exporter")) >= {"onnx"}
    assert set(registry.find("family")) >= {"flux", "sd3", "unet"}
    assert set(registry.find("metric")) >= {"pairs", "shapes"}
    assert set(registry.find("granularity")) >= {"n_m", "unstructured"}
    assert set(registry.find("weighting")) >= {
        "uniform",
        "linear_increase",
        "linear_decrease",
        "log_increase",
        "log_decrease",
    }


def test_every_installed_plugin_loads():
    for kind in registry.KINDS:
        for name in registry.find(kind):
            assert registry.load(kind, name) is not None


def test_names_are_sorted():
    for kind in registry.KINDS:
        assert list(registry.find(kind)) == sorted(registry.find(kind))


def test_a_plugin_of_another_distribution_is_found_loaded_and_used_in_a_recipe(install, tmp_path):
    install("other", {"zero": "other_module:Zero"})
    entry = registry.find("pruner")["zero"]
    assert entry.dist is not None
    assert (entry.dist.name, entry.dist.version) == ("other", "1.2")
    assert issubclass(registry.load("pruner", "zero"), Pruner)
    found = recipe_with(tmp_path, "{zero: {strength: 3}}")
    assert found.prune[0].pruner.model_dump() == {"strength": 3}
    assert found.dump()["prune"][0]["zero"] == {"strength": 3}
    assert recipe_with(tmp_path, "zero").prune[0].pruner.model_dump() == {"strength": 1}


def test_it_prunes_a_pipeline_like_any_other(install, tmp_path):
    from compressor import checkpoint
    from compressor.progress import Progress
    from compressor.run import run
    from tests import tiny

    install("other", {"zero": "other_module:Zero"})
    file = tmp_path / "r.yaml"
    file.write_text(
        f"model: {tiny.folder('sd3')}\nprune:\n  - zero: {{strength: 2}}\n    targets: {{include: [query]}}\n"
        f"report: {{images: 0}}\noutput: {tmp_path}/out\n"
    )
    record = checkpoint.verify(run(recipe.load(file), Progress()))
    assert record["recipe"]["prune"][0]["zero"] == {"strength": 2}
    assert record["layers"]
    for name, row in record["layers"].items():
        assert name.endswith(("to_q", "add_q_proj"))
        assert (row["pruner"], row["sparsity"]) == ("zero", 1.0)


def test_its_options_are_checked_like_those_of_any_other(install, tmp_path):
    install("other", {"zero": "other_module:Zero"})
    with pytest.raises(CompressorError) as caught:
        recipe_with(tmp_path, "{zero: {strenght: 3, strength: a}}")
    assert str(caught.value).splitlines() == [
        f"{tmp_path}/r.yaml:2: prune[0].zero.strength: should be a whole number, found 'a'",
        f"{tmp_path}/r.yaml:2: prune[0].zero.strenght: unknown key; did you mean 'strength'?",
    ]


def test_its_options_are_in_the_schema(install):
    install("other", {"zero": "other_module:Zero"})
    options = recipe.schema()["$defs"]["Pruning"]["properties"]["zero"]
    assert options["description"] == "Sets every weight to zero."
    assert options["properties"]["strength"]["type"] == "integer"


def test_listing_names_imports_none_of_them(install):
    install("other", {"zero": "other_module:Zero"}, source="raise SystemError('imported')")
    assert "zero" in registry.find("pruner")
    assert "other_module" not in sys.modules


@pytest.mark.parametrize(
    ("value", "source", "words"),
    [
        ("other_module:Zero", "import nothing_of_that_name", "cannot be loaded: ModuleNotFoundError: No module named"),
        ("other_module:Zero", "raise RuntimeError('boom')", "cannot be loaded: RuntimeError: boom"),
        ("other_module:Zero", "def f(:", "cannot be loaded: SyntaxError: "),
        ("other_module:Nothing", GOOD, "cannot be loaded: AttributeError: "),
        ("no_such_module:Zero", GOOD, "cannot be loaded: ModuleNotFoundError: No module named 'no_such_module'"),
        ("other_module:text", GOOD, "should be a subclass of compressor.plugin.Pruner, found 'no class'"),
        ("compressor_wanda:Choice", GOOD, "should be a subclass of compressor.plugin.Pruner, found <class"),
        ("other_module:Half", GOOD, "does not define prune"),
    ],
)  # fmt: skip
def test_a_broken_plugin_is_one_error_that_names_it(install, tmp_path, value, source, words):
    install("other", {"zero": value}, source=source)
    with pytest.raises(CompressorError) as caught:
        registry.load("pruner", "zero")
    message = str(caught.value)
    assert message.startswith(f"pruner 'zero' ({value} of other) {words}")
    with pytest.raises(CompressorError) as caught:
        recipe_with(tmp_path, "zero")
    assert str(caught.value) == f"{tmp_path}/r.yaml:2: prune[0]: {message}"


def test_a_broken_plugin_does_not_disturb_recipes_that_do_without_it(install, tmp_path):
    install("other", {"aaa": "other_module:Zero"}, source="raise RuntimeError('boom')")
    found = recipe_with(tmp_path, "{magnitude: {sparsity: 0.5}}")
    assert "magnitude" in found.dump()["prune"][0]


def test_two_plugins_of_one_name_are_refused(install, tmp_path):
    install("other", {"magnitude": "other_module:Zero"})
    with pytest.raises(CompressorError) as caught:
        recipe_with(tmp_path, "{magnitude: {sparsity: 0.5}}")
    message = str(caught.value)
    assert message.startswith("two plugins register the pruner 'magnitude': ")
    assert "compressor_magnitude:Magnitude of diffusion-compressor" in message
    assert "other_module:Zero of other" in message
    assert message.endswith("; uninstall one or rename it")


def test_an_unknown_name_is_answered_with_the_nearest_or_with_all():
    with pytest.raises(CompressorError, match=r"^no pruner named 'magnitud'; did you mean 'magnitude'\?$"):
        registry.load("pruner", "magnitud")
    with pytest.raises(CompressorError) as caught:
        registry.load("exporter", "xyz")
    assert str(caught.value).startswith("no exporter named 'xyz'; installed: onnx")
    assert str(caught.value).endswith(
        "(a plugin just added to a project shows up after `pip install -e .` is run again)"
    )


def test_recipes_and_plugins_are_read_without_torch():
    code = (
        "import sys\n"
        "from compressor import recipe, registry, cli, prompts\n"
        "[registry.load(kind, name) for kind in registry.KINDS if kind != 'family' for name in registry.find(kind)]\n"
        "recipe.load('quickstart')\n"
        "recipe.schema()\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'numpy', 'matplotlib', 'PIL', 'onnx', 'rich'}\n"
        "sys.exit(', '.join(sorted(heavy & set(sys.modules))) or 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
