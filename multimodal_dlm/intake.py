"""Pictures that nobody vouches for: three formats, bounded bytes, bounded pixels, one frame."""

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


class UnreadablePictureError(DataError):
    """There is no such file, or its bytes are no PNG, JPEG or WebP picture, or a damaged one."""


def decode_picture(
    data: bytes, where: str, read: Callable[[Image.Image], T], *, max_bytes: int = MAX_IMAGE_BYTES
) -> T:
    """Open a picture under the rules of this module and hand it on; every picture comes in here.

    Args:
        data: Encoded picture.
        where: What the error message begins with, such as shard and key.
        read: Takes what is wanted from the picture, whose pixels are not decoded yet; what Pillow
            raises or warns of in it is an error of the picture.
        max_bytes: Bytes at most.

    Returns:
        What `read` returns.

    Raises:
        UnreadablePictureError: When the format is another one, or the picture is damaged.
        DataError: When the bytes or the pixels are too many, the picture moves, or its pixels are
            no grey, palette or RGB values of 8 bits.
    """
    _check_bytes(len(data), where, max_bytes)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
                _check_header(image, where)
                return read(image)
    except DataError:
        raise
    except _DAMAGED as error:  # What a decoder says may hold addresses: only its kind is told.
        raise UnreadablePictureError(
            f"{where}: a picture must be PNG, JPEG or WebP and undamaged; got"
            f" {type(error).__name__}. Save it again, or leave it out.",
            reason="picture",
        ) from None


def read_picture(
    path: str | Path,
    read: Callable[[Image.Image], T],
    *,
    where: str = "",
    max_bytes: int = MAX_IMAGE_BYTES,
) -> T:
    """Read a picture file, as `decode_picture` does.

    Args:
        path: The file; no more than `max_bytes` of it are read.
        read: Takes what is wanted from the picture.
        where: What the error message begins with; empty for the path.
        max_bytes: Bytes at most.

    Returns:
        What `read` returns.

    Raises:
        UnreadablePictureError: When there is no such file, or as `decode_picture`.
        DataError: As `decode_picture`.
    """
    path, where = Path(path), where or f"`{path}`"
    if not path.is_file():
        raise UnreadablePictureError(
            f"A picture must be an existing file; there is no file `{path}`. Check the spelling.",
            reason="picture",
        )
    try:
        _check_bytes(path.stat().st_size, where, max_bytes)
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise UnreadablePictureError(
            f"{where}: a picture must be readable; got {error.strerror}.", reason="picture"
        ) from None
    return decode_picture(data, where, read, max_bytes=max_bytes)


def decode_image(data: bytes, where: str) -> np.ndarray:
    """Decode a picture of a shard; transparency is laid over white.

    Args:
        data: Encoded picture.
        where: Shard and key, for the error message.

    Returns:
        uint8 array (height, width, 3).

    Raises:
        DataError: As `decode_picture`.
    """
    return decode_picture(data, where, lambda image: np.asarray(over_white(image)))


def read_upright(path: str | Path, *, where: str = "") -> Image.Image:
    """Read a picture that a user names: turned as its metadata says, in its own mode.

    Raises:
        DataError: As `read_picture`.
    """
    return read_picture(path, ImageOps.exif_transpose, where=where)


def over_white(image: Image.Image) -> Image.Image:
    """RGB, transparency laid over white."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def encode_png(pixels: np.ndarray) -> bytes:
    """Encode a uint8 (height, width, 3) array as PNG, without metadata."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, format="PNG", optimize=False)
    return buffer.getvalue()


def _check_bytes(num_bytes: int, where: str, max_bytes: int) -> None:
    if num_bytes > max_bytes:
        raise _refused(where, f"at most {max_bytes} bytes; got {num_bytes}. Scale it down")


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
