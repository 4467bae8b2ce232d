"""How well an image tokenizer gives pictures back, and how much of its codebook it uses."""

import math
import time
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from multimodal_dlm.datasets.manifest import Source
from multimodal_dlm.datasets.reading import first_samples
from multimodal_dlm.pipelines.pipeline_base import UnifiedPipeline
from multimodal_dlm.pipelines.pixels import to_pixels
from multimodal_dlm.tokenizers.quantizers import codebook_perplexity, codebook_usage

BACKGROUND_TOLERANCE = 0.02


def peak_signal_to_noise(
    pixels: Float[Tensor, "batch 3 height width"],
    other: Float[Tensor, "batch 3 height width"],
    weight: Float[Tensor, "batch 1 height width"] | None = None,
) -> Float[Tensor, " batch"]:
    """-10 log10 of the mean squared error of each picture, in decibels, pixels in [0, 1].

    Args:
        pixels: Pictures.
        other: What came back.
        weight: Pixels that count; None for all.
    """
    error = (pixels - other).pow(2).mean(dim=1, keepdim=True)
    share = torch.ones_like(error) if weight is None else weight
    mean = (error * share).sum(dim=(1, 2, 3)) / share.sum(dim=(1, 2, 3)).clamp(min=1)
    return -10 * mean.clamp(min=1e-10).log10()


def foreground(pixels: Float[Tensor, "batch 3 height width"]) -> Tensor:
    """1 where a pixel differs from the top left one by more than 0.02 in a channel."""
    difference = (pixels - pixels[:, :, :1, :1]).abs().amax(dim=1, keepdim=True)
    return (difference > BACKGROUND_TOLERANCE).float()


@torch.no_grad()
def evaluate_reconstruction(
    pipeline: UnifiedPipeline,
    source: Source,
    *,
    split: str,
    limit: int | None = None,
    batch_size: int = 64,
) -> dict[str, Any]:
    """PSNR, foreground PSNR, codes used and their perplexity on the pictures of a split.

    Args:
        pipeline: Gives the image tokenizer.
        source: Dataset with pictures.
        split: Split to measure.
        limit: Pictures at most.
        batch_size: Pictures at once.

    Raises:
        DataError: When the split has no picture.
    """
    tokenizer = pipeline.image_tokenizer
    images = [sample.image for sample in first_samples(source, split, limit)]
    start = time.perf_counter()
    whole, front, codes = [], [], []
    for first in range(0, len(images), batch_size):
        pixels = to_pixels(images[first : first + batch_size], tokenizer.config["image_size"])
        found = tokenizer.encode(pixels)
        back = tokenizer.decode(found)
        whole.append(peak_signal_to_noise(pixels, back))
        front.append(peak_signal_to_noise(pixels, back, foreground(pixels)))
        codes.append(found)
    psnr, inner = torch.cat(whole), torch.cat(front)
    levels = [torch.cat(level) for level in zip(*codes, strict=True)]
    sizes = tokenizer.codebook_sizes
    return {
        "pictures": len(images),
        "psnr_db": round(float(psnr.mean()), 3),
        "psnr_standard_error": round(float(psnr.std(correction=0)) / math.sqrt(len(psnr)), 3),
        "psnr_median_db": round(float(psnr.median()), 3),
        "foreground_psnr_db": round(float(inner.mean()), 3),
        "codes_used": [round(codebook_usage(c, s), 4) for c, s in zip(levels, sizes, strict=True)],
        "perplexity": [
            round(codebook_perplexity(c, s), 1) for c, s in zip(levels, sizes, strict=True)
        ],
        "seconds": round(time.perf_counter() - start, 1),
    }
