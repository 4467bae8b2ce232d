"""Pictures from prompts."""

from collections.abc import Sequence
from functools import partial

import torch

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
from multimodal_dlm.pipelines.pixels import check_output_type
from multimodal_dlm.pipelines.randomness import Generators, draw_row_seeds


class UnifiedTextToImagePipeline(UnifiedPipeline):
    """Text-to-image: the caption window is clean, the image window is written.

    Examples:
        >>> pipe = UnifiedTextToImagePipeline.from_pretrained("pipelines/...")  # doctest: +SKIP
        >>> pipe("a red apple").images[0].save("apple.png")  # doctest: +SKIP
    """

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] | None = None,
        num_inference_steps: int = 16,
        guidance_scale: float = 2.0,
        guidance_start: float = 0.0,
        guidance_stop: float = 1.0,
        guidance_schedule: str = "constant",
        num_images_per_prompt: int = 1,
        generator: Generators = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("input_ids",),
    ) -> UnifiedImageOutput | tuple:
        """Draw pictures.

        Args:
            prompt: One prompt or a list.
            negative_prompt: What to move away from, one for all prompts or one each; takes the
                place of the empty condition.
            num_inference_steps: Steps; more than tokens in a picture change nothing.
            guidance_scale: g in u + g (c - u); 1.0 is off and costs no second forward.
            guidance_start: Share of the steps after which guidance begins.
            guidance_stop: Share of the steps after which guidance ends.
            guidance_schedule: `constant`, `linear` or `cosine`; with the last two the scale goes
                from 1 in the first guided step to `guidance_scale` in the last.
            num_images_per_prompt: Pictures of each prompt, side by side in the result.
            generator: One generator, or one per picture.
            output_type: `pil`, `np`, `pt` or `codes`.
            return_dict: False returns `(images,)`.
            callback_on_step_end: Called as (pipe, step, timestep, tensors) -> tensors after each
                step; set `pipe._interrupt = True` to stop.
            callback_on_step_end_tensor_inputs: Tensors it gets; `input_ids`.

        Raises:
            ConfigError: When an argument is out of range or a prompt is too long.
        """
        prompts = as_texts("prompt", prompt)
        check_count("num_inference_steps", num_inference_steps)
        check_count("num_images_per_prompt", num_images_per_prompt)
        check_guidance(guidance_scale, guidance_start, guidance_stop, guidance_schedule)
        check_output_type(output_type)
        negative = None
        if negative_prompt is not None:
            negative = matching_texts("negative_prompt", negative_prompt, len(prompts), "prompt")
            negative = repeat(negative, num_images_per_prompt)
        prompts = repeat(prompts, num_images_per_prompt)
        row_seeds = draw_row_seeds(generator, len(prompts))
        unconditional = partial(self.processor.unconditional, negative_prompts=negative)
        run = self._denoise(
            self.processor.text_to_image(prompts),
            num_inference_steps=num_inference_steps,
            row_seeds=row_seeds,
            guidance_scale=guidance_scale,
            branches=classifier_free(unconditional, guidance_scale),
            guidance_start=guidance_start,
            guidance_stop=guidance_stop,
            guidance_schedule=guidance_schedule,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        )
        shared = {
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "guidance_start": guidance_start,
            "guidance_stop": guidance_stop,
            "guidance_schedule": guidance_schedule,
        }
        recipes = partial(
            self._recipes,
            row_seeds,
            shared,
            prompt=prompts,
            negative_prompt=negative or [None] * len(prompts),
        )
        output = UnifiedImageOutput(self._pictures(run.canvas, output_type, recipes))
        return output if return_dict else output.to_tuple()
