"""Whether a model that says 80 % is right in 80 % of the cases."""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from multimodal_dlm.evaluation.bootstrap import LEVEL, bootstrap_weights, percentiles
from multimodal_dlm.evaluation.encoding import encode_images
from multimodal_dlm.evaluation.held_out import HeldOut
from multimodal_dlm.evaluation.measurement import (
    NO_SCORE_IN_BLOCKS,
    Curve,
    Measurement,
    Metric,
    mean_metric,
    register_measure,
)
from multimodal_dlm.evaluation.measures.answers import list_questions
from multimodal_dlm.evaluation.text_metrics import exact_match
from multimodal_dlm.pipelines import UnifiedImageToTextPipeline

NUM_BINS = 10
NUM_DRAWS = 8


@register_measure(
    "calibration",
    "UnifiedImageToTextPipeline",
    ["vqa"],
    only_whole_texts=NO_SCORE_IN_BLOCKS,
)
def measure_calibration(
    pipeline: UnifiedImageToTextPipeline,
    data: HeldOut,
    *,
    num_draws: int = NUM_DRAWS,
) -> Measurement:
    """Expected calibration error of the answers (Guo et al. 2017, arXiv 1706.04599, Eq. 3).

    The confidence of an answer is exp(-NELBO) of that answer given picture, question and its
    length: a lower bound of its probability, but for the noise of the masks.

    Intervals draw pictures, not questions. The error is the plug-in estimate, which is biased
    upwards: with few rows a bin's share of right answers is off its confidence by chance alone, and
    resamples carry that too. Compare it only among equal numbers of questions.

    Args:
        pipeline: Answers the questions.
        data: Held-out questions; `limit` counts questions.
        num_draws: Masks of each answer.

    Raises:
        DataError: When the split has no question.
    """
    asked = list_questions(data)
    images, questions = [q.image for q in asked], [q.question for q in asked]
    texts = data.texts(pipeline, images, questions)
    estimates = pipeline.score(
        "vqa",
        codes=encode_images(pipeline, images, data.batch_size),
        text=texts,
        question=questions,
        generator=data.generators(slice(0, len(asked))),
        num_draws=num_draws,
        batch_size=data.batch_size,
    )
    confidence = np.array([min(1.0, math.exp(-estimate.value)) for estimate in estimates])
    pairs = zip(texts, asked, strict=True)
    right = np.array([float(exact_match(text, q.answer)) for text, q in pairs])
    pictures = [q.picture for q in asked]
    low, high = calibration_interval(confidence, right, pictures, seed=data.seed)
    error = calibration_error(confidence, right)
    middles, shares = reliability(confidence, right)
    curve = Curve(
        "confidence", "share of right answers", middles, {"model": shares, "calibrated": middles}
    )
    return Measurement(
        {
            "calibration_error": Metric(error, low, high, len(asked)),
            "confidence": mean_metric(
                confidence.tolist(),
                groups=pictures,
                baselines={"accuracy": float(right.mean())},
                seed=data.seed,
            ),
        },
        curves={"confidence and accuracy": curve},
    )


def calibration_error(
    confidence: Float[np.ndarray, " rows"],
    right: Float[np.ndarray, " rows"],
    weights: Float[np.ndarray, " rows"] | None = None,
) -> float:
    """Mean over ten bins of |accuracy - mean confidence|, bins weighted by their rows.

    Args:
        confidence: In [0, 1].
        right: 1 for a right answer, 0 for a wrong one.
        weights: Rows of a resample; None for one each.
    """
    weights = np.ones(len(confidence)) if weights is None else weights
    gaps = np.bincount(_bins(confidence), weights=weights * (right - confidence))
    return float(np.abs(gaps).sum() / weights.sum())


def calibration_interval(
    confidence: Float[np.ndarray, " rows"],
    right: Float[np.ndarray, " rows"],
    pictures: Sequence[int],
    *,
    seed: int = 0,
) -> tuple[float, float]:
    """95 % interval of `calibration_error`; the questions about a picture are drawn together.

    Args:
        confidence: In [0, 1].
        right: 1 for a right answer, 0 for a wrong one.
        pictures: Picture of each row.
        seed: Of the resamples.
    """
    found, unit = np.unique(pictures, return_inverse=True)
    weights = bootstrap_weights(len(found), seed=seed)[:, unit]
    drawn = np.array([calibration_error(confidence, right, row) for row in weights])
    return percentiles(drawn, LEVEL)


def reliability(
    confidence: Float[np.ndarray, " rows"], right: Float[np.ndarray, " rows"]
) -> tuple[Sequence[float], Sequence[float]]:
    """Mean confidence and share of right answers of each bin that has rows."""
    bins = _bins(confidence)
    filled = [number for number in range(NUM_BINS) if (bins == number).any()]
    middles = [round(float(confidence[bins == number].mean()), 4) for number in filled]
    shares = [round(float(right[bins == number].mean()), 4) for number in filled]
    return middles, shares


def _bins(confidence: Float[np.ndarray, " rows"]) -> np.ndarray:
    return np.minimum((confidence * NUM_BINS).astype(int), NUM_BINS - 1)
