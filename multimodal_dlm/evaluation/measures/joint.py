"""Pairs of picture and caption out of nothing: do they belong together, and are they new?"""

from typing import Any

import numpy as np
import torch

from multimodal_dlm.datasets.manifest import Source
from multimodal_dlm.datasets.reading import ShardReader
from multimodal_dlm.evaluation.measurement import Measurement, mean_metric, register_measure
from multimodal_dlm.evaluation.sheets import contact_sheet
from multimodal_dlm.evaluation.text_metrics import name_of_caption, normalise_text
from multimodal_dlm.pipelines import UnifiedImageToTextPipeline, UnifiedJointPipeline

NUM_SHOWN = 18


@register_measure("joint", "UnifiedJointPipeline")
def measure_joint(
    pipeline: UnifiedJointPipeline,
    source: Source,
    *,
    split: str = "train",
    limit: int | None = 64,
    batch_size: int = 32,
    seed: int = 0,
) -> Measurement:
    """Consistency of joint pairs by the model's own reading, and which captions are training ones.

    `same_name` is the share of pairs whose picture, captioned again by the same model, gets the
    name of its caption; beside it the same with the captions of other pairs (`shuffled`). It says
    that picture and caption agree, not that a person would. `different` is the share of distinct
    captions, `known` of captions that are word for word in the split.

    Args:
        pipeline: Draws pairs.
        source: Dataset whose captions count as known.
        split: Split of those.
        limit: Pairs; 64 when None.
        batch_size: Pairs at once.
        seed: Pair i is drawn with seed + i.
    """
    count = limit or 64
    draw: Any = pipeline
    read: Any = UnifiedImageToTextPipeline.from_pipe(pipeline)
    read.set_progress_bar_config(disable=True)
    images, captions, again = [], [], []
    for first in range(0, count, batch_size):
        seeds = range(seed + first, seed + min(first + batch_size, count))
        generators = [torch.Generator().manual_seed(number) for number in seeds]
        pairs = draw(len(generators), generator=generators)
        images += pairs.images
        captions += pairs.texts
        again += read(pairs.images).texts
    names = [name_of_caption(text) for text in captions]
    seen = [name_of_caption(text) for text in again]
    shuffled = np.random.default_rng(seed).permutation(count)
    reader = ShardReader(source.splits[split], source=source.name)
    records = (reader.record(index) for index in range(len(reader)))
    known = {normalise_text(text) for record in records for text in record.captions}
    metrics = {
        "same_name": mean_metric(
            [name == other for name, other in zip(names, seen, strict=True)],
            baselines={
                "shuffled": [names[i] == name for i, name in zip(shuffled, seen, strict=True)]
            },
            seed=seed,
        ),
        "different": mean_metric([float(captions.index(c) == i) for i, c in enumerate(captions)]),
        "known": mean_metric([float(normalise_text(c) in known) for c in captions], seed=seed),
    }
    sheet = contact_sheet(images[:NUM_SHOWN], captions[:NUM_SHOWN], columns=6)
    return Measurement(metrics, {"pairs": sheet})
