"""What more steps buy: quality of drawings and captions against the number of steps."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from PIL import Image

from multimodal_dlm.datasets.schema import Sample
from multimodal_dlm.evaluation.baselines import most_frequent
from multimodal_dlm.evaluation.held_out import HeldOut
from multimodal_dlm.evaluation.measurement import (
    Curve,
    Measurement,
    Metric,
    mean_metric,
    register_measure,
)
from multimodal_dlm.evaluation.measures.likelihood import trained_caption
from multimodal_dlm.evaluation.measures.text_to_image import draw_pictures
from multimodal_dlm.evaluation.picture_features import PictureFeatures, hits_of_own, kernel_distance
from multimodal_dlm.evaluation.text_metrics import exact_match, name_of_caption, name_of_sample
from multimodal_dlm.models import efficientnet
from multimodal_dlm.pipelines import UnifiedImageToTextPipeline, UnifiedTextToImagePipeline

STEPS = (1, 2, 4, 8, 16, 32)


@register_measure(
    "steps",
    "UnifiedTextToImagePipeline",
    ["text_to_image", "caption"],
    only_diffusion="a causal model takes one step a token, whatever is asked for",
    weights={efficientnet.PACKAGE: None},
)
def measure_steps(
    pipeline: UnifiedTextToImagePipeline,
    data: HeldOut,
    *,
    steps: Sequence[int] = STEPS,
) -> Measurement:
    """The same rows drawn, and captioned, in 1, 2, 4, ... steps.

    `own_at_5.STEPS` and `kernel_distance.STEPS` of the drawings are those of `text_to_image`
    (EfficientNet-Lite0 features; the distance of few pictures is noisy), `exact.STEPS` the share of
    captions with the exact name; `majority` is the most frequent training name.

    Args:
        pipeline: Draws and reads.
        data: Pictures with captions, at least 2.
        steps: Numbers of steps; 0 or less is an error of the pipeline's.

    Raises:
        DataError: When the split is empty.
        ConfigError: When the weights of EfficientNet-Lite0 are not installed.
    """
    samples = data.samples()
    prompts = [trained_caption(data.source, sample.record) for sample in samples]
    truths = [name_of_sample(sample) for sample in samples]
    images = [Image.fromarray(sample.image) for sample in samples]
    features = PictureFeatures(batch_size=data.batch_size)
    real = features([sample.image for sample in samples])
    read: Any = UnifiedImageToTextPipeline.from_pipe(pipeline)
    read.set_progress_bar_config(disable=True)
    metrics: dict[str, Metric] = {}
    lines: dict[str, list[float]] = {"own_at_5": [], "exact": []}
    reader = data.reader("train")
    known = Counter(name_of_sample(Sample(reader.record(index))) for index in range(len(reader)))
    usual = {}
    if known:
        most = most_frequent(known)
        usual["majority"] = [exact_match(most, truth) for truth in truths]
    chance = min(1.0, 5 / len(samples))
    for count in steps:
        drawn = features(draw_pictures(pipeline, prompts, data, num_inference_steps=count))
        captions = data.texts(read, images, num_inference_steps=count)
        right = [
            float(exact_match(name_of_caption(caption), truth))
            for caption, truth in zip(captions, truths, strict=True)
        ]
        own = hits_of_own(drawn, real, 5)
        found = {
            "own_at_5": mean_metric(own, baselines={"chance": chance}, seed=data.seed),
            "exact": mean_metric(right, baselines=usual, seed=data.seed),
        }
        distance = 1000 * kernel_distance(drawn, real)
        metrics |= {f"{name}.{count}": metric for name, metric in found.items()}
        metrics[f"kernel_distance.{count}"] = Metric(distance, None, None, len(samples))
        for name, metric in found.items():
            lines[name].append(metric.value)
    curve = Curve("steps", "share", [float(count) for count in steps], lines)
    return Measurement(metrics, curves={"quality against steps": curve})
