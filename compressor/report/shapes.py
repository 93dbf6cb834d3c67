"""What the judge of `builtin:shapes` reads from the images, held against what their captions ask for."""

from __future__ import annotations

import warnings

from compressor.plugin import Metric, Samples


class Shapes(Metric):
    """The judge's accuracy on every attribute, dense and pruned, and the Frechet distance between the two."""

    def applies(self, source: str) -> bool:
        """The judge knows nothing but coloured shapes."""
        return source.startswith("builtin:shapes")

    def measure(self, samples: Samples) -> dict[str, float]:
        """Judges both sets of images.

        Returns:
            `dense_X`, `pruned_X`: shares of right images (see `compressor.shapes.judge.score` for every X), with their
                standard errors.
            `frechet`: between the judge's features of the pruned and of the dense images: 0 if nothing changed. The
                dense images are the reference, rather than drawn scenes, because they share captions and noise with the
                pruned ones, so that the distance is due to pruning. It shrinks as images are added: compare only
                results from equally many. Left out, with a warning, where there are no more images than features,
                which leaves the covariances without full rank.
            `images`: how many pairs.

        """
        from compressor.shapes import judge

        network = judge.load()
        figures: dict[str, float] = {}
        for side, images in (("dense", samples.dense), ("pruned", samples.pruned)):
            for name, accuracy in judge.score(network, images, samples.prompts).items():
                figures[f"{side}_{name}"] = accuracy.right
                figures[f"{side}_{name}_se"] = accuracy.error
        if len(samples.prompts) > judge.FEATURES:
            figures["frechet"] = judge.frechet_distance(network, samples.pruned, samples.dense)
        else:
            warnings.warn(
                f"the Frechet distance is left out: it needs more than {judge.FEATURES} images, found "
                f"{len(samples.prompts)} (raise report.images)",
                stacklevel=2,
            )
        return figures | {"images": float(len(samples.prompts))}
