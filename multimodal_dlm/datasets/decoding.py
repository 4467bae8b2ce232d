"""Pictures from bytes that nobody vouches for: three formats, bounded bytes, bounded pixels."""

import io
import warnings

import numpy as np
from PIL import Image

from multimodal_dlm.errors import DataError

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP")
MAX_IMAGE_BYTES = 32 * 2**20
MAX_IMAGE_PIXELS = 4096 * 4096


def decode_image(data: bytes, where: str) -> np.ndarray:
    """Decode a PNG, JPEG or WebP picture.

    Args:
        data: Encoded picture.
        where: Shard and key, for the error message.

    Returns:
        uint8 array (height, width, 3).

    Raises:
        DataError: When the bytes or the pixels are too many, or the format is another one.
    """
    if len(data) > MAX_IMAGE_BYTES:
        raise DataError(
            f"{where}: a picture must have at most {MAX_IMAGE_BYTES} bytes; got {len(data)}."
            " Scale it down before writing the shard."
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
                width, height = image.size
                if width * height > MAX_IMAGE_PIXELS:
                    raise DataError(
                        f"{where}: a picture must have at most {MAX_IMAGE_PIXELS} pixels; got"
                        f" {width} x {height}. Scale it down before writing the shard."
                    )
                return np.asarray(image.convert("RGB"))
    except DataError:
        raise
    except (OSError, ValueError, SyntaxError, Warning, Image.DecompressionBombError) as error:
        raise DataError(
            f"{where}: a picture must be PNG, JPEG or WebP; got {type(error).__name__}: {error}."
            " Rebuild the shard."
        ) from error


def encode_png(pixels: np.ndarray) -> bytes:
    """Encode a uint8 (height, width, 3) array as PNG, without metadata."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, format="PNG", optimize=False)
    return buffer.getvalue()
