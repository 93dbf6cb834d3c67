"""Scenes are held against plane geometry: areas, colours and places follow from the labels."""

import math
from dataclasses import fields, replace

import pytest
import torch

from compressor.shapes import scenes, words


def test_the_same_seed_draws_the_same_scenes_and_another_seed_others():
    first, again, other = scenes.sample(200, 3), scenes.sample(200, 3), scenes.sample(200, 4)
    for field in fields(first):
        assert torch.equal(getattr(first, field.name), getattr(again, field.name)), field.name
        assert not torch.equal(getattr(first, field.name), getattr(other, field.name)), field.name
    assert torch.equal(scenes.render(first[:9]), scenes.render(again[:9]))


def test_every_label_occurs():
    drawn = scenes.sample(3000, 0)
    assert set(drawn.layout.tolist()) == set(range(len(words.LAYOUTS)))
    assert set(drawn.background.tolist()) == set(range(len(words.BACKGROUNDS)))
    for labels, names in ((drawn.shape, words.SHAPES), (drawn.colour, words.COLOURS), (drawn.size, words.SIZES)):
        assert set(labels[:, 0].tolist()) == set(range(len(names)))
        assert set(labels[:, 1].tolist()) == {scenes.EMPTY, *range(len(names))}


def test_a_pair_never_looks_the_same_twice():
    drawn = scenes.sample(20_000, 1, pairs=1.0)
    assert not ((drawn.shape[:, 0] == drawn.shape[:, 1]) & (drawn.colour[:, 0] == drawn.colour[:, 1])).any()


def test_codes_are_equal_exactly_where_all_labels_are():
    drawn = scenes.sample(5000, 2, pairs=0.1)
    rows = torch.cat([drawn.background[:, None], drawn.layout[:, None], drawn.shape, drawn.colour, drawn.size], dim=1)
    assert len(rows.unique(dim=0)) == len(drawn.codes().unique()) < 5000


def _polygon_area(corners):
    shifted = corners[1:] + corners[:1]
    return abs(sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in zip(corners, shifted, strict=True))) / 2


def _star_corners():
    turns = [(math.pi * k / 5, 1.0 if k % 2 == 0 else 0.42) for k in range(10)]
    return [(radius * math.sin(turn), radius * math.cos(turn)) for turn, radius in turns]


@pytest.mark.parametrize(
    ("name", "area"),
    [
        ("circle", math.pi * 0.92**2),
        ("square", 1.56**2),
        ("triangle", _polygon_area([(0, -1), (0.95, 0.7), (-0.95, 0.7)])),
        ("star", _polygon_area(_star_corners())),
        ("cross", 2 * 1.9 * 0.6 - 0.6**2),
        ("ring", math.pi * (0.94**2 - 0.46**2)),
        ("diamond", 2 * 0.66),
        # a square of side 1 / sqrt 2 on its tip, and half discs of radius sqrt 2 / 4 on its two upper sides
        ("heart", (0.5 + math.pi / 8) / 0.62**2),
    ],
)
def test_a_shape_covers_the_area_that_geometry_says(name, area):
    one = scenes.sample(1, 0, pairs=0.0)
    radius = 20.0
    one = replace(
        one,
        shape=torch.tensor([[words.SHAPES.index(name), scenes.EMPTY]]),
        radius=torch.full((1, 2), radius),
        centre=torch.full((1, 2, 2), 32.0),
        angle=torch.full((1, 2), 0.3),
        tint=torch.ones(1, 2, 3),
        ground=torch.zeros(1, 3),
    )
    assert scenes.render(one)[0, 0].sum().item() == pytest.approx(area * radius**2, rel=0.01)


def test_a_picture_shows_the_tint_inside_and_the_ground_outside():
    drawn = scenes.sample(64, 5, pairs=0.0)
    drawn = replace(drawn, shape=torch.tensor([[words.SHAPES.index("square"), scenes.EMPTY]]).expand(64, 2))
    pictures = scenes.render(drawn)
    assert pictures.shape == (64, 3, 64, 64)
    assert 0 <= pictures.min() <= pictures.max() <= 1
    for i in range(64):
        x, y = drawn.centre[i, 0].long().tolist()
        assert torch.allclose(pictures[i, :, y, x], drawn.tint[i, 0], atol=1e-6)
        corner = (0 if y > 32 else 63, 0 if x > 32 else 63)
        assert torch.allclose(pictures[i, :, corner[0], corner[1]], drawn.ground[i], atol=1e-6)


@pytest.mark.parametrize(("layout", "axis"), [("horizontal", 0), ("vertical", 1)])
def test_slot_0_of_a_pair_stands_left_or_above(layout, axis):
    drawn = scenes.sample(500, 6, pairs=1.0)
    drawn = drawn[drawn.layout == words.LAYOUTS.index(layout)]
    gap = drawn.centre[:, 1] - drawn.centre[:, 0]
    assert (gap[:, axis] > 2 * gap[:, 1 - axis].abs()).all()
    assert (gap[:, axis] >= drawn.radius.sum(1)).all()


def test_objects_stay_inside_the_picture():
    drawn = scenes.sample(5000, 7)
    present = drawn.shape != scenes.EMPTY
    inside = torch.minimum(drawn.centre, scenes.SIDE - drawn.centre).amin(-1) - drawn.radius
    assert inside[present].min() > 0
