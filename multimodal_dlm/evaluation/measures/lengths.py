"""Whether a greedy caption depends on the positions it is given."""

from collections.abc import Sequence

from PIL import Image

from multimodal_dlm.evaluation.held_out import HeldOut
from multimodal_dlm.evaluation.measurement import (
    Measurement,
    Metric,
    mean_metric,
    register_measure,
)
from multimodal_dlm.pipelines import UnifiedImageToTextPipeline


@register_measure("lengths", "UnifiedImageToTextPipeline", ["caption"])
def measure_lengths(
    pipeline: UnifiedImageToTextPipeline,
    data: HeldOut,
    *,
    lengths: Sequence[int] = (8, 16, 24),
) -> Measurement:
    """Share of pictures whose caption is the same at every `gen_length`.

    A caption of n tokens needs n + 1 positions, so each length is compared with the longest one
    over the pictures whose longest-window caption fits in it (`same_as_longest.LENGTH`);
    `same_at_all` is over those that fit in the shortest. A metric over no picture is left out.

    Args:
        pipeline: Describes the pictures, greedily.
        data: Pictures.
        lengths: Values of `gen_length`; those beyond the model's text window are cut to it.

    Raises:
        DataError: When the split is empty.
    """
    images = [Image.fromarray(sample.image) for sample in data.samples()]
    limit_tokens = pipeline.processor.layout["max_window"]["text"]
    lengths = sorted({min(length, limit_tokens) for length in lengths})
    texts = {length: data.texts(pipeline, images, gen_length=length) for length in lengths}
    longest = texts[lengths[-1]]
    sizes = [len(pipeline.processor.encode_text(text)) + 1 for text in longest]
    metrics: dict[str, Metric] = {}
    for length in lengths[:-1]:
        fits = [i for i, size in enumerate(sizes) if size <= length]
        same = [float(texts[length][i] == longest[i]) for i in fits]
        if same:
            metrics[f"same_as_longest.{length}"] = mean_metric(same, seed=data.seed)
    fits = [i for i, size in enumerate(sizes) if size <= lengths[0]]
    same = [float(all(texts[length][i] == longest[i] for length in lengths)) for i in fits]
    if same:
        metrics["same_at_all"] = mean_metric(same, seed=data.seed)
    return Measurement(metrics)
