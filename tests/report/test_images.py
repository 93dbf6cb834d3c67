import base64
from io import BytesIO

import pytest
import torch
from PIL import Image

from compressor.plugin import Samples
from compressor.report import grid
from compressor.report.images import inline, to_image


def pair(side: int, count: int, prompt: str = "a caption") -> Samples:
    """Black dense images and white pruned ones."""
    none = torch.zeros(count, 1)
    return Samples((prompt,) * count, torch.zeros(count, 3, side, side), torch.ones(count, 3, side, side), none, none)


def decode(address: str) -> Image.Image:
    return Image.open(BytesIO(base64.b64decode(address.partition(",")[2])))


def test_values_are_rounded_and_clamped_to_bytes():
    picture = torch.tensor([-1.0, 0.5, 2.0]).view(3, 1, 1)
    assert to_image(picture).getpixel((0, 0)) == (0, 128, 255)


def test_small_images_are_inlined_without_loss():
    picture = torch.rand(3, 64, 48)
    assert inline(picture).startswith("data:image/png;base64,")
    assert decode(inline(picture)).tobytes() == to_image(picture).tobytes()


def test_large_images_are_inlined_scaled_down_in_their_proportion():
    picture = torch.full((3, 1024, 768), 0.5)
    assert inline(picture).startswith("data:image/jpeg;base64,")
    assert decode(inline(picture)).size == (384, 512)


def test_the_grid_has_dense_above_pruned():
    sheet = grid(pair(64, 1), 4, captions=False)
    column = [sheet.getpixel((sheet.width - 20, y)) for y in range(sheet.height)]
    assert column.count((0, 0, 0)) == 128
    assert column.index((0, 0, 0)) < sheet.height / 4


def test_small_images_are_enlarged_and_large_ones_reduced():
    widths = {side: grid(pair(side, 2), 2, captions=False).width - grid(pair(side, 2), 1, captions=False).width
              for side in (60, 128, 300, 1024)}  # fmt: skip
    assert widths == pytest.approx({60: 180, 128: 128, 300: 300, 1024: 512}, abs=16)


def test_pairs_go_on_in_a_new_row():
    one, two = grid(pair(64, 3), 3, captions=False), grid(pair(64, 3), 2, captions=False)
    assert two.width < one.width
    assert two.height > 1.9 * one.height


def test_captions_take_room_below_each_pair_and_five_lines_at_most():
    bare, short, long, longer = (
        grid(pair(64, 1, prompt), 1, captions=wanted).height
        for prompt, wanted in (
            ("x", False),
            ("a caption", True),
            ("many words " * 40, True),
            ("many words " * 80, True),
        )
    )
    assert bare < short < long == longer


@pytest.mark.parametrize("prompt", ["", "w" * 300, "une façade à Zürich, 雪の朝"])
def test_any_caption_can_be_drawn(prompt: str):
    assert grid(pair(64, 1, prompt), 1).width > 128
