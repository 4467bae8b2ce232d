"""Pictures that visitors of the page give, made plain and small."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from multimodal_dlm.errors import DataError
from multimodal_dlm.intake import (
    UnreadablePictureError,
    decode_picture,
    over_white,
    read_picture,
)

MAX_UPLOAD_BYTES = 20 * 2**20
MAX_SIDE = 512  # Larger pictures are reduced at once; models see far less.
REFUSED = "That picture cannot be used"
REMEDY = "Choose a PNG, JPEG or WebP picture."
UNREADABLE = f"That file is not a readable picture. {REMEDY}"


def open_upload(path: str | Path | None) -> Image.Image:
    """Read an uploaded picture as RGB, transparency laid over white, turned as its EXIF says.

    Nothing but pixels is kept, and a message holds nothing of what a decoder said.

    Args:
        path: The uploaded file; None when the visitor gave none.

    Raises:
        DataError: When there is none, or `multimodal_dlm.intake` refuses it.
    """
    if path is None:
        raise DataError(f"There is no picture yet. {REMEDY}")
    try:
        return read_picture(path, _plain, where=REFUSED, max_bytes=MAX_UPLOAD_BYTES)
    except UnreadablePictureError:
        raise DataError(UNREADABLE) from None


def check_drawn(drawn: str | Path | bytes) -> None:
    """Refuse by its header a picture of the editor, before gradio's own reader opens it.

    Args:
        drawn: A file, or its bytes: the browser sends what it shows as PNG, larger than the upload.

    Raises:
        DataError: When `multimodal_dlm.intake` refuses it.
    """
    try:
        if isinstance(drawn, (str, Path)):
            read_picture(drawn, lambda image: None, where=REFUSED)
        else:
            decode_picture(drawn, REFUSED, lambda image: None)
    except UnreadablePictureError:
        raise DataError(UNREADABLE) from None


def drawn_mask(layers: list[Any]) -> Image.Image:
    """Where a visitor painted over a picture, white on black.

    Args:
        layers: RGBA pictures of the painted layers, all of one size.

    Raises:
        DataError: When nothing was painted.
    """
    alphas = [np.asarray(layer.convert("RGBA"))[..., 3] for layer in layers]
    covered = np.max(alphas, axis=0) >= 128 if alphas else np.zeros((1, 1), dtype=bool)
    if not covered.any():
        raise DataError("Nothing is painted over yet. Paint over the part to draw anew.")
    return Image.fromarray(covered.astype(np.uint8) * 255)


def _plain(image: Image.Image) -> Image.Image:
    turned = ImageOps.exif_transpose(image).convert("RGBA")
    turned.thumbnail((MAX_SIDE, MAX_SIDE))
    return Image.fromarray(np.asarray(over_white(turned)))  # Without EXIF, XMP, profiles.
