"""Captions of held-out pictures, beside the names of the nearest training pictures."""

from collections import Counter

from PIL import Image

from multimodal_dlm.evaluation.baselines import NearestPictures, pixel_features
from multimodal_dlm.evaluation.held_out import HeldOut
from multimodal_dlm.evaluation.measurement import Measurement, mean_metric, register_measure
from multimodal_dlm.evaluation.sheets import contact_sheet
from multimodal_dlm.evaluation.text_metrics import exact_match, name_of_caption, name_of_sample
from multimodal_dlm.pipelines import UnifiedImageToTextPipeline

NUM_SHOWN = 18


@register_measure("captions", "UnifiedImageToTextPipeline")
def measure_captions(
    pipeline: UnifiedImageToTextPipeline,
    data: HeldOut,
) -> Measurement:
    """Share of captions with the exact name of what the picture shows.

    Baselines: the name of the `nearest_neighbour` among the training pictures (cosine of pictures
    reduced to 16 x 16 pixels) and the most frequent training name, `majority`.

    Args:
        pipeline: Describes the pictures.
        data: Pictures whose truth is the record's concept, else the name in its first caption.

    Raises:
        DataError: When the split is empty.
    """
    samples = data.samples()
    images = [Image.fromarray(sample.image) for sample in samples]
    truths = [name_of_sample(sample) for sample in samples]
    captions = data.texts(pipeline, images)
    right = _right([name_of_caption(caption) for caption in captions], truths)
    baselines = {}
    train = list(data.reader("train"))
    if train:
        labels = [name_of_sample(sample) for sample in train]
        nearest = NearestPictures(pixel_features([sample.image for sample in train]), labels)
        found = nearest.nearest(pixel_features([sample.image for sample in samples]))
        most = min(Counter(labels).items(), key=lambda item: (-item[1], item[0]))[0]
        baselines["nearest_neighbour"] = _right(found, truths)
        baselines["majority"] = _right([most] * len(truths), truths)
    shown = slice(0, NUM_SHOWN)
    sheet = contact_sheet(
        images[shown],
        [
            f"{text} (true: {truth})"
            for text, truth in zip(captions[shown], truths[shown], strict=True)
        ],
        columns=6,
    )
    return Measurement(
        {"exact": mean_metric(right, baselines=baselines, seed=data.seed)}, {"captions": sheet}
    )


def _right(names: list[str], truths: list[str]) -> list[float]:
    return [float(exact_match(name, truth)) for name, truth in zip(names, truths, strict=True)]
