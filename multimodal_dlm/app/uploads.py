"""Pictures that visitors of the page give: three formats, bounded bytes, bounded pixels."""

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from multimodal_dlm.datasets.decoding import IMAGE_FORMATS
from multimodal_dlm.errors import DataError

MAX_UPLOAD_BYTES = 20 * 2**20
MAX_UPLOAD_PIXELS = 4096 * 4096
MAX_SIDE = 512  # Larger pictures are reduced at once; models see far less.
REMEDY = "Choose a PNG, JPEG or WebP picture."


def open_upload(path: str | Path | None) -> Image.Image:
    """Read an uploaded picture as RGB, transparency laid over white, turned as its EXIF says.

    Nothing but pixels is kept, and a message holds nothing of what a decoder said.

    Args:
        path: The uploaded file; None when the visitor gave none.

    Raises:
        DataError: When there is none, or it is too large or no picture of a permitted format.
    """
    if path is None:
        raise DataError(f"There is no picture yet. {REMEDY}")
    try:
        if Path(path).stat().st_size > MAX_UPLOAD_BYTES:
            raise DataError(f"The picture has more than {MAX_UPLOAD_BYTES // 2**20} MB. {REMEDY}")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with Image.open(io.BytesIO(Path(path).read_bytes()), formats=IMAGE_FORMATS) as image:
                if image.width * image.height > MAX_UPLOAD_PIXELS:
                    raise DataError(
                        f"The picture has {image.width} x {image.height} pixels; at most 4096 x"
                        " 4096 are allowed. Scale it down."
                    )
                return _plain(image)
    except DataError:
        raise
    except (OSError, ValueError, SyntaxError, EOFError, Warning, Image.DecompressionBombError):
        raise DataError(f"That file is not a readable picture. {REMEDY}") from None


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
    paper = Image.new("RGBA", turned.size, "white")
    flat = Image.alpha_composite(paper, turned).convert("RGB")
    return Image.fromarray(np.asarray(flat))  # Without EXIF, XMP, profiles.
