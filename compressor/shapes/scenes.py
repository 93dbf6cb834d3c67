"""Scenes: one or two coloured shapes on a plain background, sampled by seed and drawn in batches.

A scene is first a handful of labels (what a caption can say) and then some jitter (what it cannot say: the exact place,
radius, angle and tint). Both are tensors, so that a million scenes are drawn on a GPU in seconds.
"""

# Shapes: N scenes, S slots (2; in scenes of one object the second is empty), H W pixels.

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from compressor.shapes import words

SIDE = 64
"""Height and width of a picture in pixels."""

EMPTY = -1
"""The label of the second slot in a scene of one object."""

_COLOUR_RGB = {
    "red": (214, 40, 40),
    "orange": (247, 140, 20),
    "yellow": (250, 224, 50),
    "green": (44, 160, 60),
    "cyan": (60, 212, 222),
    "blue": (40, 90, 235),
    "purple": (138, 50, 180),
    "pink": (252, 130, 195),
}
_BACKGROUND_RGB = {
    "white": (246, 246, 246),
    "black": (10, 10, 10),
    "gray": (128, 128, 128),
    "beige": (222, 200, 162),
    "navy": (18, 24, 84),
}
_RADIUS = {"small": (7.5, 9.5), "large": (13.0, 14.8)}
_NEAR, _MIDDLE, _FAR = 17.5, 32.0, 46.5  # centres of a lone object along either axis
_PAIR = 15.7  # distance of either object of a pair from the middle, along the axis of their relation


@dataclass(frozen=True)
class Scenes:
    """A batch of scenes. The first five are labels (int64), the rest is jitter (float32).

    `layout` indexes `words.LAYOUTS`. In a pair, slot 0 is the left one (horizontal) or the upper one (vertical).
    """

    background: Tensor  # N
    layout: Tensor  # N
    shape: Tensor  # N S
    colour: Tensor  # N S
    size: Tensor  # N S
    centre: Tensor  # N S 2, pixels, x then y
    radius: Tensor  # N S, pixels
    angle: Tensor  # N S, radians
    tint: Tensor  # N S 3, colour with jitter, in [0, 1]
    ground: Tensor  # N 3, background with jitter, in [0, 1]

    def __len__(self) -> int:
        return len(self.layout)

    def __getitem__(self, index: slice | Tensor) -> Scenes:
        return Scenes(*(getattr(self, field.name)[index] for field in fields(self)))

    def to(self, device: torch.device | str) -> Scenes:
        """The same scenes with every tensor on `device`."""
        return Scenes(*(getattr(self, field.name).to(device) for field in fields(self)))

    def codes(self) -> Tensor:
        """One integer per combination of labels (int64, N): equal exactly where all labels are."""
        return codes(self.background, self.layout, self.shape, self.colour, self.size)


def codes(background: Tensor, layout: Tensor, shape: Tensor, colour: Tensor, size: Tensor) -> Tensor:
    """The codes of labels shaped as in `Scenes`."""
    code = layout * len(words.BACKGROUNDS) + background
    for slot in range(2):
        for label, names in ((shape, words.SHAPES), (colour, words.COLOURS), (size, words.SIZES)):
            code = code * (len(names) + 1) + label[:, slot] + 1
    return code


def sample(count: int, seed: int, pairs: float = 0.6) -> Scenes:
    """Draws scenes at random, the same for the same arguments on every machine.

    Args:
        count: How many.
        seed: Of the random generator; scenes of different seeds are independent.
        pairs: Probability of two objects. A pair never holds two objects equal in both shape and colour, so that
            every relation can be seen.

    Returns:
        Scenes on the CPU.
    """
    generator = torch.Generator().manual_seed(seed)

    def pick(choices: int, *shape: int) -> Tensor:
        return torch.randint(choices, (count, *shape), generator=generator)

    def jitter(spread: float, *shape: int) -> Tensor:
        return (torch.rand((count, *shape), generator=generator) * 2 - 1) * spread

    singles = len(words.POSITIONS)
    pair = torch.rand(count, generator=generator) < pairs
    layout = torch.where(pair, singles + pick(2), pick(singles))
    looks = len(words.SHAPES) * len(words.COLOURS)
    first = pick(looks)
    look = torch.stack([first, (first + 1 + pick(looks - 1)) % looks], dim=1)
    shape, colour = look // len(words.COLOURS), look % len(words.COLOURS)
    size, background = pick(len(words.SIZES), 2), pick(len(words.BACKGROUNDS))

    grid = torch.tensor([_NEAR, _MIDDLE, _FAR])
    row, column = layout.clamp(max=singles - 1) // 3, layout.clamp(max=singles - 1) % 3
    centre = torch.stack([grid[column], grid[row]], dim=1)[:, None] + jitter(1.4, 2, 2)
    along, across = _PAIR * torch.tensor([-1.0, 1.0]) + jitter(0.7, 2), jitter(4.0, 2)
    horizontal = torch.stack([along, across], dim=2) + _MIDDLE
    upright = (layout == singles + 1)[:, None, None]
    centre = torch.where(pair[:, None, None], torch.where(upright, horizontal.flip(2), horizontal), centre)

    low, high = torch.tensor([_RADIUS[name] for name in words.SIZES]).unbind(1)
    radius = low[size] + (high - low)[size] * torch.rand((count, 2), generator=generator)
    colours = torch.tensor([_COLOUR_RGB[name] for name in words.COLOURS]) / 255
    grounds = torch.tensor([_BACKGROUND_RGB[name] for name in words.BACKGROUNDS]) / 255
    tint = (colours[colour] + jitter(0.035, 2, 3)).clamp(0, 1)
    ground = (grounds[background] + jitter(0.02, 3)).clamp(0, 1)
    angle = jitter(0.2, 2)

    absent = torch.stack([torch.zeros_like(pair), ~pair], dim=1)
    shape, colour, size = (label.masked_fill(absent, EMPTY) for label in (shape, colour, size))
    return Scenes(background, layout, shape, colour, size, centre, radius, angle, tint, ground)


def render(scenes: Scenes) -> Tensor:
    """Draws scenes, with edges one pixel soft, on the device that they are on.

    Returns:
        Pictures N x 3 x 64 x 64, float32 in [0, 1].
    """
    line = torch.arange(SIDE, device=scenes.centre.device) + 0.5
    x_NW = line.expand(len(scenes), SIDE)
    picture = scenes.ground[:, :, None, None].expand(-1, 3, SIDE, SIDE)
    for slot in range(2):
        radius = scenes.radius[:, slot, None, None]
        x = (x_NW - scenes.centre[:, slot, 0, None])[:, None, :] / radius
        y = (x_NW - scenes.centre[:, slot, 1, None])[:, :, None] / radius
        cos, sin = scenes.angle[:, slot, None, None].cos(), scenes.angle[:, slot, None, None].sin()
        shape = scenes.shape[:, slot, None, None]
        distance = _distance(shape, cos * x + sin * y, cos * y - sin * x) * radius
        cover = ((0.5 - distance).clamp(0, 1) * (shape != EMPTY))[:, None]
        picture = picture + cover * (scenes.tint[:, slot, :, None, None] - picture)
    return picture.contiguous()


def _distance(shape: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Signed distance to the outline, negative inside; x to the right and y down, in units of the radius."""
    outline = {
        "circle": _circle, "square": _square, "triangle": _triangle, "star": _star,
        "cross": _cross, "ring": _ring, "heart": _heart, "diamond": _diamond,
    }  # fmt: skip
    distance = torch.ones_like(x)
    for index, name in enumerate(words.SHAPES):
        distance = torch.where(shape == index, outline[name](x, y), distance)
    return distance


def _circle(x: Tensor, y: Tensor) -> Tensor:
    return torch.hypot(x, y) - 0.92


def _square(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x.abs(), y.abs()) - 0.78


def _triangle(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(y - 0.7, (1.7 * x.abs() - 0.95 * (y + 1)) / 1.947)


def _cross(x: Tensor, y: Tensor) -> Tensor:
    across = torch.maximum(x.abs() - 0.95, y.abs() - 0.3)
    upright = torch.maximum(x.abs() - 0.3, y.abs() - 0.95)
    return torch.minimum(across, upright)


def _ring(x: Tensor, y: Tensor) -> Tensor:
    return (torch.hypot(x, y) - 0.7).abs() - 0.24


def _diamond(x: Tensor, y: Tensor) -> Tensor:
    return (x.abs() / 0.66 + y.abs() - 1) * 0.55


def _heart(x: Tensor, y: Tensor) -> Tensor:
    # After Inigo Quilez, "2D distance functions": the tip is at (0, 0), y points up.
    scale = 0.62
    x, y = x.abs() * scale, 0.55 - y * scale
    lobe = torch.hypot(x - 0.25, y - 0.75) - 0.25 * 2**0.5
    slide = 0.5 * (x + y).clamp(min=0)
    side = torch.minimum(torch.hypot(x, y - 1), torch.hypot(x - slide, y - slide)) * (x - y).sign()
    return torch.where(x + y > 1, lobe, side) / scale


def _star(x: Tensor, y: Tensor) -> Tensor:
    # After Inigo Quilez, "2D distance functions": five points folded into one.
    cos, sin, inner = 0.809016994375, 0.587785252292, 0.42
    x, y = x.abs(), -y
    fold = 2 * (cos * x - sin * y).clamp(min=0)
    x, y = x - fold * cos, y + fold * sin
    fold = 2 * (-cos * x - sin * y).clamp(min=0)
    x, y = (x + fold * cos).abs(), y + fold * sin - 1
    edge_x, edge_y = inner * sin, inner * cos - 1
    along = ((x * edge_x + y * edge_y) / (edge_x**2 + edge_y**2)).clamp(0, 1)
    return torch.hypot(x - edge_x * along, y - edge_y * along) * (y * edge_x - x * edge_y).sign()
