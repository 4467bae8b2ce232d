"""Pictures from bytes that nobody vouches for: three formats, bounded bytes, bounded pixels."""

import io
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
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
IMAGE_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX")


def decode_image(data: bytes, where: str) -> np.ndarray:
    """Decode a PNG, JPEG or WebP picture of 8 bits a channel; transparency is laid over white.

    Args:
        data: Encoded picture.
        where: Shard and key, for the error message.

    Returns:
        uint8 array (height, width, 3).

    Raises:
        DataError: When the bytes or the pixels are too many, the format is another one, the picture
            moves, or its pixels are no grey, palette or RGB values of 8 bits.
    """
    return _decode(data, where, _plain)


def decode_upright(data: bytes, where: str) -> Image.Image:
    """Decode a picture that comes from a user: turned as its metadata says, in its own mode.

    Raises:
        DataError: As `decode_image`.
    """
    return _decode(data, where, ImageOps.exif_transpose)


def read_upright(path: str | Path) -> Image.Image:
    """Read a picture file that a user names, as `decode_upright` does.

    Raises:
        DataError: When there is no such file, or as `decode_image`.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"`image` must be a picture file; there is no file `{path}`.")
    with path.open("rb") as file:
        return decode_upright(file.read(MAX_IMAGE_BYTES + 1), f"`{path}`")


def _plain(image: Image.Image) -> np.ndarray:
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB"))


def _decode(data: bytes, where: str, read: Callable[[Image.Image], T]) -> T:
    if len(data) > MAX_IMAGE_BYTES:
        raise _refused(where, f"at most {MAX_IMAGE_BYTES} bytes; got {len(data)}. Scale it down")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
                _check_header(image, where)
                return read(image)
    except DataError:
        raise
    except _DAMAGED as error:  # What a decoder says may hold addresses: only its kind is told.
        raise DataError(
            f"{where}: a picture must be PNG, JPEG or WebP and undamaged; got"
            f" {type(error).__name__}. Save it again, or leave it out.",
            reason="picture",
        ) from None


def _check_header(image: Image.Image, where: str) -> None:
    """Refuse by what the header says, before a pixel is decoded."""
    width, height = image.size
    if width * height > MAX_IMAGE_PIXELS:
        raise _refused(
            where, f"at most {MAX_IMAGE_PIXELS} pixels; got {width} x {height}. Scale it down"
        )
    if getattr(image, "n_frames", 1) != 1:
        raise _refused(where, f"one frame; got {image.n_frames}. Save one of them")  # type: ignore[attr-defined]
    if image.mode not in IMAGE_MODES:
        raise _refused(
            where,
            f"grey, palette or RGB values, 8 bits a channel; got mode {image.mode}. Convert it",
        )


def _refused(where: str, rule: str) -> DataError:
    return DataError(f"{where}: a picture must have {rule} first.", reason="picture")


def encode_png(pixels: np.ndarray) -> bytes:
    """Encode a uint8 (height, width, 3) array as PNG, without metadata."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, format="PNG", optimize=False)
    return buffer.getvalue()
