"""The judge: a small classifier that reads every label from a picture, and scores pictures against their captions.

    judge = load()
    table = score(judge, pictures, captions)      # {"shape": Accuracy(right=0.97, error=0.01, count=512), ...}
    distance = frechet_distance(judge, pictures, reference)

It names two objects in a fixed order, the left or upper one first, so that relations and the binding of colours to
shapes can be read off directly.
"""

# Shapes: N pictures, S slots (2), F features.

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from compressor import builtin
from compressor.errors import CompressorError
from compressor.shapes import words
from compressor.shapes.captions import Demand, Thing, parse
from compressor.shapes.scenes import SIDE

FEATURES = 128
"""Length of the feature vector that the Frechet distance compares."""

HEADS = {
    "count": 2,
    "background": len(words.BACKGROUNDS),
    "layout": len(words.LAYOUTS),
    "shape_0": len(words.SHAPES),
    "colour_0": len(words.COLOURS),
    "size_0": len(words.SIZES),
    "shape_1": len(words.SHAPES),
    "colour_1": len(words.COLOURS),
    "size_1": len(words.SIZES),
}
"""What the judge decides, and between how many choices; `_0` and `_1` are the slots of `Scenes`."""


_ROWS = ("count", "shape", "colour", "size", "background", "position", "relation", "one_object", "bound", "two_objects")


class Judge(nn.Module):
    """Convolutions down to 4 x 4, one feature vector, one linear head a label."""

    num_features = FEATURES  # where torchmetrics looks for it

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs, stride in ((3, 24, 1), (24, 32, 2), (32, 48, 2), (48, 64, 2), (64, 64, 2)):
            layers += [
                nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
            ]  # fmt: skip
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 4 * 4, FEATURES), nn.ReLU())
        self.heads = nn.Linear(FEATURES, sum(HEADS.values()))

    def forward(self, pictures: Tensor) -> Tensor:
        """The features (N x F) of pictures (N x 3 x 64 x 64, in [0, 1])."""
        return self.body(pictures * 2 - 1)

    def logits(self, pictures: Tensor) -> dict[str, Tensor]:
        """What each head of `HEADS` thinks of each picture (N x choices)."""
        return dict(zip(HEADS, self.heads(self(pictures)).split(list(HEADS.values()), dim=1), strict=True))


@dataclass(frozen=True)
class Accuracy:
    """A share of right pictures, its standard error, and of how many pictures."""

    right: float
    error: float
    count: int

    def __str__(self) -> str:
        return f"{100 * self.right:5.1f} % +- {100 * self.error:.1f} (of {self.count})"


def load(device: torch.device | str = "cpu", file: Path | None = None) -> Judge:
    """The trained judge.

    Args:
        device: Where to put it.
        file: Its safetensors file; the shipped one if None.

    Raises:
        CompressorError: The shipped file is damaged or missing.
    """
    if file is None:
        builtin.verify(Path(__file__).parent, "judge.safetensors")
        file = Path(__file__).parent / "judge.safetensors"
    judge = Judge()
    judge.load_state_dict(load_file(file))
    return judge.to(device).eval().requires_grad_(False)


@torch.no_grad()
def features(judge: Judge, pictures: Tensor) -> Tensor:
    """The judge's features of pictures (N x 3 x 64 x 64, in [0, 1]), N x F on the CPU.

    Raises:
        CompressorError: The pictures have another shape.
    """
    return torch.cat([judge(batch).float().cpu() for batch in _batches(judge, pictures)])


@torch.no_grad()
def see(judge: Judge, pictures: Tensor) -> list[Demand]:
    """Names what each picture (N x 3 x 64 x 64, in [0, 1]) shows, in the form in which a caption demands it."""
    seen: list[Demand] = []
    for batch in _batches(judge, pictures):
        best = {name: logits.argmax(1).tolist() for name, logits in judge.logits(batch).items()}
        for i in range(len(batch)):
            things = tuple(
                Thing(words.SHAPES[best[f"shape_{slot}"][i]], words.COLOURS[best[f"colour_{slot}"][i]],
                      words.SIZES[best[f"size_{slot}"][i]])
                for slot in range(best["count"][i] + 1)
            )  # fmt: skip
            seen.append(Demand(things, words.LAYOUTS[best["layout"][i]], words.BACKGROUNDS[best["background"][i]]))
    return seen


def score(judge: Judge, pictures: Tensor, captions: Sequence[str]) -> dict[str, Accuracy]:
    """Scores pictures against the captions that they were made from.

    Args:
        judge: From `load`.
        pictures: N x 3 x 64 x 64, in [0, 1], on any device.
        captions: N captions that `captions.parse` reads.

    Returns:
        By name, in this order, leaving out what no caption demands:
        `count`, `shape`, `colour`, `size` (each over all demanded objects), `background`, `position` (of lone objects),
        `relation` (the axis is right and the objects stand the right way round), `one_object` (everything that a
        caption of one object demands), `bound` (two objects, each colour on its shape, wherever they stand),
        `two_objects` (everything that a caption of two objects demands).

    Raises:
        CompressorError: A caption cannot be read, there is not one caption a picture, or pictures have another shape.
    """
    if len(pictures) != len(captions):
        raise CompressorError(f"one caption a picture is needed, found {len(captions)} for {len(pictures)} pictures")
    marks: dict[str, list[bool]] = {}
    for demand, seen in zip([parse(caption) for caption in captions], see(judge, pictures), strict=True):
        for name, right in _marks(demand, seen):
            marks.setdefault(name, []).append(right)
    return {name: _accuracy(marks[name]) for name in _ROWS if name in marks}


def frechet_distance(judge: Judge, pictures: Tensor, reference: Tensor) -> float:
    """The Frechet distance between two sets of pictures in the judge's features, computed in float64.

    Args:
        judge: From `load`.
        pictures: N x 3 x 64 x 64, in [0, 1].
        reference: M x 3 x 64 x 64, in [0, 1].
    """
    metric = FrechetInceptionDistance(feature=judge, normalize=True).to(next(judge.parameters()).device)
    for images, real in ((reference, True), (pictures, False)):
        for batch in _batches(judge, images):
            metric.update(batch, real=real)
    return float(metric.compute())


def _marks(demand: Demand, seen: Demand) -> Iterable[tuple[str, bool]]:
    """Every single thing that a caption demands, and whether it was seen."""
    marks = [("count", len(demand.things) == len(seen.things))]
    pair = len(demand.things) == 2
    things = (*seen.things, Thing("", "", ""))[: len(demand.things)]  # a missing object is wrong in everything
    swapped = pair and _alike(demand.things, things[::-1]) > _alike(demand.things, things)
    for wanted, found in zip(demand.things, things[::-1] if swapped else things, strict=True):
        marks += [("shape", wanted.shape == found.shape), ("colour", wanted.colour == found.colour)]
        marks += [("size", wanted.size == found.size)] if wanted.size else []
    if demand.background:
        marks.append(("background", demand.background == seen.background))
    if demand.layout:
        right = demand.layout == seen.layout and not swapped
        if pair and _alike(demand.things[:1], demand.things[1:]) < 2:  # an order can be seen at all
            right = right and _alike(demand.things, things) > _alike(demand.things, things[::-1])
        marks.append(("relation" if pair else "position", right))
    everything = all(right for _, right in marks)
    if pair:
        marks.append(("bound", len(seen.things) == 2 and max(
            _alike(demand.things, things), _alike(demand.things, things[::-1])) == 4))  # fmt: skip
    marks.append(("two_objects" if pair else "one_object", everything))
    return marks


def _alike(wanted: Sequence[Thing], found: Sequence[Thing]) -> int:
    return sum((a.shape == b.shape) + (a.colour == b.colour) for a, b in zip(wanted, found, strict=True))


def _accuracy(marks: list[bool]) -> Accuracy:
    right = sum(marks) / len(marks)
    return Accuracy(right, math.sqrt(right * (1 - right) / len(marks)), len(marks))


def _batches(judge: Judge, pictures: Tensor) -> Iterable[Tensor]:
    if pictures.shape[1:] != (3, SIDE, SIDE):
        found = " x ".join(map(str, pictures.shape[1:]))
        raise CompressorError(f"the judge reads pictures of 3 x {SIDE} x {SIDE}, found {found}")
    weight = judge.heads.weight
    at_once = 32 if weight.device.type == "cpu" else 1024  # more do not stay in a CPU's caches: four times as slow
    return (batch.to(weight.device, weight.dtype) for batch in pictures.split(at_once))


def loss(judge: Judge, pictures: Tensor, labels: dict[str, Tensor]) -> Tensor:
    """The training loss: cross-entropies of all heads, where a label of -1 (no second object) does not count."""
    logits = judge.logits(pictures)
    losses = [
        F.cross_entropy(logits[name], labels[name], ignore_index=-1, reduction="sum")
        / (labels[name] >= 0).sum().clamp(1)
        for name in HEADS
    ]
    return torch.stack(losses).sum()
