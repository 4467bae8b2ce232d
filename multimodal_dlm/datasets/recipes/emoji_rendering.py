"""Emoji as pixels: SVG -> RGBA once, then placed on backgrounds with a name."""

import numpy as np
from PIL import Image

from multimodal_dlm.errors import DataError
from multimodal_dlm.intake import decode_picture

IMAGE_SIZE = 64
RENDER_SIZE = 128  # Drawn large, then reduced: crisper than 64 px straight from the rasteriser.
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "blue": (190, 220, 245),
    "pink": (250, 210, 220),
    "green": (205, 235, 205),
    "yellow": (253, 240, 185),
    "gray": (210, 210, 214),
    "purple": (222, 208, 240),
    "orange": (252, 215, 175),
}
WHITE_SHARE = 0.6
FAINTEST_ALPHA = 16  # Fainter pixels, out of 255, do not count as drawn.


def rasterise(svg: str) -> Image.Image:
    """Draw an SVG document as RGBA, 128 x 128 pixels.

    Raises:
        DataError: When resvg-py is missing or refuses the document.
    """
    try:
        import resvg_py
    except ModuleNotFoundError as error:
        raise DataError(
            "Rendering emoji needs `resvg-py`, which is not installed. Run"
            " `pip install 'multimodal-dlm[data]'`."
        ) from error
    try:
        data = resvg_py.svg_to_bytes(svg_string=svg, width=RENDER_SIZE, height=RENDER_SIZE)
    except ValueError as error:
        raise DataError(f"resvg cannot draw an SVG that starts {svg[:60]!r}: {error}.") from error
    return decode_picture(bytes(data), "resvg", lambda image: image.convert("RGBA"))


def crop_to_ink(sprite: Image.Image) -> Image.Image:
    """The square around what is visible, so that objects of a scene fill their places."""
    visible = np.asarray(sprite.getchannel("A")) > FAINTEST_ALPHA
    box = Image.fromarray(visible).getbbox()
    if box is None:
        return sprite
    left, top, right, bottom = box
    side = max(right - left, bottom - top)
    square = Image.new("RGBA", (side, side))
    offset = ((side - (right - left)) // 2, (side - (bottom - top)) // 2)
    square.paste(sprite.crop(box), offset)
    return square


def new_canvas(background: str) -> Image.Image:
    """A plain picture of a named colour."""
    return Image.new("RGBA", (IMAGE_SIZE, IMAGE_SIZE), (*BACKGROUNDS[background], 255))


def place(canvas: Image.Image, sprite: Image.Image, centre: tuple[int, int], size: int) -> None:
    """Draw a sprite on a canvas, in place.

    Args:
        canvas: RGBA picture.
        sprite: Square RGBA picture.
        centre: Where its middle goes, x and y in pixels.
        size: Side in pixels.
    """
    scaled = sprite.resize((size, size), Image.Resampling.LANCZOS)
    layer = Image.new("RGBA", canvas.size)
    layer.paste(scaled, (centre[0] - size // 2, centre[1] - size // 2))
    canvas.alpha_composite(layer)


def to_pixels(canvas: Image.Image) -> np.ndarray:
    """uint8 array (64, 64, 3)."""
    return np.asarray(canvas.convert("RGB"))
