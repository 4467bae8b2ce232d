"""Pictures and their captions out of nothing."""

from collections.abc import Mapping, Sequence
from functools import partial

import torch

from multimodal_dlm.canvas import Canvas
from multimodal_dlm.errors import ConfigError, unknown_name
from multimodal_dlm.pipelines.guidance import classifier_free
from multimodal_dlm.pipelines.inputs import check_count, check_guidance
from multimodal_dlm.pipelines.outputs import UnifiedJointOutput
from multimodal_dlm.pipelines.pipeline_base import Callback, UnifiedPipeline
from multimodal_dlm.pipelines.pixels import check_output_type
from multimodal_dlm.pipelines.randomness import Generators, draw_row_seeds
from multimodal_dlm.processing import TrainingRow
from multimodal_dlm.schedulers import DiscreteScheduler

TEXT_LENGTH = 24
# Written at the same time, picture and caption would be drawn nearly independently.
STAGGERED = {"text": (1.0, 0.5), "image": (0.5, 0.0)}


class UnifiedJointPipeline(UnifiedPipeline):
    """Joint generation: caption and picture are both masked and see each other.

    Examples:
        >>> pipe = UnifiedJointPipeline.from_pretrained("pipelines/...")  # doctest: +SKIP
        >>> output = pipe(num_samples=4)  # doctest: +SKIP
        >>> output.texts[0], output.images[0]  # doctest: +SKIP
    """

    @torch.no_grad()
    def __call__(
        self,
        num_samples: int = 1,
        *,
        gen_length: int | None = None,
        num_inference_steps: int = 32,
        time_windows: Mapping[str, tuple[float, float]] | None = None,
        text_temperature: float = 1.0,
        guidance_scale: float = 1.0,
        generator: Generators = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("input_ids",),
    ) -> UnifiedJointOutput | tuple:
        """Draw pairs of picture and caption.

        Args:
            num_samples: Pairs.
            gen_length: Positions of the caption; by default 24 or the model's longest text.
            num_inference_steps: Steps of the whole path, both modalities together.
            time_windows: (start, stop) of `text` and `image` in time, which runs from 1 to 0; by
                default the caption from 1 to 0.5, then the picture.
            text_temperature: Temperature of the caption, which the scheduler's own setting (greedy
                by default) would make the same in every pair.
            guidance_scale: g in u + g (c - u) for the picture given the caption; 1.0 is off.
            generator: One generator, or one per pair.
            output_type: Of the pictures: `pil`, `np`, `pt` or `codes`.
            return_dict: False returns `(images, sequences, texts)`.
            callback_on_step_end: Called as (pipe, step, timestep, tensors) -> tensors after each
                step; set `pipe._interrupt = True` to stop.
            callback_on_step_end_tensor_inputs: Tensors it gets; `input_ids`.

        Raises:
            ConfigError: When an argument is out of range.
        """
        longest = self.processor.layout["max_window"]["text"]
        gen_length = min(TEXT_LENGTH, longest) if gen_length is None else gen_length
        check_count("num_samples", num_samples)
        check_count("gen_length", gen_length, maximum=longest)
        check_count("num_inference_steps", num_inference_steps)
        check_guidance(guidance_scale)
        check_output_type(output_type)
        windows = {**STAGGERED, **(time_windows or {})}
        for name in windows:
            if name not in STAGGERED:
                raise unknown_name("modality in `time_windows`", name, STAGGERED)
        row_seeds = draw_row_seeds(generator, num_samples)
        run = self._denoise(
            self.processor.joint(num_samples, gen_length=gen_length),
            num_inference_steps=num_inference_steps,
            row_seeds=row_seeds,
            scheduler=with_temperature(self.scheduler, "text", text_temperature),
            guidance_scale=guidance_scale,
            branches=classifier_free(
                self._picture_alone, guidance_scale, self.processor.image_windows
            ),
            time_windows=windows,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        )
        texts = self.processor.decode_text(run.canvas)
        shared = {
            "num_inference_steps": num_inference_steps,
            "gen_length": gen_length,
            "guidance_scale": guidance_scale,
            "text_temperature": text_temperature,
            "time_windows": {name: list(window) for name, window in windows.items()},
        }
        recipes = partial(self._recipes, row_seeds, shared, caption=texts)
        output = UnifiedJointOutput(
            images=self._pictures(run.canvas, output_type, recipes),
            sequences=self.sequences(run.canvas),
            texts=texts,
        )
        return output if return_dict else output.to_tuple()

    def _picture_alone(self, canvas: Canvas) -> Canvas:
        """The same pictures without their captions, as the unconditional rows of training."""
        blank = tuple(torch.zeros(grid, dtype=torch.long) for grid in self.processor.image_grids)
        row = TrainingRow("unconditional_image", codes=tuple(level.numpy() for level in blank))
        alone = self.processor.training_canvas([row] * canvas.batch_size).to(canvas.device)
        ids = alone.input_ids.clone()
        for window in self.processor.image_windows:
            part = canvas.window_slice(window)
            ids[:, alone.window_slice(window)] = canvas.input_ids[:, part]
        return alone.replace(input_ids=ids)


def with_temperature(
    scheduler: DiscreteScheduler, modality: str, temperature: float
) -> DiscreteScheduler:
    """A scheduler of the same class and config but for the temperature of one modality.

    Raises:
        ConfigError: When the scheduler has no entry for the modality.
    """
    modalities = dict(scheduler.config["modalities"])
    if modality not in modalities:
        raise unknown_name("modality of the scheduler", modality, modalities)
    modalities[modality] = {**modalities[modality], "temperature": temperature}
    changed = type(scheduler).from_config(scheduler.config, modalities=modalities)
    if not isinstance(changed, DiscreteScheduler):
        raise ConfigError(f"`scheduler` must be one of ours; got {type(scheduler).__name__}.")
    return changed
