"""Captions of pictures, and answers to questions about them."""

from collections.abc import Sequence
from typing import Any

import torch

from multimodal_dlm.canvas import Canvas
from multimodal_dlm.pipelines.guidance import classifier_free
from multimodal_dlm.pipelines.inputs import (
    check_count,
    check_guidance,
    matching_texts,
    repeat,
)
from multimodal_dlm.pipelines.outputs import UnifiedTextOutput
from multimodal_dlm.pipelines.pipeline_base import Callback, UnifiedPipeline
from multimodal_dlm.pipelines.pixels import check_output_type
from multimodal_dlm.pipelines.randomness import Generators, draw_row_seeds
from multimodal_dlm.pipelines.streaming import Streamer
from multimodal_dlm.pipelines.text_length import TextLength, write_within
from multimodal_dlm.processing import Codes

CAPTION_LENGTH = 24
ANSWER_LENGTH = 8
TEXT_OUTPUT_TYPES = ("text", "seq")


class UnifiedImageToTextPipeline(UnifiedPipeline):
    """Captioning and visual question answering: the image is clean, the answer is written.

    Examples:
        >>> pipe = UnifiedImageToTextPipeline.from_pretrained("pipelines/...")  # doctest: +SKIP
        >>> pipe(image).texts, pipe(image, "what colour is it?").texts  # doctest: +SKIP
    """

    @torch.no_grad()
    def __call__(
        self,
        image: Any = None,
        question: str | Sequence[str] | None = None,
        *,
        codes: Codes | None = None,
        gen_length: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float = 1.0,
        guidance_start: float = 0.0,
        guidance_stop: float = 1.0,
        guidance_schedule: str = "constant",
        num_texts_per_image: int = 1,
        generator: Generators = None,
        streamer: Streamer | None = None,
        output_type: str = "text",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("input_ids",),
    ) -> UnifiedTextOutput | tuple:
        """Describe pictures, or answer questions about them.

        Args:
            image: Picture or pictures: PIL, array, tensor or a list, see `pixels.to_pixels`.
            question: One question for all pictures or one each; None asks for captions.
            codes: Image codes in place of `image`, one (batch, h, w) tensor per level.
            gen_length: Longest text in tokens, its end included; by default 24 for captions and 8
                for answers, or the model's longest text when that is shorter. A text that fits is
                the same under every limit up to these, see `text_length`.
            num_inference_steps: Steps; by default one per position of the window.
            guidance_scale: g in u + g (c - u); 1.0 is off. The question stays in both branches.
            guidance_start: Share of the steps after which guidance begins.
            guidance_stop: Share of the steps after which guidance ends.
            guidance_schedule: `constant`, `linear` or `cosine`; with the last two the scale goes
                from 1 in the first guided step to `guidance_scale` in the last.
            num_texts_per_image: Texts of each picture, side by side in the result.
            generator: One generator, or one per text.
            streamer: Receives a single text while it is written, see `streaming`.
            output_type: `text`, or `seq` for codes alone.
            return_dict: False returns `(sequences, texts)`.
            callback_on_step_end: Called as (pipe, step, timestep, tensors) -> tensors after each
                step; set `pipe._interrupt = True` to stop.
            callback_on_step_end_tensor_inputs: Tensors it gets; `input_ids`.

        Raises:
            ConfigError: When an argument is out of range or a question is too long.
        """
        usual = CAPTION_LENGTH if question is None else ANSWER_LENGTH
        length = TextLength.resolve(gen_length, usual, self.processor)
        if num_inference_steps is not None:
            check_count("num_inference_steps", num_inference_steps)
        check_count("num_texts_per_image", num_texts_per_image)
        check_guidance(guidance_scale, guidance_start, guidance_stop, guidance_schedule)
        check_output_type(output_type, TEXT_OUTPUT_TYPES)
        given = self._given_codes(image, codes)
        count = len(given[0])
        questions = None
        if question is not None:
            questions = matching_texts("question", question, count, "picture")
            questions = repeat(questions, num_texts_per_image)
        given = tuple(level.repeat_interleave(num_texts_per_image, dim=0) for level in given)
        row_seeds = draw_row_seeds(generator, count * num_texts_per_image)

        def write(window: int, rows: Sequence[int], streamer: Streamer | None) -> Canvas:
            chosen = tuple(level[list(rows)] for level in given)
            asked = questions and [questions[row] for row in rows]
            return self._denoise(
                self.processor.image_to_text(chosen, questions=asked, gen_length=window),
                num_inference_steps=num_inference_steps or window,
                row_seeds=[row_seeds[row] for row in rows],
                guidance_scale=guidance_scale,
                branches=classifier_free(self.processor.unconditional, guidance_scale),
                guidance_start=guidance_start,
                guidance_stop=guidance_stop,
                guidance_schedule=guidance_schedule,
                streamer=streamer,
                callback_on_step_end=callback_on_step_end,
                callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            ).canvas

        sequences = write_within(self, length, len(row_seeds), write, streamer)
        return self._text_output(sequences, output_type, return_dict)
