"""Captions: a scene's labels written in plain English, and English read back into what it demands of a picture.

    a small red circle to the left of a big blue square on a white background
    in the top left corner, an orange star against navy

Shape and colour are always named; size, position and background may be left out. Whatever `write` writes, `parse`
reads, so any list of captions can be judged without side files. One table of phrases serves both directions.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from compressor.errors import CompressorError
from compressor.shapes import words

_DATA = Path(__file__).parent / "data"

_SIZE = {"small": ("small", "small", "little"), "large": ("large", "large", "big")}
_POSITION = {
    "center": ("in the center", "in the middle"),
    "left": ("on the left", "on the left side"),
    "right": ("on the right", "on the right side"),
    "top": ("at the top", "on the upper side"),
    "bottom": ("at the bottom", "on the lower side"),
    "top left": ("in the top left corner", "at the top left"),
    "top right": ("in the top right corner", "at the top right"),
    "bottom left": ("in the bottom left corner", "at the bottom left"),
    "bottom right": ("in the bottom right corner", "at the bottom right"),
}
# {0} is the object named first. The layout is followed by whether the object named first is the left or upper one.
_PAIR = {
    ("horizontal", True): ("{0} to the left of {1}", "{0} left of {1}", "{0} with {1} to its right",
                           "{0} on the left and {1} on the right"),
    ("horizontal", False): ("{0} to the right of {1}", "{0} right of {1}", "{0} with {1} to its left",
                            "{0} on the right and {1} on the left"),
    ("vertical", True): ("{0} above {1}", "{0} over {1}", "{0} with {1} below it",
                         "{0} at the top and {1} at the bottom"),
    ("vertical", False): ("{0} below {1}", "{0} under {1}", "{0} with {1} above it",
                          "{0} at the bottom and {1} at the top"),
}  # fmt: skip
_BACKGROUND = ("on a {} background", "against a {} background", "on {}", "against {}")
_OPENING = ("", "", "there is ", "an image of ")

_OBJECT_PATTERN = re.compile(
    rf"an? (?:({'|'.join(sorted({word for choices in _SIZE.values() for word in choices}))}) )?"
    rf"({'|'.join(words.COLOURS)}) ({'|'.join(words.SHAPES)})\b"
)
_BACKGROUND_PATTERN = re.compile(
    rf"^a ({'|'.join(words.BACKGROUNDS)}) background with |"
    rf" (?:on|against) (?:a ({'|'.join(words.BACKGROUNDS)}) background|({'|'.join(words.BACKGROUNDS)}))(?=$|,)"
)
_SIZE_OF = {word: size for size, choices in _SIZE.items() for word in choices}
_LAYOUT_OF = (
    {"#": (None, True)}
    | {f"# {phrase}": (name, True) for name, choices in _POSITION.items() for phrase in choices}
    | {f"#, {phrase}": (name, True) for name, choices in _POSITION.items() for phrase in choices}
    | {f"{phrase}, #": (name, True) for name, choices in _POSITION.items() for phrase in choices}
    | {phrase.format("#", "#"): key for key, choices in _PAIR.items() for phrase in choices}
)


@dataclass(frozen=True)
class Thing:
    """One demanded object."""

    shape: str
    colour: str
    size: str | None


@dataclass(frozen=True)
class Demand:
    """What a caption demands of a picture; what it leaves open is None.

    Of two things the left one (layout "horizontal") or the upper one (layout "vertical") stands first, whichever the
    caption names first.
    """

    things: tuple[Thing, ...]
    layout: str | None
    background: str | None


def write(demand: Demand, rng: random.Random) -> str:
    """Puts a demand into words, in one of its many wordings.

    Args:
        demand: What to say; things of None are not mentioned.
        rng: Chooses the wording.
    """
    background = demand.background
    if len(demand.things) == 2:
        first_is_first = rng.random() < 0.5
        named = demand.things if first_is_first else demand.things[::-1]
        core = rng.choice(_PAIR[str(demand.layout), first_is_first]).format(*(_thing(thing, rng) for thing in named))
        position = ""
    else:
        core = _thing(demand.things[0], rng)
        position = rng.choice(_POSITION[demand.layout]) if demand.layout else ""
    ground = " " + rng.choice(_BACKGROUND).format(background) if background else ""
    form = rng.random()
    if position and form < 0.15:
        return f"{position}, {core}{ground}"
    if position and ground and form < 0.3:
        return f"{core}{ground}, {position}"
    where = f" {position}" if position else ""
    if background and form > 0.9:
        return f"a {background} background with {core}{where}"
    return f"{rng.choice(_OPENING)}{core}{where}{ground}"


def parse(caption: str) -> Demand:
    """Reads what a caption demands.

    Raises:
        CompressorError: The caption is not of the language that `write` writes.
    """
    text = " ".join(caption.lower().rstrip(". ").split())
    for opening in _OPENING:
        text = text.removeprefix(opening) if opening else text
    grounds = [next(filter(None, match.groups())) for match in _BACKGROUND_PATTERN.finditer(text)]
    text = _BACKGROUND_PATTERN.sub("", text)
    things = tuple(Thing(shape, colour, _SIZE_OF.get(size)) for size, colour, shape in _OBJECT_PATTERN.findall(text))
    layout = _LAYOUT_OF.get(_OBJECT_PATTERN.sub("#", text))
    if layout is None or len(grounds) > 1:
        raise CompressorError(
            f"caption {caption!r} cannot be read as a scene; it should be like "
            "'a small red circle to the left of a blue square on a white background'"
        )
    name, first_is_first = layout
    return Demand(things if first_is_first else things[::-1], name, grounds[0] if grounds else None)


def read(path: Path) -> list[str]:
    """The captions of a text file, one a line; empty lines do not count."""
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def calibration() -> list[str]:
    """The shipped captions to calibrate with: worded as in training, none of them among `evaluation`."""
    return read(_DATA / "calibration.txt")


def evaluation() -> list[str]:
    """The shipped captions to evaluate with: each names every label, and no such scene was shown in training."""
    return read(_DATA / "evaluation.txt")


def demands(labels: Sequence[Sequence[int]]) -> Iterator[Demand]:
    """Names the labels of scenes.

    Args:
        labels: One row a scene: background, layout, then shape, colour and size of slot 0 and of slot 1.
    """
    for background, layout, *slots in labels:
        things = tuple(
            Thing(words.SHAPES[shape], words.COLOURS[colour], words.SIZES[size])
            for shape, colour, size in (slots[:3], slots[3:])
            if shape >= 0
        )
        yield Demand(things, words.LAYOUTS[layout], words.BACKGROUNDS[background])


def forget(demand: Demand, rng: random.Random, probability: float = 0.2) -> Demand:
    """Leaves out each size, a lone object's position and the background, each with the given probability."""
    things = tuple(
        Thing(thing.shape, thing.colour, None if rng.random() < probability else thing.size) for thing in demand.things
    )
    layout = None if len(things) == 1 and rng.random() < probability else demand.layout
    return Demand(things, layout, None if rng.random() < probability else demand.background)


def _thing(thing: Thing, rng: random.Random) -> str:
    phrase = f"{thing.colour} {thing.shape}"
    if thing.size:
        phrase = f"{rng.choice(_SIZE[thing.size])} {phrase}"
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"
