"""Holes of held-out pictures filled again, beside the best that codes can do and a flat patch."""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from multimodal_dlm.datasets.manifest import Source
from multimodal_dlm.datasets.reading import first_samples
from multimodal_dlm.evaluation.measurement import Measurement, mean_metric, register_measure
from multimodal_dlm.evaluation.sheets import grid_sheet
from multimodal_dlm.pipelines import UnifiedInpaintPipeline
from multimodal_dlm.pipelines.pixels import to_pixels

NUM_SHOWN = 6


@register_measure("inpainting", "UnifiedInpaintPipeline")
@torch.no_grad()
def measure_inpainting(
    pipeline: UnifiedInpaintPipeline,
    source: Source,
    *,
    split: str,
    limit: int | None = None,
    batch_size: int = 32,
    seed: int = 0,
) -> Measurement:
    """PSNR inside a hole of a quarter of the picture, given the rest and the caption, in decibels.

    The hole is a square of half the side, at a place drawn for each picture. Baselines: `flat` is
    the mean of the pixels around the hole; `tokenizer` is the true codes decoded, which no filling
    can be expected to pass.

    Args:
        pipeline: Fills the holes.
        source: Dataset with pictures and captions.
        split: Held-out split.
        limit: Pictures at most.
        batch_size: Pictures at once.
        seed: Of the holes, the fillings and the bootstrap; picture i is drawn with seed + i.

    Raises:
        DataError: When the split has no picture.
    """
    samples = first_samples(source, split, limit)
    side = pipeline.image_size
    holes = hole_masks(len(samples), side, seed)
    fill: Any = pipeline
    rows: dict[str, list[float]] = {"model": [], "flat": [], "tokenizer": []}
    shown: list[list[tuple[Image.Image, str]]] = []
    for first in range(0, len(samples), batch_size):
        part = samples[first : first + batch_size]
        mask = holes[first : first + batch_size]
        pixels = to_pixels([sample.image for sample in part], side)
        seeds = range(seed + first, seed + first + len(part))
        generators = [torch.Generator().manual_seed(number) for number in seeds]
        captions = [sample.record.captions[0] for sample in part]
        filled = fill(captions, pixels, mask, generator=generators, output_type="pt").images.cpu()
        tokenizer = pipeline.image_tokenizer
        ceiling = tokenizer.decode(tokenizer.encode(pixels.to(pipeline.device))).cpu()
        around = (pixels * ~mask).sum(dim=(2, 3)) / (~mask).sum(dim=(2, 3))
        flat = around[:, :, None, None].expand_as(pixels)
        for name, guess in (("model", filled), ("flat", flat), ("tokenizer", ceiling)):
            rows[name] += hole_psnr(pixels, guess, mask)
        if first == 0:
            gray = torch.where(mask, 0.5, pixels)
            for given, made, truth in list(zip(gray, filled, pixels, strict=True))[:NUM_SHOWN]:
                shown.append([(_picture(given), "hole"), (_picture(made), "filled"),
                              (_picture(truth), "true")])  # fmt: skip
    baselines = {"flat": rows["flat"], "tokenizer": rows["tokenizer"]}
    sheet = grid_sheet([sum(shown[:3], []), sum(shown[3:], [])][: 1 + (len(shown) > 3)], cell=96)
    metric = mean_metric(rows["model"], baselines=baselines, seed=seed)
    return Measurement({"hole_psnr": metric}, {"holes": sheet})


def hole_masks(count: int, side: int, seed: int) -> Tensor:
    """One square hole of half the side a picture, (count, 1, side, side), True inside."""
    masks = torch.zeros(count, 1, side, side, dtype=torch.bool)
    for number in range(count):
        top, left = np.random.default_rng([seed, number]).integers(0, side // 2 + 1, 2)
        masks[number, :, top : top + side // 2, left : left + side // 2] = True
    return masks


def hole_psnr(
    pixels: Float[Tensor, "batch 3 height width"],
    other: Float[Tensor, "batch 3 height width"],
    mask: Tensor,
) -> list[float]:
    """-10 log10 of the mean squared error inside each hole; at most 60."""
    error = (pixels - other).pow(2) * mask
    mean = error.sum(dim=(1, 2, 3)) / (3 * mask.sum(dim=(1, 2, 3)))
    return (-10 * mean.clamp(min=1e-6).log10()).tolist()


def _picture(pixels: Float[Tensor, "3 height width"]) -> Image.Image:
    array = (pixels.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    return Image.fromarray(array)
