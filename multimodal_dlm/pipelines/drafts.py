"""What a run has written so far: pictures and captions of a canvas that is still half masked."""

import torch
import torch.nn.functional as F
from jaxtyping import Int
from PIL import Image
from torch import Tensor

from multimodal_dlm.pipelines.pipeline_base import UnifiedPipeline
from multimodal_dlm.pipelines.pixels import from_pixels
from multimodal_dlm.pipelines.streaming import content_codes, draft_text

MASKED_SHADE = 0.82  # Gray of what is still masked.


@torch.no_grad()
def draft_pictures(
    pipeline: UnifiedPipeline, input_ids: Int[Tensor, "batch length"]
) -> list[Image.Image]:
    """The pictures of a run after a step, gray where a token of any level is still masked.

    Args:
        pipeline: The pipeline that runs.
        input_ids: Rows that hold a picture, as `callback_on_step_end` is given them.

    Returns:
        One picture a row, of the tokenizer's size.
    """
    processor, vocabulary = pipeline.processor, pipeline.transformer.vocabulary
    # The decoder looks beyond a cell: masked ones take the codes of an empty white picture.
    blank = torch.ones(1, 3, pipeline.image_size, pipeline.image_size)
    start, levels, covers = _image_start(pipeline, input_ids), [], []
    for level, empty in enumerate(pipeline._encode_pixels(blank)):
        grid = processor.image_grids[level]
        ids = input_ids[:, start : start + grid[0] * grid[1]].cpu()
        start += grid[0] * grid[1]
        is_masked = vocabulary.is_masked(ids)
        segment = f"image.{level}"
        white = vocabulary.to_input_ids(empty.view(1, -1), segment).expand_as(ids)
        codes = vocabulary.to_codes(torch.where(is_masked, white, ids), segment)
        levels.append(codes.view(-1, *grid))
        covers.append(is_masked.view(-1, 1, *grid).float())
    pixels = pipeline._decode_codes(tuple(levels)).clamp(0, 1)
    for cover in covers:
        is_hidden = F.interpolate(cover, pixels.shape[-2:]) > 0
        pixels = pixels.masked_fill(is_hidden, MASKED_SHADE)
    return from_pixels(pixels, "pil")


def draft_captions(pipeline: UnifiedPipeline, input_ids: Int[Tensor, "batch length"]) -> list[str]:
    """The captions beside the pictures of a run after a step, masked tokens as `[MASK]`.

    Args:
        pipeline: The pipeline that runs.
        input_ids: Rows of a picture and a caption, as `callback_on_step_end` is given them.
    """
    grids = pipeline.processor.image_grids
    start = _image_start(pipeline, input_ids) + sum(grid[0] * grid[1] for grid in grids)
    functional = pipeline.transformer.vocabulary.segment("functional")
    texts = []
    for row in input_ids[:, start:].cpu():
        is_mask = pipeline.transformer.vocabulary.is_masked(row)
        is_structure = (row >= functional.offset) & (row < functional.stop) & ~is_mask
        texts.append(
            draft_text(pipeline.processor, content_codes(pipeline.processor, row[~is_structure]))
        )
    return texts


def _image_start(pipeline: UnifiedPipeline, input_ids: Tensor) -> int:
    """The column after `<boi>`, the same in every row."""
    boi = pipeline.transformer.vocabulary.special_id("boi")
    return int((input_ids[0] == boi).nonzero()[0]) + 1
