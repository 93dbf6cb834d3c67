"""Components that take turns: the same results, and only one of them on the device at a time."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from compressor import offload
from compressor import pipeline as pipelines
from compressor.errors import CompressorError
from compressor.offload import Turn, take_turns
from compressor.recipe import Model, Recipe
from compressor.run import run
from tests import tiny


class Traveller(nn.Linear):
    """Goes nowhere, and notes where it was sent."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.place = "cpu"

    def to(self, device: Any) -> Traveller:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.place = str(device)
        return self


def test_only_the_one_that_computes_is_on_the_device():
    first, second, third = members = [Traveller(), Traveller(), Traveller()]
    take_turns(members, torch.device("cuda"))
    for turn in (first, third, first, second):
        turn(torch.zeros(1, 2))
        assert [member.place for member in members] == ["cuda" if member is turn else "cpu" for member in members]
    offload.bring(third)
    assert [member.place for member in members] == ["cpu", "cpu", "cuda"]


def test_a_component_without_turns_stays_where_it_is():
    alone = Traveller()
    offload.bring(alone)
    assert alone.place == "cpu"
    assert offload.computes_on(alone) == torch.device("cpu")


def test_who_waits_on_the_cpu_computes_on_the_device():
    network = Traveller()
    take_turns([network], torch.device("cuda:1"))
    assert offload.computes_on(network) == torch.device("cuda:1")


def test_example_inputs_are_made_where_the_network_computes():
    loaded = tiny.load("sd3")
    take_turns([loaded.module], torch.device("meta"))
    assert {value.device.type for value in loaded.example_inputs().values()} == {"meta"}
    assert {parameter.device.type for parameter in loaded.module.parameters()} == {"meta"}


def recipe(output: Path, **changes: Any) -> Recipe:
    size = {"height": tiny.SIDE, "width": tiny.SIDE}
    data = {
        "model": str(tiny.folder("sd3")),
        "device": "cpu",
        "calibration": {"prompts": ["a", "b"], "steps": 2, "batch": 2, "packages": 2, **size},
        "prune": [{"obs_diff": {"granularity": {"structured": {"heads": 0.5, "keep_first": 0, "keep_last": 0}}}}],
        "report": {"images": 1, "steps": 2, "metrics": ["pairs"]},
        "output": str(output),
    }
    return Recipe.model_validate(data | changes)


def test_a_run_with_turns_gives_the_same_result(tmp_path, monkeypatch):
    run(recipe(tmp_path / "plain"), tiny.quiet())
    turns: list[str] = []
    begin = Turn.begin

    def note(self: Turn, module: nn.Module) -> None:
        turns.append(type(module).__name__)
        begin(self, module)

    def load(*args: Any, **kwargs: Any) -> pipelines.Pipeline:
        found = loaded(*args, **{**kwargs, "turns": False})
        if kwargs.get("turns"):  # which a CPU refuses
            parts = [part for part in found.pipe.components.values() if isinstance(part, nn.Module)]
            take_turns(parts, torch.device("cpu"))
        return found

    loaded = pipelines.load
    monkeypatch.setattr(Turn, "begin", note)
    monkeypatch.setattr(pipelines, "load", load)
    run(recipe(tmp_path / "turns", offload="model"), tiny.quiet())
    order = [name for name, _ in groupby(turns)]
    encoders, rest = order[: order.index("SD3Transformer2DModel")], order[order.index("SD3Transformer2DModel") :]
    assert set(encoders) == {"CLIPTextModelWithProjection"}
    # drawn, decoded, brought back to be calibrated, pruned and proved, drawn and decoded again, saved and compared
    assert rest == ["SD3Transformer2DModel", "AutoencoderKL"] * 2 + ["SD3Transformer2DModel"]
    for part in ("transformer", "vae"):
        found = [load_file(tmp_path / way / part / "diffusion_pytorch_model.safetensors") for way in ("plain", "turns")]
        assert found[0].keys() == found[1].keys()
        assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


def test_turns_on_the_cpu_are_refused():
    with pytest.raises(CompressorError) as caught:
        pipelines.load(Model(source=str(tiny.folder("sd3"))), "cpu", turns=True)
    assert str(caught.value) == ("offload: model has no effect on the CPU: the model is there already; leave it out")
