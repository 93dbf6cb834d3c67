"""What `compressor doctor` says of plugins that it cannot simply ask."""

import sys
import types
from pathlib import Path

import pytest
from pydantic import Field

from compressor import recipe
from compressor.doctor import examine
from compressor.plugin import Export, Exporter, Metric, Samples
from compressor.prepare import _choose_metrics


class Needy(Exporter):
    """Cannot be made without being told where."""

    where: str = Field(description="a place")

    def available(self) -> str | None:
        return f"nothing at {self.where}"

    def export(self, pipeline, folder: Path) -> Export:
        raise NotImplementedError


class Picky(Metric):
    """Cannot be made without a reference."""

    reference: str = Field(description="a file")

    def applies(self, source: str) -> bool:
        return True

    def measure(self, samples: Samples) -> dict[str, float]:
        raise NotImplementedError


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("needy_plugins")
    vars(module).update(Needy=Needy, Picky=Picky)
    monkeypatch.setitem(sys.modules, "needy_plugins", module)
    info = tmp_path / "needy-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: needy\nVersion: 1\n")
    (info / "entry_points.txt").write_text(
        "[compressor.exporters]\nneedy = needy_plugins:Needy\n[compressor.metrics]\npicky = needy_plugins:Picky\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.usefixtures("installed")
def test_an_exporter_with_required_options_is_named_with_them():
    exporters = dict(examine()["exporters"])
    assert exporters["needy"] == "needs options: where"
    assert exporters["onnx"] == "ready" or "pip install" in exporters["onnx"]


@pytest.mark.usefixtures("installed")
def test_a_metric_with_required_options_is_taken_only_where_a_recipe_names_it():
    data = {"model": "a", "prune": [{"magnitude": {"sparsity": 0.5}}], "report": {"images": 0}, "output": "b"}
    assert "picky" not in _choose_metrics(recipe.Recipe.model_validate(data))
    data["report"] = {"prompts": ["a cat"], "images": 1, "metrics": [{"picky": {"reference": "x"}}]}
    assert list(_choose_metrics(recipe.Recipe.model_validate(data))) == ["picky"]


def test_versions_devices_and_plugins_are_told():
    told = examine()
    assert dict(told["versions"])["diffusion-compressor"]
    assert dict(told["devices"])["cpu"]
    assert "obs_diff" in dict(told["plugins"])["pruner"]
