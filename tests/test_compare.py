"""Entries of a recipe tried one by one: what is held against what, and how sure a ratio of errors is."""

import json

import pytest
import torch

from compressor.compare import compare, ratio_of_means
from compressor.recipe import Recipe
from tests import tiny


def test_the_standard_error_of_a_ratio_is_the_spread_of_many_such_ratios():
    generator = torch.Generator().manual_seed(0)
    hard = torch.rand(4000, 64, generator=generator) + 0.5  # what an image costs every pruner
    numerator = 0.3 * hard + 0.05 * torch.randn(4000, 64, generator=generator)
    denominator = hard + 0.1 * torch.randn(4000, 64, generator=generator)
    found = [ratio_of_means(a, b) for a, b in zip(numerator, denominator, strict=True)]
    ratios = torch.tensor([ratio for ratio, _ in found])
    errors = torch.tensor([error for _, error in found])
    assert ratios.mean().item() == pytest.approx(0.3, rel=0.01)
    assert errors.mean().item() == pytest.approx(ratios.std().item(), rel=0.05)


def test_one_image_has_a_ratio_without_a_standard_error():
    assert ratio_of_means(torch.tensor([1.0]), torch.tensor([4.0])) == (0.25, None)


def test_a_row_is_held_against_the_first_above_of_its_granularity_that_took_as_many_weights(tmp_path):
    asked = Recipe.model_validate(
        {
            "model": str(tiny.folder("sd3")),
            "device": "cpu",
            "calibration": {"prompts": ["a", "b"], "steps": 2, "height": tiny.SIDE, "width": tiny.SIDE},
            "prune": [
                {"magnitude": {"sparsity": 0.5}},
                {"magnitude": {"sparsity": 0.25}},
                {"obs_diff": {"sparsity": 0.5}},
                {"obs_diff": {"granularity": {"n_m": {"keep": 2, "of": 4}}}},
                {"magnitude": {"granularity": {"n_m": {"keep": 2, "of": 4}}}},
                {"obs_diff": {"sparsity": 0.502}},
            ],
            "report": {"images": 3, "steps": 2, "prompts": ["a", "b", "c"], "metrics": ["pairs"]},
            "output": str(tmp_path / "out"),
        }
    )
    rows = compare(asked, tiny.quiet(), tmp_path / "compared")
    held = [row.ratio and row.ratio.of for row in rows]
    assert held == [None, None, "prune[0]", None, "prune[3]", "prune[0]"]
    for row in rows:
        if row.ratio:
            other = next(r for r in rows if r.entry == row.ratio.of)
            expected = row.figures["pairs"]["latent_error"] / other.figures["pairs"]["latent_error"]
            assert row.ratio.mean == pytest.approx(expected)
    ratio = rows[2].ratio
    assert ratio is not None
    written = json.loads((tmp_path / "compared" / "compare.json").read_text())
    assert written["rows"][2]["ratio"]["mean"] == ratio.mean
    lines = (tmp_path / "compared" / "compare.md").read_text().splitlines()
    assert lines[0].endswith("| latent error, of that of row | seconds |")
    assert lines[4].startswith("| 3 | obs_diff, sparsity 0.5 |")
    assert f"| {ratio.mean:.4g} ± {ratio.standard_error:.2g} of 1 |" in lines[4]
