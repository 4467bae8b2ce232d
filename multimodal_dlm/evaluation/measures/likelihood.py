"""Likelihood of a pipeline on held-out samples, and how well it tells matched pairs from others."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from multimodal_dlm.datasets.manifest import Source
from multimodal_dlm.datasets.schema import Record
from multimodal_dlm.errors import DataError
from multimodal_dlm.evaluation.bootstrap import LEVEL, bootstrap_weights, percentiles
from multimodal_dlm.evaluation.encoding import encode_images
from multimodal_dlm.evaluation.held_out import HeldOut
from multimodal_dlm.evaluation.measurement import (
    NO_SCORE_IN_BLOCKS,
    Measurement,
    Metric,
    mean_metric,
    register_measure,
)
from multimodal_dlm.evaluation.text_metrics import name_of_sample
from multimodal_dlm.pipelines.pipeline_base import UnifiedPipeline
from multimodal_dlm.tasks import TASKS

NUM_DRAWS = 16


@register_measure(
    "likelihood",
    "UnifiedImageToTextPipeline",
    ["caption"],
    ["unconditional_text"],
    ["text_to_image"],
    only_whole_texts=NO_SCORE_IN_BLOCKS,
)
def measure_likelihood(
    pipeline: UnifiedPipeline,
    data: HeldOut,
    *,
    num_draws: int = NUM_DRAWS,
    tasks: Sequence[str] = TASKS,
) -> Measurement:
    """Nats a row of text given picture, picture given text and both; AUC of matched pairs.

    Texts are scored given their length, and are the captions the model was trained to write: of a
    record's captions the one with the largest weight for captioning. Each picture is paired with
    its own caption and with that of another picture of another name. A pair's score is NELBO(text)
    - NELBO(text | picture), an estimate of what the picture says about the text; `auc` is the
    probability that a matched pair scores above a mismatched one, 0.5 by chance. Causal models give
    exact likelihoods, of texts with their end: their texts are not comparable with bounds given the
    length, their pictures are. What the model was not trained for is left out.

    Args:
        pipeline: Any pipeline of this package.
        data: Pictures with captions; `batch_size` counts masks.
        num_draws: Masks per row and estimate.
        tasks: What the model was trained for.

    Raises:
        DataError: When the split has fewer than two pictures of different names.
    """
    samples = data.samples()
    names = [name_of_sample(sample) for sample in samples]
    others = mismatched(names, data.seed)
    codes = encode_images(pipeline, [sample.image for sample in samples], data.batch_size)
    texts = [trained_caption(data.source, sample.record) for sample in samples]
    options: dict[str, Any] = {"num_draws": num_draws, "batch_size": data.batch_size}

    def score(task: str, **given: Any) -> list[float]:
        # The same masks for the same row: pairs differ by their picture and text alone.
        generators = data.generators(slice(0, len(samples)))
        estimates = pipeline.score(task, generator=generators, **options, **given)
        return [estimate.value for estimate in estimates]

    seed, metrics = data.seed, dict[str, Metric]()
    foreign = [texts[other] for other in others]
    alone = matched = pictures = None
    if "unconditional_text" in tasks:
        alone = score("unconditional_text", codes=codes, text=texts)
    if "text_to_image" in tasks:
        pictures = score("text_to_image", codes=codes, text=texts)
    if "caption" in tasks:
        matched = score("caption", codes=codes, text=texts)
        unmatched = score("caption", codes=codes, text=foreign)
        if alone is not None:
            alone_foreign = score("unconditional_text", codes=codes, text=foreign)
            gains = _differences(alone, matched), _differences(alone_foreign, unmatched)
            metrics["auc"] = area_metric(*gains, baselines={"chance": 0.5}, seed=seed)
        plain = [-value for value in matched], [-value for value in unmatched]
        metrics["auc_text_alone"] = area_metric(*plain, baselines={"chance": 0.5}, seed=seed)
        metrics["text_given_image_nats"] = mean_metric(
            matched, baselines={"without_image": alone} if alone is not None else {}, seed=seed
        )
    if alone is not None:
        metrics["text_nats"] = mean_metric(alone, seed=seed)
    if pictures is not None:
        metrics["image_given_text_nats"] = mean_metric(pictures, seed=seed)
    if alone is not None and pictures is not None:
        joint = [own + picture for own, picture in zip(alone, pictures, strict=True)]
        metrics["joint_nats"] = mean_metric(joint, seed=seed)
    return Measurement(metrics)


def trained_caption(source: Source, record: Record) -> str:
    """The caption of a record with the largest weight for captioning, the first among equals."""
    weights = source.caption_weights.get("caption", ())
    pairs = list(zip(weights, record.captions, strict=False))
    return max(pairs, key=lambda pair: pair[0])[1] if pairs else record.captions[0]


def area_metric(
    positives: Sequence[float],
    negatives: Sequence[float],
    *,
    baselines: Mapping[str, float] | None = None,
    seed: int = 0,
) -> Metric:
    """Area under the curve with the bootstrap interval of its pairs.

    Args:
        positives: Score of each row's matched pair.
        negatives: Score of each row's mismatched pair.
        baselines: Name -> number.
        seed: Of the bootstrap.
    """
    above = _above(positives, negatives)
    weights = bootstrap_weights(len(positives), seed=seed)
    drawn = np.einsum("bi,ij,bj->b", weights, above, weights, optimize=True) / len(positives) ** 2
    low, high = percentiles(drawn, LEVEL)
    return Metric(float(above.mean()), low, high, len(positives), baselines or {})


def mismatched(names: Sequence[str], seed: int) -> list[int]:
    """For each row another row of another name, drawn evenly.

    Args:
        names: Name of each row.
        seed: Of the draw.

    Raises:
        DataError: When a row has no partner of another name.
    """
    rng = np.random.default_rng(seed)
    chosen = []
    for row, name in enumerate(names):
        partners = [other for other, found in enumerate(names) if found != name]
        if not partners:
            raise DataError(
                f"Mismatched pairs need pictures of at least two names; row {row} has no partner"
                f" among {len(names)} rows. Score more pictures."
            )
        chosen.append(int(rng.choice(partners)))
    return chosen


def area_under_curve(positives: Sequence[float], negatives: Sequence[float]) -> float:
    """Probability that a positive scores above a negative, ties counting half.

    Args:
        positives: Scores, at least 1.
        negatives: Scores, at least 1.
    """
    return float(_above(positives, negatives).mean())


def _above(
    positives: Sequence[float], negatives: Sequence[float]
) -> Float[np.ndarray, "positives negatives"]:
    """1 where a positive scores above a negative, 0.5 where they tie."""
    difference = np.asarray(positives)[:, None] - np.asarray(negatives)[None, :]
    return (difference > 0) + 0.5 * (difference == 0)


def _differences(first: Sequence[float], second: Sequence[float]) -> list[float]:
    return [a - b for a, b in zip(first, second, strict=True)]
