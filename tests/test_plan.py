"""Plans of the real models, made from their configs alone: known sizes, moments counted by hand, within seconds."""

import functools
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from compressor import plan_table, recipe
from compressor.errors import CompressorError
from compressor.plan import Plan, plan
from compressor.units import count, percent
from tests import tiny

SD3: dict[str, Any] = {
    "_class_name": "SD3Transformer2DModel",
    "attention_head_dim": 64,
    "in_channels": 16,
    "out_channels": 16,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048,
    "patch_size": 2,
    "sample_size": 128,
}
SD3_MEDIUM = SD3 | {
    "caption_projection_dim": 1536,
    "num_attention_heads": 24,
    "num_layers": 24,
    "pos_embed_max_size": 192,
}
SD35_MEDIUM = SD3_MEDIUM | {
    "dual_attention_layers": list(range(13)),
    "pos_embed_max_size": 384,
    "qk_norm": "rms_norm",
}
SD35_LARGE = SD3 | {
    "caption_projection_dim": 2432,
    "num_attention_heads": 38,
    "num_layers": 38,
    "pos_embed_max_size": 192,
    "qk_norm": "rms_norm",
}
FLUX = {
    "_class_name": "FluxTransformer2DModel",
    "attention_head_dim": 128,
    "guidance_embeds": True,
    "in_channels": 64,
    "joint_attention_dim": 4096,
    "num_attention_heads": 24,
    "num_layers": 19,
    "num_single_layers": 38,
    "patch_size": 1,
    "pooled_projection_dim": 768,
}
SD21 = {
    "_class_name": "UNet2DConditionModel",
    "attention_head_dim": [5, 10, 20, 20],
    "block_out_channels": [320, 640, 1280, 1280],
    "cross_attention_dim": 1024,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "sample_size": 96,
    "use_linear_projection": True,
}
SDXL = {
    "_class_name": "UNet2DConditionModel",
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "projection_class_embeddings_input_dim": 2816,
    "sample_size": 128,
    "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
}
MODELS = {
    "sd3-medium": ("StableDiffusion3Pipeline", SD3_MEDIUM, 2_028_328_000, 1024),
    "sd3.5-medium": ("StableDiffusion3Pipeline", SD35_MEDIUM, 2_243_171_520, 1024),
    "sd3.5-large": ("StableDiffusion3Pipeline", SD35_LARGE, 8_056_627_520, 1024),
    "flux.1-dev": ("FluxPipeline", FLUX, 11_901_408_320, 1024),
    "sd2.1": ("StableDiffusionPipeline", SD21, 865_910_724, 768),
    "sdxl": ("StableDiffusionXLPipeline", SDXL, 2_567_463_684, 1024),
}
"""Pipeline class, config of the network, its published number of parameters, and the side of a picture in pixels."""

NARROW, WIDE = 4 * 2432 * (2432 + 2), 4 * 9728 * (9728 + 2)
PRUNING = 4 * (7 * 9728**2 // 2 + 9728 * 2432)
"""Bytes of the second moment, the sum and the squares of an input of SD3.5-large, in float32."""


def write(folder: Path, pipeline: str, config: dict[str, Any]) -> Path:
    network = "unet" if config["_class_name"].startswith("UNet") else "transformer"
    (folder / network).mkdir(parents=True)
    (folder / network / "config.json").write_text(json.dumps(config))
    index = {"_class_name": pipeline, network: ["diffusers", config["_class_name"]]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def planned(folder: Path, *, entry: dict[str, Any] | None = None, **calibration: Any) -> Plan:
    data = {
        "model": str(folder),
        "calibration": {"prompts": [f"prompt {i}" for i in range(100)], **calibration},
        "prune": [entry or {"obs_diff": {"sparsity": 0.5}}],
        "output": "out",
    }
    file = folder / "r.yaml"
    file.write_text(yaml.safe_dump(data))
    return plan(recipe.load(file))


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("models")
    return {name: write(place / name, pipeline, config) for name, (pipeline, config, _, _) in MODELS.items()}


@pytest.fixture(scope="module")
def timed(folders) -> Callable[[str], tuple[Plan, float]]:
    """The plan of a real model, made once, and the seconds of computing it took."""

    @functools.cache
    def make(name: str) -> tuple[Plan, float]:
        start = time.process_time()
        return planned(folders[name]), time.process_time() - start

    return make


@pytest.fixture(scope="module")
def large(timed) -> Plan:
    return timed("sd3.5-large")[0]


@pytest.fixture(scope="module")
def short(tmp_path_factory) -> Path:
    """SD3.5-large with four of its 38 blocks, whose plan takes less time."""
    return write(tmp_path_factory.mktemp("short") / "m", "StableDiffusion3Pipeline", SD35_LARGE | {"num_layers": 4})


@pytest.mark.parametrize("name", MODELS)
def test_a_real_model_is_planned_within_seconds_and_has_its_known_size(timed, name):
    found, seconds = timed(name)
    assert seconds < 20
    assert found.parameters == MODELS[name][2]
    assert (found.height, found.width) == (MODELS[name][3],) * 2
    assert found.linears == len(found.entries[0].layers)


def test_the_layers_are_counted_as_by_hand(timed, large):
    assert large.linears == 38 * 12 - 3  # the last block gives no text: no to_add_out, no ff_context
    assert timed("sd3.5-medium")[0].linears == 24 * 12 - 3 + 13 * 4
    assert timed("flux.1-dev")[0].linears == 19 * 12 + 38 * 5
    assert timed("sdxl")[0].linears == 10 * (2 * 2 + 3 * 2 + 10 * 2 + 10 + 10 * 3) == 10 * 70
    assert timed("sd2.1")[0].linears == 10 * 16


def test_half_of_every_layer_becomes_zero(large):
    weights = sum(layer.weights for layer in large.entries[0].layers)
    per_block = 2 * (4 * 2432**2 + 2 * 4 * 2432**2)
    assert weights == 38 * per_block - (1 + 8) * 2432**2
    assert large.zeros == weights // 2


def test_the_parts_of_a_network_add_up_and_are_those_counted_by_hand(timed, large):
    width = 2432
    norms = (37 * 2 * 6 + 6 + 2 + 2) * width**2  # scale, shift and gate twice; the last text and the end have no gate
    parts = {part.name: part for part in large.parts}
    assert list(parts) == ["adaln", "attention", "feed_forward", "other"]
    assert (parts["adaln"].parameters, parts["adaln"].layers, parts["adaln"].gone) == (norms, 38 * 2 + 1, 0)
    for name in ("attention", "feed_forward"):
        assert parts[name].gone == parts[name].parameters // 2
    assert sum(part.parameters for part in large.parts) == large.parameters
    assert sum(part.gone for part in large.parts) == large.zeros
    assert (parts["other"].layers, parts["other"].gone) == (0, 0)
    unet = {part.name: part for part in timed("sdxl")[0].parts}
    assert list(unet) == ["attention", "feed_forward", "other"]


def test_with_adaln_half_is_half_of_nearly_everything(short):
    asked = {"targets": {"include": ["attention", "feed_forward", "adaln"]}}
    without, found = planned(short), planned(short, entry={"obs_diff": {"sparsity": 0.5}} | asked)
    for part in found.parts:
        assert part.gone == (0 if part.name == "other" else part.parameters // 2)
    adaln = next(part for part in found.parts if part.name == "adaln")
    assert found.zeros - without.zeros == adaln.parameters // 2
    assert without.nonzero_macs - found.nonzero_macs == adaln.parameters // 2  # a product with one vector
    assert found.linears == without.linears == len(without.entries[0].layers)
    text = plan_table.as_text(found, layers=False)
    each = ", ".join(
        f"{part.name} {percent(part.gone / part.parameters)} of {count(part.parameters)}" for part in found.parts
    )
    assert f"zero          {percent(found.zeros / found.parameters)} of the network: {each}\n" in text
    assert each.startswith("adaln 50.0 % of ")
    assert "adaln image modulation" in text
    data = json.loads(plan_table.as_json(found))
    assert data["parts"][0] == {"name": "adaln", "layers": 9, "parameters": adaln.parameters, "gone": adaln.gone}


def test_all_adaln_linears_of_a_package_share_their_moments(short):
    found = planned(
        short,
        entry={"obs_diff": {"sparsity": 0.5}, "targets": {"include": ["adaln"]}},
        packages=2,
    )
    assert [len(package.groups) for package in found.entries[0].packages] == [1, 1]
    assert [package.moment_bytes for package in found.entries[0].packages] == [NARROW, NARROW]
    assert sum(len(package.groups[0].targets) for package in found.entries[0].packages) == 9


def test_the_operations_of_a_transformer_are_those_of_its_linears_and_its_attention(large):
    image, text, width = 64 * 64, 77 + 256, 2432
    linear = 38 * (image + text) * 12 * width**2 - text * 9 * width**2
    attention = 38 * 2 * (image + text) ** 2 * width
    assert large.macs == pytest.approx(linear + attention, rel=0.01)
    assert large.macs - large.nonzero_macs == pytest.approx(linear / 2, rel=0.001)


def test_the_moments_are_counted_as_by_hand(large):
    everything = 38 * (6 * NARROW + 2 * WIDE) - (2 * NARROW + WIDE)
    packages = large.entries[0].packages
    assert sum(package.moment_bytes for package in packages) == everything
    assert len(packages) == 4
    assert [package.number for package in packages] == [1, 2, 3, 4]


def test_norms_take_hardly_any_memory(short):
    found = planned(short, entry={"wanda": {"sparsity": 0.5}})
    total = sum(package.moment_bytes for package in found.entries[0].packages)
    assert total == 4 * (6 * 8 * 2432 + 2 * 8 * 9728) - (2 * 8 * 2432 + 8 * 9728)


@pytest.mark.parametrize("memory", ["3GiB", "4GiB", "100GiB"])
def test_packages_fit_the_memory_and_no_two_neighbours_would_fit_together(short, memory):
    found = planned(short, memory=memory)
    limit = int(memory.removesuffix("GiB")) * 2**30
    packages = found.entries[0].packages
    assert sum(package.moment_bytes for package in packages) == 4 * (6 * NARROW + 2 * WIDE) - (2 * NARROW + WIDE)
    assert all(package.moment_bytes + package.workspace <= limit for package in packages)
    for one, other in itertools.pairwise(packages):
        assert one.moment_bytes + other.moment_bytes + max(one.workspace, other.workspace) > limit
    names = [target.name for package in packages for g in package.groups for target in g.targets]
    assert len(names) == len(set(names)) == found.linears


def test_a_memory_that_no_layer_fits_is_refused_with_what_is_needed(short):
    with pytest.raises(CompressorError) as caught:
        planned(short, memory="500MB")
    moments, pruning = 2 * 4 * 9728 * (9728 + 2), PRUNING
    assert str(caught.value) == (
        f"calibration.memory: should be at least {moments + pruning:,} bytes: transformer_blocks.0.ff.net.2 and the "
        f"layers beside it need {moments:,} for their moments and {pruning:,} to be pruned; found 500,000,000"
    )


def test_more_packages_than_there_are_units_are_refused():
    with pytest.raises(CompressorError, match=r"^calibration\.packages: should be at most 8, the number of units"):
        plan_of_tiny({"calibration": {"prompts": ["a"], "packages": 9}})


def test_forwards_are_packages_times_the_steps_that_run_times_batches(short):
    found = planned(short, packages=5, steps=30, batch=8, stride=1)
    assert found.prompts == 100
    assert found.entries[0].forwards == 5 * 30 * 13
    assert planned(short, samples=10, packages=5, steps=30, batch=8, stride=1).entries[0].forwards == 5 * 30 * 2
    every_other = planned(short, samples=10, packages=5, steps=30, batch=8)
    assert every_other.entries[0].forwards == 5 * (15 + 16)  # 0, 2, ..., 28 and 0, 1, 3, ..., 29


def test_too_few_prompts_for_full_rank_are_told_with_figures(short):
    few = planned(short, samples=1, steps=1)
    assert len(few.warnings) == 1
    assert " layers see fewer distinct tokens than they have inputs" in few.warnings[0]
    assert " prompts would do" in few.warnings[0]
    assert not planned(short, samples=100, steps=25).warnings


def test_a_larger_picture_costs_more(short):
    found = planned(short, height=1536, width=1024)
    assert (found.height, found.width) == (1536, 1024)
    assert found.macs > 1.4 * planned(short).macs


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"height": 1000}, "calibration.height: should be a multiple of 16 pixels, found 1000"),
        ({"width": 4096}, "calibration.width: should be at most 3072 pixels, found 4096"),
    ],
)
def test_a_size_that_cannot_be_drawn_is_refused(short, changes, words):
    with pytest.raises(CompressorError) as caught:
        planned(short, **changes)
    assert str(caught.value) == words


def plan_of_tiny(changes: dict[str, Any]) -> Plan:
    data = {
        "model": str(tiny.folder("sd3")),
        "calibration": {"prompts": ["a"]},
        "prune": [{"obs_diff": {"sparsity": 0.5}}],
        "output": "out",
        **changes,
    }
    from compressor.recipe import Recipe

    return plan(Recipe.model_validate(data))


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (
            {"obs_diff": {"sparsity": 0.5}, "targets": {"include": ["atention"]}},
            "prune[0].targets: 'atention' matches none of the 21 layers; did you mean 'attention'?",
        ),
        (
            {"obs_diff": {"sparsity": 0.5}, "targets": {"exclude": ["re:nothing"]}},
            "prune[0].targets: 're:nothing' matches none of the 21 layers; ",
        ),
        (
            {"obs_diff": {"sparsity": 0.5}, "targets": {"include": ["query"], "exclude": ["attention"]}},
            "targets: exclude leaves none of the 4 layers that include chose",
        ),
        (
            {"obs_diff": {"granularity": {"n_m": {"keep": 2, "of": 5}}}},
            "transformer_blocks.0.attn.to_q: keep 2 of 5 needs a multiple of 5 inputs, found 16; ",
        ),
    ],
)
def test_layers_that_do_not_fit_are_named(entry, words):
    with pytest.raises(CompressorError) as caught:
        plan_of_tiny({"prune": [entry]})
    assert words in str(caught.value)


def test_two_entries_of_prune_are_two_entries_of_the_plan():
    found = plan_of_tiny(
        {
            "prune": [
                {"wanda": {"sparsity": 0.5}, "targets": {"include": ["attention"]}},
                {"magnitude": {"granularity": {"n_m": {"keep": 1, "of": 4}}}, "targets": {"include": ["feed_forward"]}},
            ]
        }
    )
    wanda, magnitude = found.entries
    assert (wanda.pruner, magnitude.pruner) == ("wanda", "magnitude")
    assert (len(magnitude.packages), magnitude.forwards) == (0, 0)
    assert sum(layer.zeros for layer in magnitude.layers) == sum(layer.weights for layer in magnitude.layers) * 3 // 4
    assert found.zeros == sum(layer.zeros for entry in found.entries for layer in entry.layers)


def test_the_tables_say_what_the_plan_does(large):
    text = plan_table.as_text(large, layers=False)
    assert "parameters    8.06 G" in text
    assert "family sd3" in text
    assert "453 layers" in text
    every = plan_table.as_text(large, layers=True)
    assert "transformer_blocks.37.attn.to_out.0" in every
    data = json.loads(plan_table.as_json(large))
    assert data["parameters"] == large.parameters
    assert len(data["entries"][0]["layers"]) == 453
    packages = data["entries"][0]["packages"]
    assert sum(package["moment_bytes"] for package in packages) > 0
    assert [package["workspace"] for package in packages] == [PRUNING] * 4
    assert max(package["moment_bytes"] for package in packages) == 8_898_240_512
    assert "4 packages of at most 8.90 GB of moments and at least 1.42 GB to prune them, " in text
