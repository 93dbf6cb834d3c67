"""How near each pruned image is to the dense one that was drawn from the same noise."""

# Shapes: N pairs, C channels, H W pixels.

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from compressor.plugin import Metric, Samples

if TYPE_CHECKING:
    from torch import Tensor


class Pairs(Metric):
    """PSNR and SSIM of the image pairs, and the distance of their final latents."""

    def applies(self, source: str) -> bool:
        """Any model has pairs."""
        return True

    def measure(self, samples: Samples) -> dict[str, float]:
        """The means over the pairs, with standard errors where there are two pairs or more.

        Returns:
            `psnr`: dB, over the pairs that are not bit for bit equal (left out if all are, and a warning says so).
            `ssim`: Wang et al., 2004; 1 for equal images.
            `latent_error`: mean of ||pruned - dense||^2 / ||dense||^2 over the final latents.
            `latent_error_geometric`: the geometric mean of the same, which one far pair does not dominate.
            `images`: how many pairs.

        """
        psnr = psnr_of(samples.dense, samples.pruned)
        differ = psnr.isfinite()
        if not differ.all():
            equal = int((~differ).sum())
            warnings.warn(
                f"bit for bit equal: {equal} of {len(psnr)} pairs; their PSNR is infinite and left out of the mean",
                stacklevel=2,
            )
        errors = latent_errors(samples)
        return {
            **_mean("psnr", psnr[differ]),
            **_mean("ssim", ssim_of(samples.dense, samples.pruned)),
            **_mean("latent_error", errors),
            **_geometric_mean("latent_error_geometric", errors),
            "images": float(len(psnr)),
        }


def psnr_of(dense: Tensor, pruned: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each pair in dB (N), for images N x C x H x W in [0, 1]; infinite if equal."""
    import torch
    from torchmetrics.functional.image import peak_signal_noise_ratio

    # One pair at a time, here and below, since copies of all large images may not fit the memory.
    pairs = zip(dense, pruned, strict=True)
    return torch.stack([peak_signal_noise_ratio(b.double(), a.double(), data_range=1.0) for a, b in pairs])


def ssim_of(dense: Tensor, pruned: Tensor) -> Tensor:
    """Structural similarity of each pair (N), for images N x C x H x W in [0, 1]."""
    import torch
    from torchmetrics.functional.image import structural_similarity_index_measure

    values: list[Tensor] = []
    for a, b in zip(dense, pruned, strict=True):
        value = structural_similarity_index_measure(b[None].float(), a[None].float(), data_range=1.0)
        assert isinstance(value, torch.Tensor)  # a tuple only where the contrast is asked for too
        values.append(value)
    return torch.stack(values).double()


def latent_errors(samples: Samples) -> Tensor:
    """||pruned - dense||^2 / ||dense||^2 of each pair's final latents (N), in float64."""
    dense, pruned = (latents.double().flatten(1) for latents in (samples.dense_latents, samples.pruned_latents))
    return (pruned - dense).square().sum(1) / dense.square().sum(1)


def _mean(name: str, values: Tensor) -> dict[str, float]:
    if len(values) == 0:
        return {}
    figures = {name: values.mean().item()}
    if len(values) > 1:
        figures[f"{name}_se"] = values.std().item() / len(values) ** 0.5
    return figures


def _geometric_mean(name: str, values: Tensor) -> dict[str, float]:
    """The standard error is that of the mean logarithm, times the mean (the delta method)."""
    if (values == 0).any():
        return {name: 0.0}
    logarithms = values.log()
    figures = {name: logarithms.mean().exp().item()}
    if len(values) > 1:
        figures[f"{name}_se"] = figures[name] * logarithms.std().item() / len(values) ** 0.5
    return figures
