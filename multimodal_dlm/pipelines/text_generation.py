"""Texts from instructions, from nothing, and into the gaps of templates."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from multimodal_dlm.canvas import Canvas
from multimodal_dlm.errors import ConfigError
from multimodal_dlm.pipelines.guidance import classifier_free
from multimodal_dlm.pipelines.inputs import as_texts, check_count, check_guidance, repeat
from multimodal_dlm.pipelines.outputs import UnifiedTextOutput
from multimodal_dlm.pipelines.pipeline_base import Callback, UnifiedPipeline
from multimodal_dlm.pipelines.pixels import check_output_type, to_pixels
from multimodal_dlm.pipelines.randomness import Generators, draw_row_seeds
from multimodal_dlm.pipelines.streaming import Streamer
from multimodal_dlm.pipelines.text_length import TextLength, write_within
from multimodal_dlm.processing import MASK_MARKER

TEXT_LENGTH = 24
TEXT_OUTPUT_TYPES = ("text", "seq")


class UnifiedTextGenerationPipeline(UnifiedPipeline):
    """Text alone: the instruction is clean, the answer is written; or a template is completed.

    Examples:
        >>> pipe = UnifiedTextGenerationPipeline.from_pretrained("pipelines/...")  # doctest: +SKIP
        >>> pipe(template="a red [MASK] on a white background").texts  # doctest: +SKIP
    """

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        template: str | Sequence[str] | None = None,
        image: Any = None,
        gen_length: int | None = None,
        block_length: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float = 1.0,
        guidance_start: float = 0.0,
        guidance_stop: float = 1.0,
        guidance_schedule: str = "constant",
        num_texts_per_prompt: int = 1,
        generator: Generators = None,
        streamer: Streamer | None = None,
        output_type: str = "text",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("input_ids",),
    ) -> UnifiedTextOutput | tuple:
        """Write texts.

        Args:
            prompt: Instruction or instructions; None writes without any.
            template: Text or texts in which each `[MASK]` is one token to write, in place of
                `prompt`.
            image: Pictures the templates are about, one each.
            gen_length: Longest text in tokens, its end included, by default 24 or the model's
                longest text. A text that fits is the same under every limit up to that, see
                `text_length`. A template has its own length.
            block_length: Length of the blocks a text is written in, one of those the model was
                trained with; None for its default. A model without blocks has none.
            num_inference_steps: Steps, shared among the blocks; by default one per position to
                write. A `commit_rule` of the scheduler takes fewer.
            guidance_scale: g in u + g (c - u); 1.0 is off. The instruction, or the picture of a
                template, is the condition.
            guidance_start: Share of the steps after which guidance begins.
            guidance_stop: Share of the steps after which guidance ends.
            guidance_schedule: `constant`, `linear` or `cosine`; with the last two the scale goes
                from 1 in the first guided step to `guidance_scale` in the last.
            num_texts_per_prompt: Texts of each prompt or template, side by side in the result.
            generator: One generator, or one per text.
            streamer: Receives a single text while it is written, see `streaming`.
            output_type: `text`, or `seq` for codes alone.
            return_dict: False returns `(sequences, texts)`.
            callback_on_step_end: Called as (pipe, step, timestep, tensors) -> tensors after each
                step; set `pipe._interrupt = True` to stop.
            callback_on_step_end_tensor_inputs: Tensors it gets; `input_ids`.

        Raises:
            ConfigError: When an argument is out of range, contradicts another or is too long.
        """
        check_count("num_texts_per_prompt", num_texts_per_prompt)
        check_guidance(guidance_scale, guidance_start, guidance_stop, guidance_schedule)
        check_output_type(output_type, TEXT_OUTPUT_TYPES)
        if num_inference_steps is not None:
            check_count("num_inference_steps", num_inference_steps)
        run = partial(
            self._denoise,
            guidance_scale=guidance_scale,
            branches=classifier_free(self.processor.unconditional, guidance_scale),
            guidance_start=guidance_start,
            guidance_stop=guidance_stop,
            guidance_schedule=guidance_schedule,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        )
        if template is not None:
            canvas = self._template_canvas(
                prompt, template, image, gen_length, num_texts_per_prompt
            )
            gaps = max(1, int(canvas.is_free.sum(dim=1).max()))
            finished = run(
                canvas,
                num_inference_steps=num_inference_steps or gaps,
                row_seeds=draw_row_seeds(generator, canvas.batch_size),
                streamer=streamer,
            )
            return self._text_output(self.sequences(finished.canvas), output_type, return_dict)
        prompts = repeat(self._prompts(prompt, image), num_texts_per_prompt)
        row_seeds = draw_row_seeds(generator, len(prompts))
        length = TextLength.resolve(gen_length, TEXT_LENGTH, self.processor)

        def write(window: int, rows: Sequence[int], streamer: Streamer | None) -> Canvas:
            return run(
                self.processor.text(
                    [prompts[row] for row in rows], gen_length=window, block_length=block_length
                ),
                num_inference_steps=num_inference_steps or window,
                row_seeds=[row_seeds[row] for row in rows],
                streamer=streamer,
            ).canvas

        sequences = write_within(self, length, len(prompts), write, streamer)
        return self._text_output(sequences, output_type, return_dict)

    def _prompts(self, prompt: Any, image: Any) -> list[str | None]:
        """The instructions; None for a text without any."""
        if image is not None:
            raise ConfigError(
                "`image` goes with `template` here; got it without. Use"
                " `UnifiedImageToTextPipeline` for captions and questions."
            )
        return [None] if prompt is None else [*as_texts("prompt", prompt)]

    def _template_canvas(
        self, prompt: Any, template: Any, image: Any, gen_length: int | None, times: int
    ) -> Canvas:
        """Known text around the gaps, which are masked."""
        if prompt is not None or gen_length is not None:
            raise ConfigError(
                "`template` excludes `prompt` and `gen_length`: its text and its `[MASK]`s are all"
                " there is; got both. Leave them out."
            )
        templates = as_texts("template", template)
        for text in templates:
            if MASK_MARKER not in text:
                raise ConfigError(
                    f"`template` must hold at least one `{MASK_MARKER}`, one for each token to"
                    f" write; got `{text[:60]}`."
                )
        codes = None
        if image is not None:
            codes = self._encode_pixels(to_pixels(image, self.image_size))
            if len(codes[0]) != len(templates):
                raise ConfigError(
                    f"`image` must hold one picture per template; got {len(codes[0])} for"
                    f" {len(templates)}."
                )
            codes = tuple(level.repeat_interleave(times, dim=0) for level in codes)
        return self.processor.infill(repeat(templates, times), codes=codes)
