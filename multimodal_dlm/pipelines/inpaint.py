"""New content in the holes of a picture."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool
from torch import Tensor

from multimodal_dlm.errors import ConfigError
from multimodal_dlm.pipelines.guidance import classifier_free
from multimodal_dlm.pipelines.inputs import (
    as_texts,
    check_count,
    check_guidance,
    matching_texts,
    repeat,
)
from multimodal_dlm.pipelines.outputs import UnifiedImageOutput
from multimodal_dlm.pipelines.pipeline_base import Callback, UnifiedPipeline
from multimodal_dlm.pipelines.pixels import check_output_type, to_mask, to_pixels
from multimodal_dlm.pipelines.randomness import Generators, draw_row_seeds


class UnifiedInpaintPipeline(UnifiedPipeline):
    """Inpainting: tokens under the mask are written, the others and the caption are known.

    Examples:
        >>> pipe = UnifiedInpaintPipeline.from_pretrained("pipelines/...")  # doctest: +SKIP
        >>> pipe("a red apple", image, mask_image).images[0]  # doctest: +SKIP
    """

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        image: Any,
        mask_image: Any,
        *,
        negative_prompt: str | Sequence[str] | None = None,
        num_inference_steps: int = 16,
        guidance_scale: float = 2.0,
        guidance_start: float = 0.0,
        guidance_stop: float = 1.0,
        guidance_schedule: str = "constant",
        num_images_per_prompt: int = 1,
        composite: bool = True,
        generator: Generators = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("input_ids",),
    ) -> UnifiedImageOutput | tuple:
        """Fill the holes of pictures.

        Args:
            prompt: What the whole picture shows, one for all pictures or one each.
            image: Picture or pictures, see `pixels.to_pixels`.
            mask_image: White where new content goes, one for all pictures or one each, over the
                picture as it is shown: turned as its EXIF says. A token is written when any of its
                pixels is masked.
            negative_prompt: What to move away from, one for all pictures or one each.
            num_inference_steps: Steps; more than masked tokens change nothing.
            guidance_scale: g in u + g (c - u); 1.0 is off and costs no second forward.
            guidance_start: Share of the steps after which guidance begins.
            guidance_stop: Share of the steps after which guidance ends.
            guidance_schedule: `constant`, `linear` or `cosine`; with the last two the scale goes
                from 1 in the first guided step to `guidance_scale` in the last.
            num_images_per_prompt: Results of each picture, side by side.
            composite: Paste the pixels outside the mask back from the given picture.
            generator: One generator, or one per result.
            output_type: `pil`, `np`, `pt` or `codes` (never composited).
            return_dict: False returns `(images,)`.
            callback_on_step_end: Called as (pipe, step, timestep, tensors) -> tensors after each
                step; set `pipe._interrupt = True` to stop.
            callback_on_step_end_tensor_inputs: Tensors it gets; `input_ids`.

        Raises:
            ConfigError: When an argument is out of range or numbers of pictures differ.
        """
        check_count("num_inference_steps", num_inference_steps)
        check_count("num_images_per_prompt", num_images_per_prompt)
        check_guidance(guidance_scale, guidance_start, guidance_stop, guidance_schedule)
        check_output_type(output_type)
        as_texts("prompt", prompt)
        pixels = to_pixels(image, self.image_size)
        is_masked = _match_masks(to_mask(mask_image, self.image_size), len(pixels))
        prompts = matching_texts("prompt", prompt, len(pixels), "picture")
        negative = None
        if negative_prompt is not None:
            negative = matching_texts("negative_prompt", negative_prompt, len(pixels), "picture")
            negative = repeat(negative, num_images_per_prompt)
        prompts = repeat(prompts, num_images_per_prompt)
        pixels = pixels.repeat_interleave(num_images_per_prompt, dim=0)
        is_masked = is_masked.repeat_interleave(num_images_per_prompt, dim=0)
        is_hole = F.adaptive_max_pool2d(is_masked.float(), self.processor.image_grids[0])[:, 0] > 0
        row_seeds = draw_row_seeds(generator, len(prompts))
        unconditional = partial(self.processor.unconditional, negative_prompts=negative)
        run = self._denoise(
            self.processor.inpaint(self._encode_pixels(pixels), is_hole, prompts),
            num_inference_steps=num_inference_steps,
            row_seeds=row_seeds,
            guidance_scale=guidance_scale,
            branches=classifier_free(unconditional, guidance_scale if is_hole.any() else 1.0),
            guidance_start=guidance_start,
            guidance_stop=guidance_stop,
            guidance_schedule=guidance_schedule,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        )
        codes = self.processor.image_codes(run.canvas)
        if output_type == "codes":
            images: Any = codes
        else:
            shared = {
                "num_inference_steps": num_inference_steps,
                "guidance_scale": guidance_scale,
                "guidance_start": guidance_start,
                "guidance_stop": guidance_stop,
                "guidance_schedule": guidance_schedule,
                "composite": composite,
            }
            negatives = negative or [None] * len(prompts)
            recipes = partial(
                self._recipes, row_seeds, shared, prompt=prompts, negative_prompt=negatives
            )
            drawn = self._decode_codes(codes)
            kept = torch.where(is_masked, drawn, pixels) if composite else drawn
            images = self._as_output(kept, output_type, recipes)
        output = UnifiedImageOutput(images)
        return output if return_dict else output.to_tuple()


def _match_masks(
    masks: Bool[Tensor, "masks 1 size size"], count: int
) -> Bool[Tensor, "batch 1 size size"]:
    """One mask for all pictures or one each."""
    if len(masks) not in (1, count):
        raise ConfigError(
            f"`mask_image` must be one mask or one per picture; got {len(masks)} for {count}."
        )
    return masks.expand(count, -1, -1, -1)
