"""Holes of held-out pictures filled again, beside the best that codes can do and a flat patch."""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from multimodal_dlm.evaluation.held_out import HeldOut
from multimodal_dlm.evaluation.measurement import Measurement, mean_metric, register_measure
from multimodal_dlm.evaluation.sheets import grid_sheet
from multimodal_dlm.pipelines import UnifiedInpaintPipeline
from multimodal_dlm.pipelines.pixels import from_pixels, to_pixels

NUM_SHOWN = 6


@register_measure("inpainting", "UnifiedInpaintPipeline", ["text_to_image"])
@torch.no_grad()
def measure_inpainting(
    pipeline: UnifiedInpaintPipeline,
    data: HeldOut,
) -> Measurement:
    """PSNR inside a hole of a quarter of the picture, given the rest and the caption, in decibels.

    The hole is a square of half the side, at a place drawn for each picture. Baselines: `flat` is
    the mean of the pixels around the hole; `tokenizer` is the true codes decoded, which no filling
    can be expected to pass.

    Args:
        pipeline: Fills the holes.
        data: Pictures with captions.

    Raises:
        DataError: When the split has no picture.
    """
    samples = data.samples()
    side = pipeline.image_size
    holes = hole_masks(len(samples), side, data.seed)
    fill: Any = pipeline
    found: dict[str, list[float]] = {"model": [], "flat": [], "tokenizer": []}
    shown: list[list[tuple[Image.Image, str]]] = []
    for rows in data.batches(len(samples)):
        part, mask = samples[rows], holes[rows]
        pixels = to_pixels([sample.image for sample in part], side)
        generators = data.generators(rows)
        captions = [sample.record.captions[0] for sample in part]
        filled = fill(captions, pixels, mask, generator=generators, output_type="pt").images.cpu()
        tokenizer = pipeline.image_tokenizer
        ceiling = tokenizer.decode(tokenizer.encode(pixels.to(pipeline.device))).cpu()
        around = (pixels * ~mask).sum(dim=(2, 3)) / (~mask).sum(dim=(2, 3))
        flat = around[:, :, None, None].expand_as(pixels)
        for name, guess in (("model", filled), ("flat", flat), ("tokenizer", ceiling)):
            found[name] += hole_psnr(pixels, guess, mask)
        if not shown:
            kinds = {"hole": torch.where(mask, 0.5, pixels), "filled": filled, "true": pixels}
            lists = [
                [(picture, kind) for picture in from_pixels(some[:NUM_SHOWN].clamp(0, 1), "pil")]
                for kind, some in kinds.items()
            ]
            shown = [list(triple) for triple in zip(*lists, strict=True)]
    baselines = {"flat": found["flat"], "tokenizer": found["tokenizer"]}
    sheet = grid_sheet([sum(shown[:3], []), sum(shown[3:], [])][: 1 + (len(shown) > 3)], cell=96)
    metric = mean_metric(found["model"], baselines=baselines, seed=data.seed)
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
