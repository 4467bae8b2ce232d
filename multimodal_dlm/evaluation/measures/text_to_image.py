"""Pictures drawn from held-out captions: alignment, style, distribution, copies."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from multimodal_dlm.datasets.manifest import Source
from multimodal_dlm.datasets.reading import ShardReader, first_samples
from multimodal_dlm.datasets.sampling import KeyedDraws
from multimodal_dlm.datasets.schema import Record, Sample
from multimodal_dlm.evaluation.measurement import (
    Measurement,
    Metric,
    mean_metric,
    register_measure,
)
from multimodal_dlm.evaluation.picture_features import (
    PictureFeatures,
    kernel_distance,
    nearest_cosine,
    rank_of_own,
)
from multimodal_dlm.evaluation.probes import LinearProbe
from multimodal_dlm.evaluation.sheets import contact_sheet
from multimodal_dlm.pipelines import UnifiedTextToImagePipeline

NUM_SHOWN = 24


@register_measure("text_to_image", "UnifiedTextToImagePipeline")
def measure_text_to_image(
    pipeline: UnifiedTextToImagePipeline,
    source: Source,
    *,
    split: str,
    limit: int | None = 300,
    batch_size: int = 16,
    seed: int = 0,
    caption: int = 1,
    attributes: Sequence[str] = ("style", "group"),
    num_train: int = 3000,
) -> Measurement:
    """Draw held-out captions and compare with the real pictures, in EfficientNet-Lite0 features.

    `own_at_1` and `own_at_5`: the real picture of the caption is the nearest, or among the five
    nearest, of all real pictures drawn for (chance 1 / n, 5 / n). `ATTRIBUTE`: a linear probe,
    fitted to training pictures, reads the record's attribute off the drawn picture; `real` is the
    same on the real ones, the ceiling. `kernel_distance` x 1000 to the real pictures, see
    `kernel_distance`. `copy_distance`: cosine distance to the nearest of the training pictures
    looked at; `real` is that of the real pictures. Baseline `nearest_neighbour` shows, for each
    caption, the training picture whose caption shares most words with it.

    Args:
        pipeline: Draws the pictures with its default settings.
        source: Dataset with pictures, captions and a training split.
        split: Held-out split.
        limit: Captions at most.
        batch_size: Pictures at once.
        seed: Caption i is drawn with seed + i; also of the choice of training pictures.
        caption: Which of a record's captions is drawn; the last where there are fewer.
        attributes: Entries of the records' meta.
        num_train: Training pictures that probes and distances look at.

    Raises:
        DataError: When a split is empty.
        ConfigError: When the weights of EfficientNet-Lite0 are not installed.
    """
    samples = first_samples(source, split, limit)
    prompts = [_caption(sample.record, caption) for sample in samples]
    drawn = draw_pictures(pipeline, prompts, batch_size, seed)
    reader = ShardReader(source.splits["train"], source=source.name)
    order = KeyedDraws(seed, "text_to_image/train").permutation(len(reader))[:num_train]
    train = [reader[int(index)] for index in order]
    nearest = nearest_by_words(
        prompts, [_caption(reader.record(index), caption) for index in range(len(reader))]
    )
    copies = [reader[index].image for index in nearest]
    features = PictureFeatures()
    real = features([sample.image for sample in samples])
    model, copied = features(drawn), features(copies)
    known = features([sample.image for sample in train])
    metrics = _alignment(model, copied, real, seed)
    for name in attributes:
        metrics[name] = _attribute(name, samples, train, model, copied, real, known, seed)
    metrics["kernel_distance"] = Metric(
        1000 * kernel_distance(model, real),
        None,
        None,
        len(samples),
        {"nearest_neighbour": 1000 * kernel_distance(copied, real),
         "train": 1000 * kernel_distance(known[: len(samples)], real)},
    )  # fmt: skip
    metrics["copy_distance"] = mean_metric(
        nearest_cosine(model, known), baselines={"real": nearest_cosine(real, known)}, seed=seed
    )
    shown = slice(0, NUM_SHOWN)
    sheet = contact_sheet(
        [Image.fromarray(picture) for picture in drawn[shown]], prompts[shown], columns=6
    )
    return Measurement(metrics, {"drawn": sheet})


def draw_pictures(
    pipeline: Any, prompts: Sequence[str], batch_size: int, seed: int
) -> list[np.ndarray]:
    """One picture a prompt, prompt i with seed + i, uint8 (height, width, 3)."""
    drawn: list[np.ndarray] = []
    for first in range(0, len(prompts), batch_size):
        part = list(prompts[first : first + batch_size])
        seeds = range(seed + first, seed + first + len(part))
        generators = [torch.Generator().manual_seed(number) for number in seeds]
        drawn += [np.asarray(image) for image in pipeline(part, generator=generators).images]
    return drawn


def nearest_by_words(prompts: Sequence[str], captions: Sequence[str]) -> list[int]:
    """The caption with the largest share of words in common (Jaccard), the first among equals."""
    bags = [frozenset(caption.lower().split()) for caption in captions]
    found = []
    for prompt in prompts:
        words = frozenset(prompt.lower().split())
        scores = [len(words & bag) / len(words | bag) for bag in bags]
        found.append(int(np.argmax(scores)))
    return found


def _alignment(model: Tensor, copied: Tensor, real: Tensor, seed: int) -> dict[str, Metric]:
    """Whether the real picture of the caption is among the nearest real pictures."""
    own, copy = rank_of_own(model, real), rank_of_own(copied, real)
    metrics = {}
    for k in (1, 5):
        baselines = {
            "nearest_neighbour": [rank <= k for rank in copy],
            "chance": min(1.0, k / len(own)),
        }
        metrics[f"own_at_{k}"] = mean_metric(
            [rank <= k for rank in own], baselines=baselines, seed=seed
        )
    return metrics


def _attribute(
    name: str,
    samples: Sequence[Sample],
    train: Sequence[Sample],
    model: Tensor,
    copied: Tensor,
    real: Tensor,
    known: Tensor,
    seed: int,
) -> Metric:
    """Share of drawn pictures off which a probe reads the true attribute."""
    probe = LinearProbe(known, [str(sample.record.meta.get(name)) for sample in train])
    truths = [str(sample.record.meta.get(name)) for sample in samples]

    def right(features: Tensor) -> list[bool]:
        return [a == b for a, b in zip(probe.predict(features), truths, strict=True)]

    majority = Counter(truths).most_common(1)[0][1] / len(truths)
    return mean_metric(
        right(model),
        baselines={
            "nearest_neighbour": right(copied),
            "majority": majority,
            "real": right(real),
        },
        seed=seed,
    )


def _caption(record: Record, place: int) -> str:
    return record.captions[min(place, len(record.captions) - 1)]
