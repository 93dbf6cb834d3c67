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

_LINES = 5


def grid(samples: Samples, columns: int, *, captions: bool = True) -> Image.Image:
    """One picture of all pairs: each dense image above the pruned one, so many pairs in a row.

    Args:
        samples: one pair or more. Images smaller than 128 pixels are enlarged by a whole factor, those larger than 512
            pixels scaled down.
        columns: pairs in a row, at least 1.
        captions: write each caption below its pair (cut after five lines).

    """
    pairs = [(_fit(to_image(a)), _fit(to_image(b))) for a, b in zip(samples.dense, samples.pruned, strict=True)]
    columns = min(columns, len(pairs))
    width, height = pairs[0][0].size
    letter = max(14, width // 24)
    gap, leading, font = letter // 2, round(1.3 * letter), ImageFont.load_default(letter)
    lines = [_wrap(prompt, font, width) if captions else [] for prompt in samples.prompts]
    margin = round(max(font.getlength(word) for word in ("dense", "pruned"))) + 2 * gap
    step_x, pair = width + gap, 2 * height + gap // 2
    sheet = Image.new("RGB", (margin + columns * step_x, _bottom(lines, columns, pair, gap, leading)), "white")
    draw = ImageDraw.Draw(sheet)
    top = gap
    for start in range(0, len(pairs), columns):
        for y, word in ((top, "dense"), (top + height + gap // 2, "pruned")):
            draw.text((margin - gap, y + height // 2), word, fill="#555555", font=font, anchor="rm")
        row = range(start, min(start + columns, len(pairs)))
        for x, i in zip(range(margin, sheet.width, step_x), row, strict=False):
            sheet.paste(pairs[i][0], (x, top))
            sheet.paste(pairs[i][1], (x, top + height + gap // 2))
            for j, line in enumerate(lines[i]):
                draw.text(
                    (x + width / 2, top + pair + gap // 2 + j * leading), line, fill="#222222", font=font, anchor="ma"
                )
        top = _bottom(lines[: start + columns], columns, pair, gap, leading)
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


def _fit(image: Image.Image) -> Image.Image:
    image = enlarge(image)
    image.thumbnail((LARGE, LARGE), Image.Resampling.LANCZOS)
    return image


def _bottom(lines: list[list[str]], columns: int, pair: int, gap: int, leading: int) -> int:
    """The height of rows of pairs, each as high as its longest caption needs."""
    rows = [lines[i : i + columns] for i in range(0, len(lines), columns)]
    return gap + sum(pair + gap // 2 + max(map(len, row)) * leading + gap for row in rows)


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
