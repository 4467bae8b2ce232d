"""Pictures of a dataset -> codes of a pipeline's image tokenizer."""

from collections.abc import Sequence
from typing import Any

import torch

from multimodal_dlm.pipelines.pipeline_base import UnifiedPipeline
from multimodal_dlm.pipelines.pixels import to_pixels
from multimodal_dlm.processing import Codes


def encode_images(pipeline: UnifiedPipeline, images: Sequence[Any], batch_size: int) -> Codes:
    """Codes of pictures, encoded `batch_size` at a time, on the CPU.

    Args:
        pipeline: Gives the image tokenizer.
        images: Anything `to_pixels` takes in a list.
        batch_size: Pictures at once.
    """
    tokenizer = pipeline.image_tokenizer
    parts = []
    for first in range(0, len(images), batch_size):
        part = list(images[first : first + batch_size])
        pixels = to_pixels(part, tokenizer.config["image_size"]).to(pipeline.device)
        parts.append([level.cpu() for level in tokenizer.encode(pixels)])
    return tuple(torch.cat(level) for level in zip(*parts, strict=True))
