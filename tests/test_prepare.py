"""What is found out before anything slow is done."""

from __future__ import annotations

import io
import json

import pytest
from pydantic import ValidationError
from rich.console import Console

from compressor import pipeline
from compressor.calibration import sampling
from compressor.errors import CompressorError
from compressor.measure import Stopwatch
from compressor.plan import plan
from compressor.prepare import prepare
from compressor.progress import Progress
from compressor.recipe import Model, Recipe
from compressor.report import read
from compressor.run import run
from tests import tiny


def test_a_shorter_t5_part_gives_the_network_fewer_text_tokens():
    folder = tiny.folder("sd3")
    loaded = pipeline.load(Model(source=str(folder)), "cpu")
    for length in (None, 10):
        encoded = sampling.encode(loaded, ["a cat"], 3.0, 0, "pictures", length)
        assert encoded[0].tensors["prompt_embeds"].shape[1] == loaded.folder.text_tokens(length)
        assert encoded[0].tensors["negative_prompt_embeds"].shape[1] == loaded.folder.text_tokens(length)
    assert loaded.folder.text_tokens() - loaded.folder.text_tokens(10) == 246


@pytest.mark.parametrize(
    ("kind", "length", "message"),
    [
        ("sd2", 10, "calibration.max_sequence_length has no effect: StableDiffusionPipeline takes none; remove it"),
        ("flux", 513, "calibration.max_sequence_length: should be at most 512, found 513"),
    ],
)
def test_a_length_that_does_not_fit_the_pipeline_is_refused(kind: str, length: int, message: str):
    folder = pipeline.open_folder(Model(source=str(tiny.folder(kind))))
    with pytest.raises(CompressorError) as error:
        folder.check_sequence(length, "calibration.max_sequence_length")
    assert str(error.value) == message


def overlapping(**other) -> Recipe:
    prune = [{"magnitude": {"sparsity": 0.5}}, {"magnitude": {"sparsity": 0.3}, "targets": {"include": ["down"]}}]
    data = {"model": str(tiny.folder("sd3")), "prune": prune, "report": {"images": 0}, "output": "unused", **other}
    return Recipe.model_validate(data)


def test_two_entries_for_one_layer_are_refused_by_run_and_plan(tmp_path):
    expected = (
        "prune[1]: transformer_blocks.0.ff.net.2 is pruned by prune[0] already; give each its own layers by targets"
    )
    with pytest.raises(CompressorError) as error:
        plan(overlapping())
    assert str(error.value) == expected
    with pytest.raises(CompressorError) as error:
        prepare(overlapping(), tmp_path / "out", Stopwatch(), Progress())
    assert str(error.value) == expected
    prepare(overlapping(), tmp_path / "out", Stopwatch(), Progress(), alternatives=True)


def test_the_size_of_pictures_may_be_given_without_a_calibration(tmp_path):
    report = {"images": 1, "prompts": ["a"], "height": 16, "width": 32, "steps": 1}
    prune = [{"magnitude": {"sparsity": 0.5}}]
    recipe = overlapping(report=report, prune=prune)
    assert (plan(recipe).height, plan(recipe).width) == (16, 32)
    drawn = prepare(recipe, tmp_path / "out", Stopwatch(), Progress()).draw(Progress(), "drawing")
    assert drawn is not None
    assert drawn[0].shape[-2:] == (16, 32)


def test_planning_a_model_of_the_hub_fetches_json_files_and_tokenizers_only(monkeypatch):
    asked = {}

    def fetch(source, **options):
        asked.update(options, source=source)
        return str(tiny.folder("sd3"))

    monkeypatch.setattr(pipeline, "snapshot_download", fetch)
    assert pipeline.open_folder(Model(source="org/name"), weights=False).network == "transformer"
    assert asked == {"source": "org/name", "allow_patterns": ["*.json", "tokenizer*/*"]}


def test_metrics_without_images_are_refused():
    with pytest.raises(ValidationError, match="metrics has no effect where images is 0; remove metrics, or draw"):
        overlapping(report={"images": 0, "metrics": ["pairs"]})


def test_a_calibration_that_no_pruner_asks_for_is_told(tmp_path):
    prune = [{"magnitude": {"sparsity": 0.5}}]
    recipe = overlapping(calibration={"prompts": ["a"]}, prune=prune, output=str(tmp_path / "out"))
    told = read(run(recipe, Progress()) / "report.json").warnings
    assert "nothing was calibrated: no pruner of this recipe asks for the inputs of its layers" in told


def test_a_calibration_too_small_is_told_before_it_begins_and_only_once(tmp_path):
    prune = [{"obs_diff": {"sparsity": 0.5}}]
    calibration = {"prompts": ["a"], "steps": 1, "packages": 1, "guidance": 1.0, "height": 16, "width": 16}
    recipe = overlapping(calibration=calibration, prune=prune, output=str(tmp_path / "out"))
    written = io.StringIO()
    run(recipe, Progress(Console(file=written)))
    lines = written.getvalue().splitlines()
    warned = [i for i, line in enumerate(lines) if "see fewer distinct tokens than they have inputs" in line]
    assert len(warned) == 1
    assert warned[0] < next(i for i, line in enumerate(lines) if line.startswith("calibrating"))


@pytest.mark.parametrize(
    ("kind", "embeds", "told"), [("flux", False, True), ("flux", True, False), ("sd3", None, False)]
)
def test_a_guidance_scale_that_a_pipeline_does_not_take_is_told(kind, embeds, told, tmp_path):
    folder = tiny.save(kind, tmp_path / kind)
    if embeds is not None:
        file = folder / "transformer" / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"guidance_embeds": embeds}))
    data = {
        "model": str(folder),
        "calibration": {"prompts": ["a"], "guidance": 3.5},
        "prune": [{"magnitude": {"sparsity": 0.5}}],
        "report": {"images": 1, "guidance": 1.0},
        "output": "out",
    }
    warned = [text for text in plan(Recipe.model_validate(data)).warnings if "guidance" in text]
    expected = "calibration.guidance has no effect: this FluxPipeline was trained without a guidance scale"
    assert warned == ([expected] if told else [])
    del data["calibration"]["guidance"]  # type: ignore[attr-defined]
    assert not any("guidance" in text for text in plan(Recipe.model_validate(data)).warnings)
