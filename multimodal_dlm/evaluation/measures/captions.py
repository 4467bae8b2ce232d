"""Captions of held-out pictures, beside the names of the nearest training pictures."""

from collections import Counter
from typing import Any

from PIL import Image

from multimodal_dlm.datasets.manifest import Source
from multimodal_dlm.datasets.reading import first_samples, iterate_samples
from multimodal_dlm.evaluation.baselines import NearestPictures, pixel_features
from multimodal_dlm.evaluation.measurement import Measurement, mean_metric, register_measure
from multimodal_dlm.evaluation.sheets import contact_sheet
from multimodal_dlm.evaluation.text_metrics import exact_match, name_of_caption, name_of_sample
from multimodal_dlm.pipelines import UnifiedImageToTextPipeline

NUM_SHOWN = 18


@register_measure("captions", "UnifiedImageToTextPipeline")
def measure_captions(
    pipeline: UnifiedImageToTextPipeline,
    source: Source,
    *,
    split: str,
    limit: int | None = None,
    batch_size: int = 64,
    seed: int = 0,
) -> Measurement:
    """Share of captions with the exact name of what the picture shows.

    Baselines: the name of the `nearest_neighbour` among the training pictures (cosine of pictures
    reduced to 16 x 16 pixels) and the most frequent training name, `majority`.

    Args:
        pipeline: Describes the pictures.
        source: Dataset with captions; the truth is the record's concept, else the name in its first
            caption.
        split: Held-out split.
        limit: Pictures at most.
        batch_size: Pictures at once.
        seed: Of the bootstrap.

    Raises:
        DataError: When the split is empty.
    """
    samples = first_samples(source, split, limit)
    truths = [name_of_sample(sample) for sample in samples]
    describe: Any = pipeline
    captions: list[str] = []
    for first in range(0, len(samples), batch_size):
        part = samples[first : first + batch_size]
        captions += describe([Image.fromarray(sample.image) for sample in part]).texts
    right = _right([name_of_caption(caption) for caption in captions], truths)
    baselines = {}
    if source.count("train"):
        train = list(iterate_samples(source, "train"))
        labels = [name_of_sample(sample) for sample in train]
        nearest = NearestPictures(pixel_features([sample.image for sample in train]), labels)
        found = nearest.nearest(pixel_features([sample.image for sample in samples]))
        most = min(Counter(labels).items(), key=lambda item: (-item[1], item[0]))[0]
        baselines["nearest_neighbour"] = _right(found, truths)
        baselines["majority"] = _right([most] * len(truths), truths)
    shown = slice(0, NUM_SHOWN)
    sheet = contact_sheet(
        [Image.fromarray(sample.image) for sample in samples[shown]],
        [
            f"{text} (true: {truth})"
            for text, truth in zip(captions[shown], truths[shown], strict=True)
        ],
        columns=6,
    )
    return Measurement(
        {"exact": mean_metric(right, baselines=baselines, seed=seed)}, {"captions": sheet}
    )


def _right(names: list[str], truths: list[str]) -> list[float]:
    return [float(exact_match(name, truth)) for name, truth in zip(names, truths, strict=True)]
