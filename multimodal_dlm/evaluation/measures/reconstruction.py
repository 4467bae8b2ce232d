"""How well an image tokenizer gives pictures back, and how much of its codebook it uses."""

import torch
from jaxtyping import Float
from torch import Tensor

from multimodal_dlm.evaluation.held_out import HeldOut
from multimodal_dlm.evaluation.measurement import (
    Measurement,
    Metric,
    mean_metric,
    register_measure,
)
from multimodal_dlm.evaluation.sheets import grid_sheet
from multimodal_dlm.pipelines.pipeline_base import UnifiedPipeline
from multimodal_dlm.pipelines.pixels import from_pixels, to_pixels
from multimodal_dlm.tokenizers.quantizers import codebook_perplexity, codebook_usage

BACKGROUND_TOLERANCE = 0.02
NUM_SHOWN = 12


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


@register_measure("reconstruction", "UnifiedTextToImagePipeline")
@torch.no_grad()
def measure_reconstruction(
    pipeline: UnifiedPipeline,
    data: HeldOut,
) -> Measurement:
    """PSNR and foreground PSNR in decibels, codes used and their perplexity, by level.

    The baseline `flat` is the picture's mean colour. A picture of one colour has no foreground and
    counts only for the rest.

    Args:
        pipeline: Gives the image tokenizer.
        data: Pictures.

    Raises:
        DataError: When the split has no picture.
    """
    tokenizer = pipeline.image_tokenizer
    images = [sample.image for sample in data.samples()]
    rows: dict[str, list[float]] = {"psnr": [], "foreground": [], "flat": [], "flat_front": []}
    codes, shown = [], ()
    for part in data.batches(len(images)):
        pixels = to_pixels(images[part], tokenizer.config["image_size"])
        found = tokenizer.encode(pixels.to(pipeline.device))
        back = tokenizer.decode(found).cpu()
        flat = pixels.mean(dim=(2, 3), keepdim=True).expand_as(pixels)
        front = foreground(pixels)
        rows["psnr"] += peak_signal_to_noise(pixels, back).tolist()
        has_front = front.flatten(1).any(dim=1)
        rows["foreground"] += peak_signal_to_noise(pixels, back, front)[has_front].tolist()
        rows["flat"] += peak_signal_to_noise(pixels, flat).tolist()
        rows["flat_front"] += peak_signal_to_noise(pixels, flat, front)[has_front].tolist()
        codes.append([level.cpu() for level in found])
        if not shown:
            shown = (
                from_pixels(pixels[:NUM_SHOWN], "pil"),
                from_pixels(back[:NUM_SHOWN].clamp(0, 1), "pil"),
            )
    metrics = {
        "psnr": mean_metric(rows["psnr"], baselines={"flat": rows["flat"]}, seed=data.seed),
    }
    if rows["foreground"]:
        metrics["foreground_psnr"] = mean_metric(
            rows["foreground"], baselines={"flat": rows["flat_front"]}, seed=data.seed
        )
    levels = [torch.cat(level) for level in zip(*codes, strict=True)]
    for number, (level, size) in enumerate(zip(levels, tokenizer.codebook_sizes, strict=True)):
        for name, measured in (
            ("codes_used", codebook_usage(level, size)),
            ("perplexity", codebook_perplexity(level, size)),
        ):
            metrics[f"{name}.{number}"] = Metric(float(measured), None, None, level.numel())
    pairs = [[(given, "given"), (back, "decoded")] for given, back in zip(*shown, strict=True)]
    half = -(-len(pairs) // 2)
    lines = [sum(part, []) for part in (pairs[:half], pairs[half:]) if part]
    sheet = grid_sheet(lines, cell=96)
    return Measurement(metrics, {"given and decoded": sheet})
