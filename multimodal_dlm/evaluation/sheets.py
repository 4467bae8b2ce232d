"""Contact sheets: pictures side by side with their captions under them."""

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from multimodal_dlm.errors import ConfigError

CELL = 192  # Side of a picture on the sheet, in pixels.
MARGIN = 12
LINE_HEIGHT = 17
FONT_SIZE = 14
MAX_LINES = 3
PAPER = (255, 255, 255)
INK = (40, 40, 40)


def contact_sheet(
    images: Sequence[Image.Image], captions: Sequence[str], *, columns: int = 4, cell: int = CELL
) -> Image.Image:
    """Put pictures on a white sheet, each with its caption under it.

    Args:
        images: Pictures of any size; enlarged without smoothing, so that every pixel shows.
        captions: One per picture; at most three lines of each are shown.
        columns: Pictures in a row at most.
        cell: Side of a picture on the sheet, in pixels.

    Raises:
        ConfigError: When there is no picture or the numbers differ.
    """
    if not images or len(images) != len(captions):
        raise ConfigError(
            "`captions` must hold one text per picture and at least one; got"
            f" {len(captions)} for {len(images)} pictures."
        )
    return grid_sheet([_row(images, captions, start, columns) for start in
                       range(0, len(images), columns)], cell=cell)  # fmt: skip


def grid_sheet(
    rows: Sequence[Sequence[tuple[Image.Image, str]]], *, cell: int = CELL
) -> Image.Image:
    """Put rows of (picture, caption) on a white sheet; rows may have different lengths.

    Args:
        rows: Pictures with captions.
        cell: Side of a picture on the sheet, in pixels.
    """
    font = ImageFont.load_default(FONT_SIZE)
    wrapped = [[_wrap(caption, cell, font) for _, caption in row] for row in rows]
    heights = [cell + LINE_HEIGHT * max(map(len, lines)) + MARGIN for lines in wrapped]
    width = MARGIN + max(len(row) for row in rows) * (cell + MARGIN)
    sheet = Image.new("RGB", (width, MARGIN + sum(heights)), PAPER)
    draw = ImageDraw.Draw(sheet)
    top = MARGIN
    for row, texts, height in zip(rows, wrapped, heights, strict=True):
        for place, ((image, _), lines) in enumerate(zip(row, texts, strict=True)):
            left = MARGIN + place * (cell + MARGIN)
            sheet.paste(image.convert("RGB").resize((cell, cell), Image.Resampling.NEAREST),
                        (left, top))  # fmt: skip
            draw.rectangle((left - 1, top - 1, left + cell, top + cell), outline=(225, 225, 225))
            for number, line in enumerate(lines):
                place_y = top + cell + 3 + number * LINE_HEIGHT
                draw.text((left, place_y), line, fill=INK, font=font)
        top += height
    return sheet


def _row(
    images: Sequence[Image.Image], captions: Sequence[str], start: int, columns: int
) -> list[tuple[Image.Image, str]]:
    stop = start + columns
    return list(zip(images[start:stop], captions[start:stop], strict=True))


def _wrap(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    """Lines of a caption that fit a width in pixels; an ellipsis where it is cut."""
    average = max(font.getlength("abcdefghijklmnopqrstuvwxyz ") / 27, 1.0)
    lines = textwrap.wrap(text, max(int(width / average), 1)) or [""]
    if len(lines) > MAX_LINES:
        lines = [*lines[: MAX_LINES - 1], lines[MAX_LINES - 1][:-1] + "…"]
    return lines
