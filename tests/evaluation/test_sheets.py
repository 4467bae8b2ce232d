"""Contact sheets hold every picture, at its place, with its caption."""

import numpy as np
import pytest
from PIL import Image, ImageFont

from multimodal_dlm.errors import ConfigError
from multimodal_dlm.evaluation.sheets import MARGIN, MAX_LINES, _wrap, contact_sheet, grid_sheet

RED, BLUE = (255, 0, 0), (0, 0, 255)


def plain(color: tuple[int, int, int], size: int = 8) -> Image.Image:
    return Image.new("RGB", (size, size), color)


def test_pictures_are_enlarged_side_by_side():
    sheet = contact_sheet([plain(RED), plain(BLUE)], ["red", "blue"], cell=64)
    assert sheet.width == MARGIN + 2 * (64 + MARGIN)
    middle = MARGIN + 32
    assert sheet.getpixel((middle, middle)) == RED
    assert sheet.getpixel((middle + 64 + MARGIN, middle)) == BLUE


def test_rows_break_after_the_columns():
    images, captions = [plain(RED)] * 5, ["a"] * 5
    one = contact_sheet(images, captions, columns=5, cell=32)
    two = contact_sheet(images, captions, columns=3, cell=32)
    assert two.width < one.width
    assert two.height > one.height


def test_captions_are_drawn_under_their_picture():
    with_text = np.asarray(contact_sheet([plain(RED)], ["red"], cell=64))
    without = np.asarray(contact_sheet([plain(RED)], [" "], cell=64))
    differs = np.argwhere((with_text != without).any(axis=-1))
    assert len(differs) > 10
    assert differs[:, 0].min() >= MARGIN + 64


def test_long_captions_end_in_an_ellipsis():
    font = ImageFont.load_default(14)
    lines = _wrap("many words " * 20, 96, font)
    assert len(lines) == MAX_LINES
    assert lines[-1].endswith("…")
    assert all(font.getlength(line) <= 96 * 1.3 for line in lines)


def test_rows_of_different_lengths():
    sheet = grid_sheet([[(plain(RED), "a")], [(plain(BLUE), "b"), (plain(RED), "c")]], cell=32)
    assert sheet.width == MARGIN + 2 * (32 + MARGIN)


@pytest.mark.parametrize(("count", "captions"), [(0, []), (2, ["one"])])
def test_one_caption_per_picture(count, captions):
    with pytest.raises(ConfigError, match="one text per picture and at least one"):
        contact_sheet([plain(RED)] * count, captions)
