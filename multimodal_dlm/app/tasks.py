"""Every task of the page as an iterator over its steps; knows nothing of the page itself."""

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from queue import SimpleQueue
from time import perf_counter
from typing import Any

import torch
from PIL import Image

from multimodal_dlm.errors import ConfigError, unknown_name
from multimodal_dlm.pipelines import (
    UnifiedImageToTextPipeline,
    UnifiedInpaintPipeline,
    UnifiedJointPipeline,
    UnifiedTextToImagePipeline,
)
from multimodal_dlm.pipelines.drafts import draft_captions, draft_pictures
from multimodal_dlm.schedulers import AbsorbingAncestralScheduler, DiscreteScheduler

MAX_STEPS = 64
MAX_PICTURES = 4
MAX_CHARACTERS = 400
RELEASED = "confidence"
# Name -> how a scheduler is made from the pipeline's own.
SCHEDULERS: Mapping[str, Callable[[Any], Any]] = {
    RELEASED: lambda own: own,
    "confidence, sure tokens at once": lambda own: _with_rule(own, "threshold"),
    "random order": lambda own: AbsorbingAncestralScheduler.from_config(own.config),
}


@dataclass(frozen=True)
class Controls:
    """What a visitor may turn.

    Args:
        steps: Denoising steps; 0 takes the task's own number.
        guidance: Guidance scale, 1 is off; 0 takes the task's own.
        seed: Of the first result; result i has seed + i.
        scheduler: One of `SCHEDULERS`.
        count: Results side by side.
    """

    steps: int = 0
    guidance: float = 0.0
    seed: int = 0
    scheduler: str = RELEASED
    count: int = 1

    def __post_init__(self) -> None:
        for name, value, low, high in (
            ("steps", self.steps, 0, MAX_STEPS),
            ("guidance", self.guidance, 0, 20),
            ("seed", self.seed, 0, 2**31 - 1),
            ("pictures", self.count, 1, MAX_PICTURES),
        ):
            if not isinstance(value, int | float) or not low <= value <= high:
                raise ConfigError(f"`{name}` must lie between {low} and {high}; got {value!r}.")
        if self.scheduler not in SCHEDULERS:
            raise unknown_name("scheduler", str(self.scheduler), SCHEDULERS)

    def options(self) -> dict[str, Any]:
        """Keyword arguments for a pipeline; what is left to the task is left out."""
        found: dict[str, Any] = {}
        if self.steps:
            found["num_inference_steps"] = int(self.steps)
        if self.guidance:
            found["guidance_scale"] = float(self.guidance)
        return found

    def generators(self) -> list[torch.Generator]:
        """One generator a result."""
        seeds = range(int(self.seed), int(self.seed) + int(self.count))
        return [torch.Generator().manual_seed(seed) for seed in seeds]


@dataclass(frozen=True)
class Frame:
    """What there is to see after a step.

    Args:
        pictures: Pictures, drafts until the last frame.
        texts: Texts, with `[MASK]` where they are not written yet.
        film: The first picture after each step before this one.
        step: Steps taken.
        num_steps: Steps planned; a run may end earlier.
        seconds: Since the press.
        is_final: Whether this is the result.
        num_forwards: Calls of the model; known in the last frame.
    """

    pictures: tuple[Image.Image, ...] = ()
    texts: tuple[str, ...] = ()
    film: tuple[Image.Image, ...] = ()
    step: int = 0
    num_steps: int = 0
    seconds: float = 0.0
    is_final: bool = False
    num_forwards: int = 0


class Studio:
    """Runs the tasks of one pipeline, one at a time.

    Args:
        pipeline: Any pipeline of this package; its components are shared, nothing is copied.
    """

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline
        self._lock = threading.Lock()

    def warm_up(self) -> None:
        """Draw once in one step, so that the first visitor does not wait for lazy imports."""
        for _ in self.draw("a", Controls(steps=1)):
            pass

    def draw(self, prompt: str, controls: Controls, negative: str = "") -> Iterator[Frame]:
        """Pictures of a prompt.

        Args:
            prompt: What to draw.
            controls: Steps, guidance, seed, scheduler, count.
            negative: What to move away from; empty for none.
        """
        options = {"num_images_per_prompt": int(controls.count), **controls.options()}
        if negative.strip():
            options["negative_prompt"] = _text("negative prompt", negative)
        arguments = (_text("prompt", prompt),)
        return self._run(UnifiedTextToImagePipeline, arguments, controls, options, "pictures")

    def read(self, image: Image.Image, question: str, controls: Controls) -> Iterator[Frame]:
        """A caption of a picture, or the answer to a question about it.

        Args:
            image: The picture.
            question: Empty asks for a caption.
            controls: Steps, guidance, seed, scheduler; `count` is taken as 1.
        """
        arguments: tuple[Any, ...] = (image,)
        if question.strip():
            arguments = (image, _text("question", question))
        one = replace(controls, count=1)
        return self._run(UnifiedImageToTextPipeline, arguments, one, one.options(), "text")

    def invent(self, controls: Controls) -> Iterator[Frame]:
        """Pictures together with their captions.

        Args:
            controls: Steps, guidance, seed, scheduler, count.
        """
        arguments = (int(controls.count),)
        return self._run(UnifiedJointPipeline, arguments, controls, controls.options(), "both")

    def inpaint(
        self, image: Image.Image, mask: Image.Image, prompt: str, controls: Controls
    ) -> Iterator[Frame]:
        """A part of a picture drawn anew.

        Args:
            image: The picture.
            mask: White where to draw.
            prompt: What the whole picture shows.
            controls: Steps, guidance, seed, scheduler, count.
        """
        options = {"num_images_per_prompt": int(controls.count), **controls.options()}
        arguments = (_text("prompt", prompt), image, mask)
        return self._run(UnifiedInpaintPipeline, arguments, controls, options, "pictures")

    def _run(
        self,
        kind: Any,
        arguments: tuple[Any, ...],
        controls: Controls,
        options: Mapping[str, Any],
        shows: str,
    ) -> Iterator[Frame]:
        scheduler = SCHEDULERS[controls.scheduler](self.pipeline.scheduler)
        pipe = kind.from_pipe(self.pipeline, scheduler=scheduler)
        pipe.set_progress_bar_config(disable=True)
        call = _Call(pipe, arguments, {**options, "generator": controls.generators()}, shows)
        with self._lock:
            yield from call.frames()


class _Call:
    """One call of a pipeline in a thread of its own, seen step by step."""

    def __init__(
        self, pipe: Any, arguments: tuple[Any, ...], options: Mapping[str, Any], shows: str
    ) -> None:
        self.pipe = pipe
        self.arguments = arguments
        self.options = dict(options)
        self.shows = shows
        self.events: SimpleQueue[Any] = SimpleQueue()
        self.is_left = False
        self._is_new = False  # A step was taken and its text not seen yet.
        if shows == "text":
            self.options["streamer"] = self

    def put(self, value: Any) -> None:
        """Of a streamer: the drafts say it all."""

    def end(self) -> None:
        """Of a streamer: the result says it all."""

    def put_draft(self, text: str) -> None:
        """Of a streamer: the text so far."""
        if self._is_new:
            self.events.put(Frame(texts=(text,)))
        self._is_new = False

    def frames(self) -> Iterator[Frame]:
        """Run, and look at every step; a visitor who leaves stops the run after its step."""
        start, film, step = perf_counter(), [], 0
        worker = threading.Thread(target=self._work, daemon=True)
        worker.start()
        try:
            while True:
                event = self.events.get()
                if isinstance(event, BaseException):
                    raise event
                step += not event.is_final
                shown = replace(
                    event,
                    film=tuple(film),
                    step=step,
                    num_steps=self.pipe.num_timesteps,
                    seconds=perf_counter() - start,
                )
                yield shown
                if event.is_final:
                    return
                film += event.pictures[:1]
        finally:
            self.is_left = True
            worker.join()

    def _work(self) -> None:
        try:
            result = self.pipe(*self.arguments, **self.options, callback_on_step_end=self._look)
            self.events.put(
                Frame(
                    pictures=tuple(getattr(result, "images", ())),
                    texts=tuple(getattr(result, "texts", ())),
                    is_final=True,
                    num_forwards=self.pipe.num_forwards,
                )
            )
        except BaseException as error:  # noqa: BLE001 - raised again where it is seen
            self.events.put(error)

    def _look(self, pipe: Any, step: int, timestep: float, tensors: Any) -> dict[str, Any]:
        del step, timestep
        pipe._interrupt = self.is_left
        if self.shows == "text":  # The streamer is handed this step's text next.
            self._is_new = True
            return {}
        ids = tensors["input_ids"]
        texts = tuple(draft_captions(pipe, ids)) if self.shows == "both" else ()
        self.events.put(Frame(pictures=tuple(draft_pictures(pipe, ids)), texts=texts))
        return {}


def _with_rule(own: Any, rule: str) -> DiscreteScheduler:
    modalities = {
        name: {**options, "commit_rule": rule} for name, options in own.config["modalities"].items()
    }
    return type(own).from_config(own.config, modalities=modalities)


def _text(name: str, value: Any) -> str:
    text = value.strip() if isinstance(value, str) else ""
    if not 0 < len(text) <= MAX_CHARACTERS:
        raise ConfigError(
            f"The {name} must have 1 to {MAX_CHARACTERS} characters; got {len(text)}."
        )
    return text
