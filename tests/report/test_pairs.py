import dataclasses
import math
import subprocess
import sys

import pytest
import torch

from compressor.plugin import Samples
from compressor.registry import load
from compressor.report.pairs import Pairs, latent_errors, psnr_of, ssim_of


def test_psnr_is_that_of_the_mean_squared_error():
    dense = torch.zeros(2, 3, 16, 16)
    pruned = torch.stack([torch.full((3, 16, 16), 0.1), torch.full((3, 16, 16), 0.5)])
    assert psnr_of(dense, pruned).tolist() == pytest.approx([20.0, 20 * math.log10(2)], abs=1e-5)


def test_psnr_of_equal_images_is_infinite():
    dense = torch.rand(1, 3, 16, 16)
    assert psnr_of(dense, dense).tolist() == [math.inf]


def test_ssim_of_equal_images_is_1_and_of_opposite_ones_far_less():
    dense = torch.rand(2, 3, 32, 32)
    assert ssim_of(dense, dense).tolist() == pytest.approx([1, 1])
    assert ssim_of(dense, 1 - dense).max() < 0.1


def test_ssim_of_a_brighter_flat_image_is_that_of_the_formula():
    a, b, c1 = 0.5, 0.7, 0.01**2  # without variance only the luminance term is left
    expected = (2 * a * b + c1) / (a * a + b * b + c1)
    flat = torch.ones(1, 3, 32, 32)
    assert ssim_of(a * flat, b * flat).item() == pytest.approx(expected, abs=1e-4)


def test_the_latents_distance_is_relative_to_the_dense_ones(samples: Samples):
    assert latent_errors(samples).tolist() == pytest.approx([0.01] * 4, rel=1e-5)


def test_means_and_standard_errors_are_those_of_numpys_formulas(samples: Samples):
    factors = torch.tensor([0.1, 0.2, 0.3, 0.4])
    moved = dataclasses.replace(samples, pruned_latents=samples.dense_latents * (1 + factors.view(4, 1, 1, 1)))
    figures = Pairs().measure(moved)
    errors = (factors**2).double()
    assert figures["latent_error"] == pytest.approx(errors.mean().item(), rel=1e-5)
    assert figures["latent_error_se"] == pytest.approx(errors.std().item() / 2, rel=1e-5)
    geometric = errors.prod().item() ** 0.25
    assert figures["latent_error_geometric"] == pytest.approx(geometric, rel=1e-5)
    assert figures["latent_error_geometric_se"] == pytest.approx(geometric * errors.log().std().item() / 2, rel=1e-5)
    assert figures["images"] == 4


def test_one_pair_has_no_standard_errors(samples: Samples):
    one = Samples(samples.prompts[:1], *(getattr(samples, name)[:1] for name in
                  ("dense", "pruned", "dense_latents", "pruned_latents")))  # fmt: skip
    assert set(Pairs().measure(one)) == {"psnr", "ssim", "latent_error", "latent_error_geometric", "images"}


def test_equal_pairs_are_told_and_left_out_of_the_mean_psnr(samples: Samples):
    pruned = samples.pruned.clone()
    pruned[1] = samples.dense[1]
    told = "bit for bit equal: 1 of 4 pairs; their PSNR is infinite and left out of the mean"
    with pytest.warns(UserWarning, match=f"^{told}$"):
        figures = Pairs().measure(dataclasses.replace(samples, pruned=pruned))
    assert figures["psnr"] == pytest.approx(psnr_of(samples.dense, samples.pruned)[[0, 2, 3]].mean().item())


def test_nothing_pruned_has_no_psnr_at_all(samples: Samples):
    same = dataclasses.replace(samples, pruned=samples.dense, pruned_latents=samples.dense_latents)
    with pytest.warns(UserWarning, match="bit for bit equal: 4 of 4 pairs"):
        figures = Pairs().measure(same)
    assert figures == pytest.approx(
        {"ssim": 1, "ssim_se": 0, "latent_error": 0, "latent_error_se": 0, "latent_error_geometric": 0, "images": 4},
        abs=1e-6,
    )


def test_every_source_has_pairs():
    assert Pairs().applies("some/hub-id")


def test_metrics_are_found_by_name_and_import_no_torch():
    assert load("metric", "pairs") is Pairs
    code = (
        "import sys; from compressor.registry import load; load('metric', 'pairs'); load('metric', 'shapes'); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
