"""Pictures and masks in whatever form a user has them <-> tensors in [0, 1]."""

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from PIL import Image, ImageOps
from torch import Tensor

from multimodal_dlm.errors import ConfigError, unknown_name
from multimodal_dlm.intake import IMAGE_MODES, MAX_IMAGE_PIXELS, over_white

PIL_MODES = (*IMAGE_MODES, "CMYK", "YCbCr", "HSV")  # 8 bits a channel: converting keeps them.
IMAGE_OUTPUT_TYPES = ("pil", "np", "pt", "codes")
PictureLike = Image.Image | np.ndarray | Tensor


def to_pixels(
    image: PictureLike | Sequence[PictureLike], size: int
) -> Float[Tensor, "batch 3 size size"]:
    """Pictures -> float32 pixels in [0, 1], resized to a square.

    Args:
        image: PIL image, array (height, width, 3) or (batch, height, width, 3), tensor (3, height,
            width) or (batch, 3, height, width), or a list of pictures. Integers are 0..255, floats
            are in [0, 1]. Transparency is laid over white; a PIL image is turned as its EXIF says.
        size: Side of the square in pixels; other sizes are resized, proportions not kept.

    Raises:
        ConfigError: When there is no picture, its type, shape or range is another, or a PIL image
            has more than `multimodal_dlm.intake.MAX_IMAGE_PIXELS` pixels or a mode outside
            `PIL_MODES`, such as `I;16` or `F`.
    """
    parts = [_resize(_picture(each, "image", 3), size) for each in _listed(image, "image")]
    return torch.cat(parts).clamp(0, 1)


def to_mask(
    mask_image: PictureLike | Sequence[PictureLike], size: int
) -> Bool[Tensor, "batch 1 size size"]:
    """Mask pictures -> True where bright (at least one half), any covered pixel counting.

    Args:
        mask_image: As in `to_pixels`, with one channel or none.
        size: Side of the square in pixels.

    Raises:
        ConfigError: As `to_pixels`.
    """
    parts = []
    for each in _listed(mask_image, "mask_image"):
        bright = (_picture(each, "mask_image", 1) >= 0.5).float()
        parts.append(F.adaptive_avg_pool2d(bright, (size, size)) > 0)
    return torch.cat(parts)


def from_pixels(pixels: Float[Tensor, "batch 3 height width"], output_type: str) -> Any:
    """Pixels in [0, 1] -> `pil`, `np` or `pt`."""
    pixels = pixels.float().cpu()
    if output_type == "pt":
        return pixels
    array = pixels.permute(0, 2, 3, 1).numpy()
    if output_type == "np":
        return array
    return [Image.fromarray(picture) for picture in (array * 255).round().astype(np.uint8)]


def check_output_type(output_type: str, options: Sequence[str] = IMAGE_OUTPUT_TYPES) -> None:
    """Refuse an unknown `output_type`."""
    if output_type not in options:
        raise unknown_name("output_type", str(output_type), options)


def _listed(image: Any, name: str) -> list[Any]:
    pictures = list(image) if isinstance(image, (list, tuple)) else [image]
    if not pictures:
        raise ConfigError(f"`{name}` must hold at least one picture; got an empty list.")
    return pictures


def _picture(image: Any, name: str, channels: int) -> Float[Tensor, "batch channels height width"]:
    """One picture, or one batch, as float32 in [0, 1]."""
    if isinstance(image, Image.Image):
        tensor = torch.from_numpy(_decoded(image, name, channels))
        tensor = tensor.permute(2, 0, 1) if channels == 3 else tensor[None]
    elif isinstance(image, np.ndarray):
        tensor = torch.from_numpy(np.array(image))  # A copy: arrays may be read-only.
        if tensor.ndim >= 3 and tensor.shape[-1] in (1, 3):
            tensor = tensor.movedim(-1, -3)
    elif isinstance(image, Tensor):
        tensor = image.detach().cpu()
    else:
        raise ConfigError(
            f"`{name}` must be a PIL image, a numpy array, a tensor or a list of them; got"
            f" {type(image).__name__}. Open files with `PIL.Image.open(path)`."
        )
    if channels == 1 and tensor.ndim >= 2 and (tensor.ndim == 2 or tensor.shape[-3] != 1):
        tensor = tensor.unsqueeze(-3)
    tensor = tensor[None] if tensor.ndim == 3 else tensor
    if tensor.ndim != 4 or tensor.shape[1] != channels or 0 in tensor.shape:
        raise ConfigError(
            f"`{name}` must have {channels} channel{'s' * (channels > 1)}, last in an array and"
            f" first in a tensor; got shape {tuple(tensor.shape)}."
        )
    return _to_unit_range(tensor, name)


def _decoded(image: Image.Image, name: str, channels: int) -> np.ndarray:
    """Bytes of a PIL image, which may still be an unread file: its header is checked before."""
    if image.width * image.height > MAX_IMAGE_PIXELS:
        raise ConfigError(
            f"`{name}` must have at most {MAX_IMAGE_PIXELS} pixels; got {image.width} x"
            f" {image.height}. Scale it down first."
        )
    if image.mode not in PIL_MODES:
        raise ConfigError(
            f"`{name}` must have one of the modes {', '.join(PIL_MODES)}; got {image.mode}."
            " Scale its values to 0..255 and convert it to L or RGB first."
        )
    upright = _upright(image)
    return np.array(over_white(upright) if channels == 3 else upright.convert("L"))


def _upright(image: Image.Image) -> Image.Image:
    """The picture turned as its EXIF says; as it is where that cannot be read."""
    try:
        return ImageOps.exif_transpose(image)
    except (SyntaxError, struct.error):
        return image


def _to_unit_range(tensor: Tensor, name: str) -> Tensor:
    if tensor.dtype == torch.bool:
        return tensor.float()
    scaled = tensor.float() if tensor.is_floating_point() else tensor.float() / 255
    low, high = float(scaled.min()), float(scaled.max())
    if not (low >= -1e-3 and high <= 1 + 1e-3):
        raise ConfigError(
            f"`{name}` must lie in [0, 1] (floats) or 0..255 (integers); got {tensor.dtype} with"
            f" {float(tensor.min()):.3g}..{float(tensor.max()):.3g}. Rescale it."
        )
    return scaled


def _resize(pixels: Tensor, size: int) -> Tensor:
    if pixels.shape[-2:] == (size, size):
        return pixels
    return F.interpolate(pixels, (size, size), mode="bicubic", antialias=True, align_corners=False)
