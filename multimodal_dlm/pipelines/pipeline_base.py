"""What all pipelines share: components, canvases, runs of the denoising loop, and input checks.

Loading, saving and sharing are in `hub.py`. A pipeline registers exactly four components; the
processor is built from the layout stored with the backbone.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, TypeVar

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from multimodal_dlm.canvas import Canvas
from multimodal_dlm.errors import CheckpointError, ConfigError, unknown_name
from multimodal_dlm.models.transformer import UnifiedTransformerModel
from multimodal_dlm.pipelines.denoising import DenoisingOutput, denoise
from multimodal_dlm.pipelines.guidance import Branch, BranchBuilder, conditional_only
from multimodal_dlm.pipelines.hub import SharingMixin
from multimodal_dlm.pipelines.image_metadata import attach_recipe
from multimodal_dlm.pipelines.manifest import remembered_fingerprint
from multimodal_dlm.pipelines.outputs import UnifiedTextOutput
from multimodal_dlm.pipelines.pixels import from_pixels, to_pixels
from multimodal_dlm.pipelines.scoring import ScoringMixin
from multimodal_dlm.pipelines.streaming import Streamer, TextStream
from multimodal_dlm.precision import check_float64, warn_of_software_bf16
from multimodal_dlm.processing import Codes, UnifiedProcessor
from multimodal_dlm.schedulers import DiscreteScheduler
from multimodal_dlm.tokenizers.image import ImageTokenizer
from multimodal_dlm.tokenizers.text import text_fingerprint

Callback = Callable[[Any, int, float, dict[str, Any]], Mapping[str, Any] | None]
Pipeline = TypeVar("Pipeline", bound="UnifiedPipeline")


class UnifiedPipeline(ScoringMixin, SharingMixin, DiffusionPipeline):
    """Base of the five pipelines, all over the same components.

    Args:
        transformer: Backbone; its config holds vocabulary and layout.
        scheduler: Reverse process, with an entry per modality it is to write.
        tokenizer: Text tokenizer.
        image_tokenizer: Image tokenizer.

    Raises:
        ConfigError: When the backbone has no layout.
        CheckpointError: When a tokenizer is not the one the backbone was trained with.
    """

    model_cpu_offload_seq = "transformer->image_tokenizer"
    _callback_tensor_inputs = ["input_ids"]

    def __init__(
        self,
        transformer: UnifiedTransformerModel,
        scheduler: DiscreteScheduler,
        tokenizer: PreTrainedTokenizerFast,
        image_tokenizer: ImageTokenizer,
    ) -> None:
        super().__init__()
        layout = check_components(transformer, tokenizer, image_tokenizer)
        self.register_modules(
            transformer=transformer,
            scheduler=scheduler,
            tokenizer=tokenizer,
            image_tokenizer=image_tokenizer,
        )
        self.processor = UnifiedProcessor(
            vocabulary=transformer.vocabulary,
            layout=layout,
            tokenizer=tokenizer,
            image_grids=(image_tokenizer.grid_size,) * len(image_tokenizer.codebook_sizes),
        )
        self.num_forwards = 0
        self._num_timesteps = 0
        self._current_timestep: float | None = None
        self._interrupt = False
        self._guidance_scale = 1.0

    @classmethod
    def from_pipe(cls: type[Pipeline], pipeline: DiffusionPipeline, **components: Any) -> Pipeline:
        """Another task over the same components: the same objects, nothing cast or copied.

        Args:
            pipeline: A pipeline with the four components.
            components: Components to exchange, by name.
        """
        return cls(**{**pipeline.components, **components})

    def to(self: Pipeline, *args: Any, **kwargs: Any) -> Pipeline:
        """Move or cast all components, as in Diffusers.

        Raises:
            ConfigError: For Apple's MPS, which has no float64; nothing is moved then.
        """
        for given in (*args, kwargs.get("device")):
            if isinstance(given, str | torch.device):
                check_float64(given)
        return super().to(*args, **kwargs)

    @property
    def _execution_device(self) -> torch.device:
        """Where calls compute; refused for MPS, however the components came there."""
        device = super()._execution_device
        check_float64(device)
        return device

    # State of the present call, for callbacks.

    @property
    def guidance_scale(self) -> float:
        """Guidance scale of the present or last call."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """Steps the present or last call was planned with."""
        return self._num_timesteps

    @property
    def current_timestep(self) -> float | None:
        """Time of the step that has just been taken; None outside a call."""
        return self._current_timestep

    @property
    def interrupt(self) -> bool:
        """True once a callback has set `pipe._interrupt`: the run ends after this step."""
        return self._interrupt

    @property
    def image_size(self) -> int:
        """Side of the pictures in pixels."""
        return int(self.image_tokenizer.config["image_size"])

    # Running the loop.

    def _denoise(
        self,
        canvas: Canvas,
        *,
        num_inference_steps: int,
        row_seeds: Sequence[int],
        callback_on_step_end: Callback | None,
        callback_on_step_end_tensor_inputs: Sequence[str],
        guidance_scale: float = 1.0,
        branches: BranchBuilder = conditional_only,
        scheduler: DiscreteScheduler | None = None,
        streamer: Streamer | None = None,
        **options: Any,
    ) -> DenoisingOutput:
        """Run the denoising loop on a canvas and report forwards and state to callbacks."""
        self._guidance_scale = guidance_scale
        self._num_timesteps = num_inference_steps
        self._interrupt = False
        stream = None if streamer is None else TextStream(self.processor, streamer, canvas)
        callback = self._step_callback(
            callback_on_step_end, callback_on_step_end_tensor_inputs, stream
        )
        device = self._execution_device
        warn_of_software_bf16(device, self.transformer.dtype)

        def on_device(given: Canvas) -> list[Branch]:
            return [replace(made, canvas=made.canvas.to(device)) for made in branches(given)]

        finished: Canvas | None = None
        try:
            output = denoise(
                self.transformer,
                self.scheduler if scheduler is None else scheduler,
                canvas.to(device),
                num_inference_steps=num_inference_steps,
                row_seeds=row_seeds,
                branches=on_device,
                callback=callback,
                progress_bar=self._progress_bar,
                **options,
            )
            finished = output.canvas
        finally:
            self._current_timestep = None
            self.maybe_free_model_hooks()
            if stream is not None:  # A reader in another thread waits for the end, come what may.
                stream.end(finished)
        self.num_forwards = output.num_forwards
        return output

    def _progress_bar(self, total: int) -> AbstractContextManager[Any]:
        """Diffusers' progress bar over a number of steps."""
        return self.progress_bar(total=total)  # pyright: ignore[reportAttributeAccessIssue]

    def _step_callback(
        self,
        callback: Callback | None,
        tensor_inputs: Sequence[str],
        stream: TextStream | None = None,
    ) -> Callable[[int, float, Canvas], Canvas | None]:
        """Wrap a Diffusers callback (pipe, step, timestep, tensors) -> tensors for the loop."""
        if isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)):
            tensor_inputs = callback.tensor_inputs
        for name in tensor_inputs:
            if name not in self._callback_tensor_inputs:
                raise unknown_name(
                    "callback_on_step_end_tensor_inputs", name, self._callback_tensor_inputs
                )

        def on_step_end(step: int, timestep: float, canvas: Canvas) -> Canvas | None:
            self._current_timestep = timestep
            if callback is not None:
                # Copies, because callbacks write in place too.
                tensors = {name: getattr(canvas, name).clone() for name in tensor_inputs}
                returned = callback(self, step, timestep, tensors) or {}
                changed = {name: returned[name] for name in tensor_inputs if name in returned}
                if any(not torch.equal(changed[name], getattr(canvas, name)) for name in changed):
                    canvas = canvas.replace(**changed)
            if stream is not None:
                stream.update(canvas)
            return None if self._interrupt else canvas

        return on_step_end

    # Pixels, codes and text.

    def _given_codes(self, image: Any, codes: Codes | None) -> Codes:
        """Codes of the pictures an argument holds, or the codes given in their place.

        Raises:
            ConfigError: When both or neither are given.
        """
        if (image is None) == (codes is None):
            got = "both" if image is not None else "neither"
            raise ConfigError(f"Give either `image` or `codes`; got {got}.")
        if codes is None:
            return self._encode_pixels(to_pixels(image, self.image_size))
        if not isinstance(codes, (tuple, list)) or not codes:
            got = "none" if isinstance(codes, (tuple, list)) else type(codes).__name__
            raise ConfigError(
                "`codes` must be a tuple of (batch, h, w) tensors, one per level; got"
                f" {got}. Use `(codes,)` for a single level."
            )
        return tuple(codes)

    def _text_output(
        self, sequences: Tensor, output_type: str, return_dict: bool
    ) -> UnifiedTextOutput | tuple:
        """Sequences of text codes and their texts."""
        texts = self.processor.decode_sequences(sequences) if output_type == "text" else None
        output = UnifiedTextOutput(sequences, texts)
        return output if return_dict else output.to_tuple()

    def _encode_pixels(self, pixels: Tensor) -> Codes:
        """Pixels in [0, 1] -> codes on the CPU."""
        codes = self.image_tokenizer.encode(pixels.to(self._execution_device))
        return tuple(level.cpu() for level in codes)

    def _decode_codes(self, codes: Codes) -> Tensor:
        """Codes -> float32 pixels in [0, 1] on the CPU."""
        on_device = tuple(level.to(self._execution_device) for level in codes)
        return self.image_tokenizer.decode(on_device).float().cpu()

    def _pictures(
        self, canvas: Canvas, output_type: str, recipes: Callable[[], Sequence[Mapping[str, Any]]]
    ) -> Any:
        """Pictures of a finished canvas in the form asked for."""
        codes = self.processor.image_codes(canvas)
        if output_type == "codes":
            return codes
        return self._as_output(self._decode_codes(codes), output_type, recipes)

    def _as_output(
        self, pixels: Tensor, output_type: str, recipes: Callable[[], Sequence[Mapping[str, Any]]]
    ) -> Any:
        """Pixels in the form asked for; PIL images carry their recipes."""
        images = from_pixels(pixels, output_type)
        if output_type == "pil":
            for image, recipe in zip(images, recipes(), strict=True):
                attach_recipe(image, recipe)
        return images

    def sequences(self, canvas: Canvas) -> Tensor:
        """Text codes of the whole answer window, (batch, positions), on the CPU."""
        ids = canvas.input_ids[:, canvas.window_slice(self.processor.answer_window)]
        is_padding = canvas.is_padding[:, canvas.window_slice(self.processor.answer_window)]
        fill = self.processor.vocabulary.special_id("fill")
        ids = ids.masked_fill(is_padding, fill)
        return self.processor.vocabulary.to_codes(ids, "text").cpu()

    # Recipes.

    @property
    def model_fingerprint(self) -> str:
        """SHA-256 of the backbone's weights, computed once and again when they change.

        A change is another backbone, or a tensor of it moved, cast, exchanged or written in place.
        Not noticed are writes through what hides them from torch: in place into `.data`, or into
        NumPy arrays and other memory that a tensor shares.
        """
        return remembered_fingerprint(self.transformer)

    def _recipes(
        self, row_seeds: Sequence[int], shared: Mapping[str, Any], **by_row: Sequence[Any]
    ) -> list[dict[str, Any]]:
        """What made each row, as JSON values.

        Args:
            row_seeds: Seed of each row.
            shared: Arguments that all rows have in common.
            by_row: Arguments of each row.
        """
        common = {
            "pipeline": type(self).__name__,
            **shared,
            "scheduler": type(self.scheduler).__name__,
            "scheduler_config": {
                name: value
                for name, value in self.scheduler.config.items()
                if not name.startswith("_")
            },
            "model_fingerprint": self.model_fingerprint,
            "vocabulary_fingerprint": self.transformer.vocabulary.fingerprint,
            "image_tokenizer_fingerprint": remembered_fingerprint(self.image_tokenizer),
            "dtype": str(self.transformer.dtype).removeprefix("torch."),
        }
        return [
            {**common, **{name: values[row] for name, values in by_row.items()}, "row_seed": seed}
            for row, seed in enumerate(row_seeds)
        ]


def check_components(
    transformer: UnifiedTransformerModel,
    tokenizer: PreTrainedTokenizerFast,
    image_tokenizer: ImageTokenizer,
) -> Mapping[str, Any]:
    """Refuse tokenizers that the backbone was not trained with, and a backbone without layout.

    Returns:
        The layout of the backbone.

    Raises:
        ConfigError: When the backbone has no layout.
        CheckpointError: When sizes or fingerprints differ.
    """
    if transformer.layout is None:
        raise ConfigError(
            "`transformer` must have a `layout` in its config; got None. Build it with"
            " `layout=make_layout(...)`."
        )
    vocabulary = transformer.vocabulary
    sizes = tuple(part.size for part in vocabulary.modality_segments("image"))
    if sizes != tuple(image_tokenizer.codebook_sizes):
        raise CheckpointError(
            f"`image_tokenizer` must have the codebook sizes {sizes} of the vocabulary; got"
            f" {tuple(image_tokenizer.codebook_sizes)}. Load the tokenizer saved with the model."
        )
    if len(tokenizer) > vocabulary.segment("text").size:
        raise CheckpointError(
            f"`tokenizer` must have at most {vocabulary.segment('text').size} tokens, the text"
            f" segment of the vocabulary; got {len(tokenizer)}. Load the one saved with the model."
        )
    expected = vocabulary.fingerprints
    found: dict[str, Callable[[], str]] = {
        "text": lambda: text_fingerprint(tokenizer),
        "image": lambda: image_tokenizer.fingerprint,
    }
    for modality, fingerprint in found.items():
        if modality in expected and fingerprint() != expected[modality]:
            component = "tokenizer" if modality == "text" else "image_tokenizer"
            raise CheckpointError(
                f"`{component}` must have the fingerprint {expected[modality][:16]}... that the"
                f" transformer was trained with; got {fingerprint()[:16]}... . Its codes would mean"
                " something else. Load the tokenizer saved with the model."
            )
    if image_tokenizer.config["fingerprint"] is None:
        # Checked while the weights are as trained: casting them later must not change it.
        image_tokenizer.mark_released()
    return transformer.layout
