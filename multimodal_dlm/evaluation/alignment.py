"""What the image-text scorer says of drawn pictures, beside real ones and their nearest copies."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from multimodal_dlm.evaluation.measurement import Metric, mean_metric
from multimodal_dlm.evaluation.measures.likelihood import area_metric, area_under_curve, mismatched
from multimodal_dlm.evaluation.scorer import ImageTextScorer, name_ranks
from multimodal_dlm.models.minilm import TextEmbedder

COUNTS = (1, 5)


def alignment_metrics(
    features: Mapping[str, Tensor],
    names: Sequence[str],
    candidates: Sequence[str],
    scorer: str | Path,
    *,
    seed: int = 0,
) -> dict[str, Metric]:
    """`name_at_1`, `name_at_5` and `alignment_auc` of drawn pictures by the scorer.

    `name_at_k`: the true name is among the k best of all candidates (R@k); chance is k by their
    number. `alignment_auc`: a picture's own name scores above another picture's. Every baseline is
    another set of pictures of the same names. None is a ceiling: the scorer names the pictures that
    it was fitted to, and drawings that copy them, better than real ones that are new to it.

    Args:
        features: Whose pictures -> `PictureFeatures` of one picture a name; `model` is measured.
        names: True name of each picture.
        candidates: Names to choose among; the true ones are added.
        scorer: Folder of the scorer.
        seed: Of the bootstrap and of the foreign names.
    """
    judge, embed = ImageTextScorer.load(scorer), TextEmbedder()
    listed = sorted({*candidates, *names})
    places = {name: place for place, name in enumerate(listed)}
    own = [places[name] for name in names]
    foreign = [own[row] for row in mismatched(names, seed)]
    texts = embed(listed)
    scores = {who: judge.score(given, texts) for who, given in features.items()}
    ranks = {who: name_ranks(given, own) for who, given in scores.items()}
    metrics = {}
    for count in COUNTS:
        hits = {who: (rank <= count).float().tolist() for who, rank in ranks.items()}
        baselines = {who: values for who, values in hits.items() if who != "model"}
        metrics[f"name_at_{count}"] = mean_metric(
            hits["model"],
            baselines={**baselines, "chance": min(1.0, count / len(listed))},
            seed=seed,
        )
    rows = torch.arange(len(names))
    pairs = {
        who: (given[rows, own].tolist(), given[rows, foreign].tolist())
        for who, given in scores.items()
    }
    areas = {who: area_under_curve(*pair) for who, pair in pairs.items() if who != "model"}
    metrics["alignment_auc"] = area_metric(
        *pairs["model"], baselines={**areas, "chance": 0.5}, seed=seed
    )
    return metrics
