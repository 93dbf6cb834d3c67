"""What a user gets: a wheel with recipes and data, entry points that load, and nothing called `plugins` or `tests`."""

import os
import subprocess
import sys
import tomllib
import zipfile
from importlib import import_module, metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
ENTRY_POINTS = PROJECT["project"]["entry-points"]


@pytest.mark.parametrize(
    ("group", "name"), [(group, name) for group, entries in ENTRY_POINTS.items() for name in entries]
)
def test_an_entry_point_names_something_that_exists_and_is_installed(group, name):
    module, _, attribute = ENTRY_POINTS[group][name].partition(":")
    assert getattr(import_module(module), attribute) is not None
    installed = [entry.value for entry in metadata.entry_points(group=group) if entry.name == name]
    assert installed == [ENTRY_POINTS[group][name]], "run `pip install -e .` again"


def test_every_plugin_folder_is_reached_by_an_entry_point():
    reached = {value.partition(":")[0].partition(".")[0] for group in ENTRY_POINTS.values() for value in group.values()}
    for root in ("plugins", "exporters"):
        for folder in (ROOT / root).glob("compressor_*"):
            assert folder.name in reached


def test_the_command_is_installed():
    assert [e.value for e in metadata.entry_points(group="console_scripts") if e.name == "compressor"] == [
        PROJECT["project"]["scripts"]["compressor"]
    ]


@pytest.fixture(scope="module")
def wheel_file(tmp_path_factory) -> Path:
    """A wheel that is built from this tree."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    (file,) = folder.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def wheel(wheel_file) -> list[str]:
    """The names of the files in it."""
    with zipfile.ZipFile(wheel_file) as archive:
        return archive.namelist()


@pytest.mark.slow
def test_a_wheel_has_the_packages_at_its_root_and_nothing_else(wheel):
    tops = {name.partition("/")[0] for name in wheel}
    packages = {folder.name for root in ("plugins", "exporters") for folder in (ROOT / root).glob("compressor_*")}
    info = {name for name in tops if name.endswith(".dist-info")}
    assert tops - info == {"compressor"} | packages
    assert len(info) == 1


@pytest.mark.slow
def test_a_wheel_has_every_module_recipe_and_data_file(wheel):
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in tracked:
        root, _, rest = name.partition("/")
        if root in ("plugins", "exporters"):
            assert rest in wheel
        elif root == "compressor" and not name.endswith(".md"):
            assert name in wheel
        elif root == "recipes":
            assert f"compressor/recipes/{rest}" in wheel
    for needed in ("compressor/recipes/quickstart.yaml", "compressor/report/page.html.j2", "compressor/py.typed"):
        assert needed in wheel
    assert any(name.startswith("compressor/shapes/pipeline/") and name.endswith(".safetensors") for name in wheel)
    assert "compressor/shapes/hashes.json" in wheel


@pytest.mark.slow
def test_a_wheel_has_no_tests_caches_or_documents(wheel):
    strange = ("__pycache__", "tests/", "docs/", ".pyc", ".md", ".git")
    assert not [name for name in wheel if any(word in name for word in strange)]


@pytest.mark.slow
def test_a_wheel_works_away_from_the_repository(wheel_file, tmp_path):
    with zipfile.ZipFile(wheel_file) as archive:
        archive.extractall(tmp_path / "site")
    code = (
        "import compressor, compressor_obs_diff\n"
        "from compressor import builtin, recipe\n"
        "from compressor.cli import main\n"
        "print(compressor.__file__, compressor_obs_diff.__file__, *recipe.shipped().values(), builtin.path('shapes'))\n"
        "main(['check', 'quickstart'])\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    paths, answer = done.stdout.splitlines()
    assert all(Path(path).is_relative_to(tmp_path / "site") for path in paths.split())
    assert answer == "quickstart: ok"
