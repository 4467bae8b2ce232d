"""Likelihood of a pipeline on held-out samples, and how well it tells matched pairs from others."""

import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from multimodal_dlm.datasets.manifest import Source
from multimodal_dlm.datasets.reading import first_samples
from multimodal_dlm.diffusion.likelihood import LikelihoodEstimate, mean_estimate
from multimodal_dlm.errors import DataError
from multimodal_dlm.evaluation.understanding import name_of_sample
from multimodal_dlm.pipelines.pipeline_base import UnifiedPipeline
from multimodal_dlm.pipelines.pixels import to_pixels
from multimodal_dlm.processing import Codes

NUM_DRAWS = 16


def evaluate_likelihood(
    pipeline: UnifiedPipeline,
    source: Source,
    *,
    split: str,
    limit: int | None = None,
    batch_size: int = 64,
    num_draws: int = NUM_DRAWS,
    seed: int = 0,
) -> dict[str, Any]:
    """Nats a row of text given picture, picture given text and both; AUC of matched pairs.

    Texts are scored given their length. Each picture is paired with its own first caption and with
    that of another picture of another name. A pair's score is NELBO(text) - NELBO(text | picture),
    an estimate of what the picture says about the text; the AUC is the probability that a matched
    pair scores above a mismatched one, 0.5 by chance.

    Args:
        pipeline: Any pipeline of this package.
        source: Dataset with pictures and captions.
        split: Held-out split.
        limit: Pictures at most.
        batch_size: Masks at once.
        num_draws: Masks per row and estimate.
        seed: Of the masks and the mismatched pairs.

    Raises:
        DataError: When the split has fewer than two pictures of different names.
    """
    samples = first_samples(source, split, limit)
    names = [name_of_sample(sample) for sample in samples]
    others = mismatched(names, seed)
    start = time.perf_counter()
    codes = encode_images(pipeline, [sample.image for sample in samples], batch_size)
    texts = [sample.record.captions[0] for sample in samples]
    options: dict[str, Any] = {"num_draws": num_draws, "batch_size": batch_size}

    def score(task: str, **given: Any) -> list[LikelihoodEstimate]:
        # The same masks for the same row: pairs differ by their picture and text alone.
        rows = [torch.Generator().manual_seed(seed + row) for row in range(len(samples))]
        return pipeline.score(task, generator=rows, **options, **given)

    matched = score("caption", codes=codes, text=texts)
    foreign = [texts[other] for other in others]
    mismatched_pairs = score("caption", codes=codes, text=foreign)
    alone = score("unconditional_text", codes=codes, text=texts)
    alone_foreign = score("unconditional_text", codes=codes, text=foreign)
    pictures = score("text_to_image", codes=codes, text=texts)
    joint = [own.chain(picture) for own, picture in zip(alone, pictures, strict=True)]
    gains = _differences(alone, matched), _differences(alone_foreign, mismatched_pairs)
    return {
        "text_given_image": _nats(matched),
        "text": _nats(alone),
        "image_given_text": _nats(pictures),
        "joint_text_then_image": _nats(joint),
        "auc": round(area_under_curve(*gains), 4),
        "auc_text_nelbo_alone": round(
            area_under_curve(_negated(matched), _negated(mismatched_pairs)), 4
        ),
        "pairs": len(samples),
        "num_draws": num_draws,
        "seconds": round(time.perf_counter() - start, 1),
    }


def encode_images(pipeline: UnifiedPipeline, images: Sequence[Any], batch_size: int) -> Codes:
    """Codes of pictures, encoded `batch_size` at a time, on the CPU.

    Args:
        pipeline: Gives the image tokenizer.
        images: Anything `to_pixels` takes in a list.
        batch_size: Pictures at once.
    """
    tokenizer = pipeline.image_tokenizer
    parts = []
    for first in range(0, len(images), batch_size):
        part = list(images[first : first + batch_size])
        pixels = to_pixels(part, tokenizer.config["image_size"]).to(pipeline.device)
        parts.append([level.cpu() for level in tokenizer.encode(pixels)])
    return tuple(torch.cat(level) for level in zip(*parts, strict=True))


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
    above = np.asarray(positives)[:, None] - np.asarray(negatives)[None, :]
    return float(((above > 0) + 0.5 * (above == 0)).mean())


def _differences(
    first: Sequence[LikelihoodEstimate], second: Sequence[LikelihoodEstimate]
) -> list[float]:
    return [a.value - b.value for a, b in zip(first, second, strict=True)]


def _negated(estimates: Sequence[LikelihoodEstimate]) -> list[float]:
    return [-estimate.value for estimate in estimates]


def _nats(estimates: Sequence[LikelihoodEstimate]) -> dict[str, float]:
    """Mean over rows with its 95 % interval over rows and masks."""
    mean = mean_estimate(estimates)
    values = {"nats": mean.value, "low": mean.low, "high": mean.high}
    return {name: round(value, 4) for name, value in values.items() if not math.isnan(value)}
