"""Pairs of picture and caption out of nothing: do they belong together, and are they new?"""

from typing import Any

from multimodal_dlm.evaluation.held_out import HeldOut
from multimodal_dlm.evaluation.measurement import Measurement, Metric, mean_metric, register_measure
from multimodal_dlm.evaluation.sheets import contact_sheet
from multimodal_dlm.evaluation.text_metrics import name_of_caption, normalise_text
from multimodal_dlm.pipelines import UnifiedImageToTextPipeline, UnifiedJointPipeline

NUM_PAIRS = 64
NUM_SHOWN = 18


@register_measure("joint", "UnifiedJointPipeline", ["joint", "caption"])
def measure_joint(
    pipeline: UnifiedJointPipeline,
    data: HeldOut,
) -> Measurement:
    """Consistency of joint pairs by the model's own reading, and which captions are training ones.

    `same_name` is the share of pairs whose picture, captioned again by the same model, gets the
    name of its caption; beside it the same with the caption of the `next_pair`. It says
    that picture and caption agree, not that a person would. `different` is the share of distinct
    captions (without an interval: it depends on how many are drawn, and a resample repeats some),
    `known` of captions that are word for word in the split.

    Args:
        pipeline: Draws pairs.
        data: `limit` pairs, 64 when None; captions that stand in its split count as known.
    """
    count = data.limit or NUM_PAIRS
    draw: Any = pipeline
    read: Any = UnifiedImageToTextPipeline.from_pipe(pipeline)
    read.set_progress_bar_config(disable=True)
    images, captions = [], []
    for rows in data.batches(count):
        generators = data.generators(rows)
        pairs = draw(len(generators), generator=generators)
        images += pairs.images
        captions += pairs.texts
    again = data.texts(read, images)
    names = [name_of_caption(text) for text in captions]
    seen = [name_of_caption(text) for text in again]
    others = [*names[1:], names[0]]
    reader = data.reader(data.split)
    records = (reader.record(index) for index in range(len(reader)))
    known = {normalise_text(text) for record in records for text in record.captions}
    metrics = {
        "same_name": mean_metric(
            [name == other for name, other in zip(names, seen, strict=True)],
            baselines={"next_pair": [a == b for a, b in zip(others, seen, strict=True)]},
            seed=data.seed,
        ),
        "different": Metric(len(set(captions)) / count, None, None, count),
        "known": mean_metric([float(normalise_text(c) in known) for c in captions], seed=data.seed),
    }
    sheet = contact_sheet(images[:NUM_SHOWN], captions[:NUM_SHOWN], columns=6)
    return Measurement(metrics, {"pairs": sheet})
