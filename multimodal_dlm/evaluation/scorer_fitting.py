"""Fits an image-text scorer to the named pictures of a dataset, and says how good it is."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from multimodal_dlm.datasets.manifest import Source
from multimodal_dlm.datasets.reading import ShardReader
from multimodal_dlm.datasets.schema import Sample
from multimodal_dlm.errors import DataError
from multimodal_dlm.evaluation.measures.likelihood import area_under_curve, mismatched
from multimodal_dlm.evaluation.picture_features import PictureFeatures
from multimodal_dlm.evaluation.scorer import (
    ImageTextScorer,
    ScorerConfig,
    fit_scorer,
    held_out_pair,
    name_ranks,
)
from multimodal_dlm.evaluation.text_metrics import name_of_sample
from multimodal_dlm.models.minilm import TextEmbedder

HELD_OUT_SHARE = 0.1


@dataclass(frozen=True)
class FittedScorer:
    """A scorer and its accuracy on pictures that it was not fitted to.

    Args:
        scorer: The heads.
        accuracy: Set of pictures -> `pictures`, `name_at_1`, `name_at_5`, `auc` among all names.
        num_names: Names.
        num_pictures: Pictures fitted to.
    """

    scorer: ImageTextScorer
    accuracy: Mapping[str, Mapping[str, float]]
    num_names: int
    num_pictures: int


def fit_to_source(
    source: Source,
    *,
    judged_split: str,
    limit: int | None = None,
    config: ScorerConfig | None = None,
    seed: int = 0,
    progress: Callable[[str], None] = lambda text: None,
    **options: Any,
) -> FittedScorer:
    """Fit to the training split but for one in ten (concept, artist) pairs, and measure on those.

    Names are known, pictures are held out: all pictures of a pair go together. The pictures of
    `judged_split` are never fitted to.

    Args:
        source: Pictures with names, and an artist in their meta.
        judged_split: Split whose pictures the scorer is to judge.
        limit: Training pictures at most.
        config: Sizes.
        seed: Of weights and batches.
        progress: Told what is done.
        options: Further arguments of `fit_scorer`.

    Raises:
        DataError: When a split is empty, or nothing was held out.
    """
    names: dict[str, list[str]] = {}
    features: dict[str, Tensor] = {}
    is_held: dict[str, Tensor] = {}
    extract = PictureFeatures()
    for split, count in (("train", limit), (judged_split, None)):
        samples = _first(source, split, count)
        progress(f"features of {len(samples)} pictures of `{split}`")
        features[split] = extract([sample.image for sample in samples])
        names[split] = [name_of_sample(sample) for sample in samples]
        is_held[split] = torch.tensor([is_held_out(sample) for sample in samples])
    held = is_held["train"]
    if not bool(held.any()) or bool(held.all()):
        raise DataError(f"`{source.name}` has too few pictures to hold some out. Give more.")
    listed = sorted({name for some in names.values() for name in some})
    places = {name: place for place, name in enumerate(listed)}
    embeddings = TextEmbedder()(listed)
    labels = torch.tensor([places[name] for name in names["train"]])
    progress(f"fitting to {int((~held).sum())} pictures of {len(listed)} names")
    scorer = fit_scorer(
        features["train"][~held], labels[~held], embeddings, config=config, seed=seed, **options
    )
    own = [places[name] for name in names[judged_split]]
    accuracy = {
        "held_out": _accuracy(scorer, features["train"][held], labels[held].tolist(), embeddings),
        judged_split: _accuracy(scorer, features[judged_split], own, embeddings),
    }
    return FittedScorer(scorer, accuracy, len(listed), int((~held).sum()))


def is_held_out(sample: Sample) -> bool:
    """Whether `fit_to_source` keeps a picture of the training split out of the fit."""
    artist = str(sample.record.meta.get("artist"))
    return held_out_pair(name_of_sample(sample), artist, HELD_OUT_SHARE)


def _first(source: Source, split: str, limit: int | None) -> list[Sample]:
    reader = ShardReader(source.splits.get(split, ()), source=source.name)
    count = len(reader) if limit is None else min(limit, len(reader))
    if not count:
        raise DataError(f"`{source.name}` has no picture in split `{split}`.")
    return [reader[place * len(reader) // count] for place in range(count)]


def _accuracy(
    scorer: ImageTextScorer, features: Tensor, own: Sequence[int], embeddings: Tensor
) -> dict[str, float]:
    scores = scorer.score(features, embeddings)
    ranks, rows = name_ranks(scores, own), torch.arange(len(own))
    foreign = [own[row] for row in mismatched([str(place) for place in own], 0)]
    area = area_under_curve(scores[rows, list(own)].tolist(), scores[rows, foreign].tolist())
    return {
        "pictures": len(own),
        "name_at_1": round(float((ranks <= 1).float().mean()), 4),
        "name_at_5": round(float((ranks <= 5).float().mean()), 4),
        "chance_at_1": round(1 / len(embeddings), 5),
        "chance_at_5": round(min(1.0, 5 / len(embeddings)), 5),
        "auc": round(area, 4),
    }
