"""What was done to a model and what that cost and gained: `report.json` for programs, `report.html` for people.

facts       everything there is to say about a run, as frozen dataclasses
page        the HTML page; heat draws its maps, images its pictures, compressor.units its numbers
measuring   takes metrics, which are plugins; pairs and shapes are the two that ship
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from compressor.output import write_whole
from compressor.plugin import Samples
from compressor.report.facts import (
    CalibrationFacts,
    ExportFacts,
    GroupRow,
    GroupSize,
    LayerRow,
    ModelFacts,
    PartRow,
    ProofFacts,
    Report,
    Size,
    Sizes,
    Structure,
    read,
    sparsity,
)
from compressor.report.measuring import measure

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "CalibrationFacts",
    "ExportFacts",
    "GroupRow",
    "GroupSize",
    "LayerRow",
    "ModelFacts",
    "PartRow",
    "ProofFacts",
    "Report",
    "Size",
    "Sizes",
    "Structure",
    "grid",
    "measure",
    "read",
    "sparsity",
    "write",
]


def write(report: Report, samples: Samples | None, folder: Path) -> None:
    """Writes `report.json` and `report.html`, replacing those that are there; neither is ever seen half written.

    Args:
        report: what to tell.
        samples: the pairs of images to show, if any were drawn; the page shows the first 24.
        folder: made if it is missing.

    """
    from compressor.report.page import render

    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (("report.json", report.dump()), ("report.html", render(report, samples))):
        write_whole(folder / name, text)


def grid(samples: Samples, columns: int, *, captions: bool = True) -> Image:
    """One picture of all pairs, for a README: each dense image above the pruned one, `columns` pairs in a row.

    Args:
        samples: one pair or more. Images smaller than 128 pixels are enlarged by a whole factor, those larger than 512
            pixels scaled down.
        columns: pairs in a row, at least 1.
        captions: write each caption below its pair (cut after five lines).

    """
    from compressor.report import images

    return images.grid(samples, columns, captions=captions)
