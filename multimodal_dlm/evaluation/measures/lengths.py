"""Whether a greedy caption depends on the positions it is given."""

from collections.abc import Sequence
from typing import Any

from PIL import Image

from multimodal_dlm.datasets.manifest import Source
from multimodal_dlm.datasets.reading import first_samples
from multimodal_dlm.evaluation.measurement import (
    Measurement,
    Metric,
    mean_metric,
    register_measure,
)
from multimodal_dlm.pipelines import UnifiedImageToTextPipeline


@register_measure("lengths", "UnifiedImageToTextPipeline")
def measure_lengths(
    pipeline: UnifiedImageToTextPipeline,
    source: Source,
    *,
    split: str,
    limit: int | None = None,
    batch_size: int = 64,
    seed: int = 0,
    lengths: Sequence[int] = (8, 16, 24),
) -> Measurement:
    """Share of pictures whose caption is the same at every `gen_length`.

    A caption of n tokens needs n + 1 positions, so each length is compared with the longest one
    over the pictures whose longest-window caption fits in it (`same_as_longest.LENGTH`);
    `same_at_all` is over those that fit in the shortest. A metric over no picture is left out.

    Args:
        pipeline: Describes the pictures, greedily.
        source: Dataset with pictures.
        split: Split to measure.
        limit: Pictures at most.
        batch_size: Pictures at once.
        seed: Of the bootstrap.
        lengths: Values of `gen_length`; those beyond the model's text window are cut to it.

    Raises:
        DataError: When the split is empty.
    """
    samples = first_samples(source, split, limit)
    images = [Image.fromarray(sample.image) for sample in samples]
    describe: Any = pipeline
    limit_tokens = pipeline.processor.layout["max_window"]["text"]
    lengths = sorted({min(length, limit_tokens) for length in lengths})
    texts: dict[int, list[str]] = {length: [] for length in lengths}
    for length in lengths:
        for first in range(0, len(images), batch_size):
            part = images[first : first + batch_size]
            texts[length] += describe(part, gen_length=length).texts
    longest = texts[lengths[-1]]
    sizes = [len(pipeline.processor.encode_text(text)) + 1 for text in longest]
    metrics: dict[str, Metric] = {}
    for length in lengths[:-1]:
        fits = [i for i, size in enumerate(sizes) if size <= length]
        same = [float(texts[length][i] == longest[i]) for i in fits]
        if same:
            metrics[f"same_as_longest.{length}"] = mean_metric(same, seed=seed)
    fits = [i for i, size in enumerate(sizes) if size <= lengths[0]]
    same = [float(all(texts[length][i] == longest[i] for length in lengths)) for i in fits]
    if same:
        metrics["same_at_all"] = mean_metric(same, seed=seed)
    return Measurement(metrics)
