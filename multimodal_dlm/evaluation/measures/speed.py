"""Seconds a picture, a caption and an answer: times, so no part of what two runs agree on."""

from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from time import perf_counter
from typing import Any

import torch
from PIL import Image

from multimodal_dlm.evaluation.held_out import HeldOut
from multimodal_dlm.evaluation.measurement import Measurement, Metric, register_measure
from multimodal_dlm.evaluation.measures.likelihood import trained_caption
from multimodal_dlm.pipelines import UnifiedImageToTextPipeline, UnifiedTextToImagePipeline
from multimodal_dlm.tasks import TASKS

QUESTION = "what is this?"


@register_measure("speed", "UnifiedTextToImagePipeline", ["text_to_image"], ["caption"], ["vqa"])
def measure_speed(
    pipeline: UnifiedTextToImagePipeline,
    data: HeldOut,
    *,
    repeats: int = 3,
    tasks: Sequence[str] = TASKS,
) -> Measurement:
    """Seconds of one call, alone and in a batch, at default settings; forward passes of each.

    Times (median of the repeats, after one call that does not count) stand in the report's `times`,
    which two runs need not agree on; the metrics `forwards.TASK` are exact. Read times only from a
    machine that does nothing else.

    Args:
        pipeline: Draws and reads.
        data: Rows of the batch, `limit` of them.
        repeats: Calls that are timed.
        tasks: What the model was trained for; other calls are left out.

    Raises:
        DataError: When the split is empty.
    """
    samples = data.samples()
    prompts = [trained_caption(data.source, sample.record) for sample in samples]
    images = [Image.fromarray(sample.image) for sample in samples]
    draw: Any = pipeline
    read: Any = UnifiedImageToTextPipeline.from_pipe(pipeline)
    read.set_progress_bar_config(disable=True)

    def generators(count: int) -> list[torch.Generator]:
        return data.generators(slice(0, count))

    kinds: dict[str, tuple[str, Any, Callable[[int], Any]]] = {
        "picture": ("text_to_image", draw, lambda n: draw(prompts[:n], generator=generators(n))),
        "caption": ("caption", read, lambda n: read(images[:n], generator=generators(n))),
        "answer": ("vqa", read, lambda n: read(images[:n], QUESTION, generator=generators(n))),
    }
    calls: dict[str, tuple[Any, int, Callable[[], Any]]] = {
        f"{kind}.{name}": (pipe, count, partial(call, count))
        for name, count in (("one", 1), ("batch", len(samples)))
        for kind, (task, pipe, call) in kinds.items()
        if task in tasks
    }
    metrics, times = {}, {}
    for name, (pipe, count, call) in calls.items():
        call()
        times[f"seconds_each.{name}"] = _median_seconds(call, repeats) / count
        metrics[f"forwards.{name}"] = Metric(float(pipe.num_forwards), None, None, count)
    return Measurement(metrics, times=times)


def _median_seconds(call: Callable[[], Any], repeats: int) -> float:
    found = []
    for _ in range(repeats):
        start = perf_counter()
        call()
        found.append(perf_counter() - start)
    return median(found)
