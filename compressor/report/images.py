"""Pairs of images side by side, for the eye: one picture file of all, and small files inside a page."""

# Shapes: N pairs, H W pixels; images are 3 x H x W in [0, 1].

from __future__ import annotations

import base64
import textwrap
from io import BytesIO
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

from compressor.plugin import Samples

if TYPE_CHECKING:
    from torch import Tensor

SMALL = 128
"""Images up to this side are shown pixel by pixel, without loss."""
LARGE = 512
"""Larger images are scaled down to this side inside a page."""

_GAP, _FONT, _LINES = 8, 14, 3


def grid(samples: Samples, columns: int, *, captions: bool = True) -> Image.Image:
    """One picture of all pairs: each dense image above the pruned one, so many pairs in a row.

    Images smaller than 128 pixels are enlarged by a whole factor.

    Args:
        samples: one pair or more.
        columns: pairs in a row, at least 1.
        captions: write each caption below its pair (cut after three lines).

    """
    pairs = [(enlarge(to_image(a)), enlarge(to_image(b))) for a, b in zip(samples.dense, samples.pruned, strict=True)]
    columns = min(columns, len(pairs))
    width, height = pairs[0][0].size
    font = ImageFont.load_default(_FONT)
    lines = [_wrap(prompt, font, width) if captions else [] for prompt in samples.prompts]
    below = max(map(len, lines)) * (_FONT + 4) + _GAP if captions else 0
    margin = round(max(font.getlength(word) for word in ("dense", "pruned"))) + 2 * _GAP
    step_x, step_y = width + _GAP, 2 * height + _GAP // 2 + below + _GAP
    rows = -(-len(pairs) // columns)
    sheet = Image.new("RGB", (margin + columns * step_x, _GAP + rows * step_y), "white")
    draw = ImageDraw.Draw(sheet)
    for row in range(rows):
        for line, word in enumerate(("dense", "pruned")):
            middle = _GAP + row * step_y + line * (height + _GAP // 2) + height // 2
            draw.text((margin - _GAP, middle), word, fill="#555555", font=font, anchor="rm")
    for i, (dense, pruned) in enumerate(pairs):
        x, y = margin + i % columns * step_x, _GAP + i // columns * step_y
        sheet.paste(dense, (x, y))
        sheet.paste(pruned, (x, y + height + _GAP // 2))
        for j, line in enumerate(lines[i]):
            top = y + 2 * height + _GAP // 2 + 4 + j * (_FONT + 4)
            draw.text((x + width / 2, top), line, fill="#222222", font=font, anchor="ma")
    return sheet


def to_image(picture: Tensor) -> Image.Image:
    """A tensor 3 x H x W in [0, 1] (clamped) as an 8-bit image."""
    bytes_HW3 = picture.detach().float().clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).contiguous()
    return Image.fromarray(bytes_HW3.cpu().numpy())


def enlarge(image: Image.Image) -> Image.Image:
    """A small image, enlarged by the least whole factor that makes its longer side 128 pixels or more."""
    factor = -(-SMALL // max(image.size))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def inline(picture: Tensor) -> str:
    """A `data:` address: a PNG of a small image; of a large one a JPEG, scaled down to 512 pixels at most."""
    image, file = to_image(picture), BytesIO()
    kind = "png" if max(image.size) <= SMALL else "jpeg"
    image.thumbnail((LARGE, LARGE), Image.Resampling.LANCZOS)
    image.save(file, kind, **({"optimize": True} if kind == "png" else {"quality": 90}))
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Lines that fit the width, the last one cut with an ellipsis where there would be too many."""
    for letters in range(len(text), 0, -1):
        lines = textwrap.wrap(text, letters)
        if all(font.getlength(line) <= width for line in lines):
            break
    else:
        return []
    if len(lines) > _LINES:
        lines = lines[:_LINES]
        while lines[-1] and font.getlength(lines[-1] + "…") > width:
            lines[-1] = lines[-1][:-1]
        lines[-1] += "…"
    return lines
