"""The shipped caption lists: which captions calibrate, which evaluate, and which scenes training must never show."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from torch import Tensor

from compressor.shapes import captions, scenes, words
from compressor.shapes.captions import Demand

COUNT = 1024
"""Length of either list."""

_EVALUATION_SEED, _CALIBRATION_SEED = 20, 21


def labels(batch: scenes.Scenes) -> list[list[int]]:
    """The label rows that `captions.demands` takes."""
    slots = torch.stack([batch.shape, batch.colour, batch.size], dim=2).flatten(1)
    return torch.cat([batch.background[:, None], batch.layout[:, None], slots], dim=1).tolist()


def evaluation() -> list[str]:
    """Writes the evaluation list: complete captions of distinct scenes, one and two objects in turn."""
    rng = random.Random(_EVALUATION_SEED)
    seen: set[Demand] = set()
    written: tuple[list[str], list[str]] = ([], [])
    for demand in captions.demands(labels(scenes.sample(8 * COUNT, _EVALUATION_SEED, pairs=0.5))):
        kind = written[len(demand.things) - 1]
        if demand not in seen and len(kind) < COUNT // 2:
            kind.append(captions.write(demand, rng))
            seen.add(demand)
    return [caption for pair in zip(*written, strict=True) for caption in pair]


def calibration() -> list[str]:
    """Writes the calibration list: captions as in training, of scenes that the evaluation list does not hold."""
    rng = random.Random(_CALIBRATION_SEED)
    reserved = held_out(evaluation())
    drawn = scenes.sample(4 * COUNT, _CALIBRATION_SEED, pairs=0.5)
    drawn = drawn[~torch.isin(drawn.codes(), reserved)]
    written = (captions.write(captions.forget(demand, rng), rng) for demand in captions.demands(labels(drawn)))
    return list(dict.fromkeys(written))[:COUNT]


def held_out(complete: list[str]) -> Tensor:
    """The codes (see `Scenes.codes`) of the scenes that complete captions name."""
    rows = []
    for demand in map(captions.parse, complete):
        assert demand.layout
        assert demand.background
        slots = [
            (words.SHAPES.index(thing.shape), words.COLOURS.index(thing.colour), words.SIZES.index(thing.size or ""))
            for thing in demand.things
        ] + [(scenes.EMPTY,) * 3] * (2 - len(demand.things))
        rows.append((words.BACKGROUNDS.index(demand.background), words.LAYOUTS.index(demand.layout), *slots))
    background, layout = (torch.tensor([row[i] for row in rows]) for i in (0, 1))
    shape, colour, size = (torch.tensor([[row[2][i], row[3][i]] for row in rows]) for i in range(3))
    return scenes.codes(background, layout, shape, colour, size)


def write_lists(folder: Path) -> None:
    """Writes `evaluation.txt` and `calibration.txt` into a folder."""
    for name, lines in (("evaluation", evaluation()), ("calibration", calibration())):
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
