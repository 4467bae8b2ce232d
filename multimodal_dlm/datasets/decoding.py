"""Pictures from bytes that nobody vouches for: three formats, bounded bytes, bounded pixels."""

import io
import struct
import warnings
import zlib
from collections.abc import Callable
from typing import TypeVar

import numpy as np
from PIL import Image, ImageOps

from multimodal_dlm.errors import DataError

T = TypeVar("T")
# What Pillow raises over bytes that are no picture, or a damaged or hostile one.
_DAMAGED = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    SyntaxError,
    TypeError,
    ValueError,
    Warning,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
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
    return _decode(data, where, lambda image: np.asarray(image.convert("RGB")))


def decode_upright(data: bytes, where: str) -> Image.Image:
    """Decode a picture that comes from a user: turned as its metadata says, in its own mode.

    Raises:
        DataError: As `decode_image`.
    """
    return _decode(data, where, ImageOps.exif_transpose)


def _decode(data: bytes, where: str, read: Callable[[Image.Image], T]) -> T:
    if len(data) > MAX_IMAGE_BYTES:
        raise DataError(
            f"{where}: a picture must have at most {MAX_IMAGE_BYTES} bytes; got {len(data)}."
            " Scale it down first."
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
                width, height = image.size
                if width * height > MAX_IMAGE_PIXELS:
                    raise DataError(
                        f"{where}: a picture must have at most {MAX_IMAGE_PIXELS} pixels; got"
                        f" {width} x {height}. Scale it down first."
                    )
                return read(image)
    except DataError:
        raise
    except _DAMAGED as error:
        raise DataError(
            f"{where}: a picture must be PNG, JPEG or WebP; got {type(error).__name__}: {error}."
            " Save it again, or leave it out."
        ) from error


def encode_png(pixels: np.ndarray) -> bytes:
    """Encode a uint8 (height, width, 3) array as PNG, without metadata."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, format="PNG", optimize=False)
    return buffer.getvalue()
