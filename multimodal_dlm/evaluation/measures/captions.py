"""Captions of held-out pictures, beside the names of the nearest training pictures."""

from collections import Counter
from collections.abc import Mapping, Sequence

from PIL import Image

from multimodal_dlm.evaluation.baselines import NearestPictures, pixel_features
from multimodal_dlm.evaluation.held_out import HeldOut
from multimodal_dlm.evaluation.measurement import (
    Measurement,
    Metric,
    mean_metric,
    register_measure,
)
from multimodal_dlm.evaluation.sheets import contact_sheet
from multimodal_dlm.evaluation.text_metrics import (
    cider_d,
    exact_match,
    name_of_caption,
    name_of_sample,
    references_of_sample,
)
from multimodal_dlm.models import minilm
from multimodal_dlm.pipelines import UnifiedImageToTextPipeline

NUM_SHOWN = 18


@register_measure(
    "captions", "UnifiedImageToTextPipeline", ["caption"], weights={minilm.PACKAGE: "meaning"}
)
def measure_captions(
    pipeline: UnifiedImageToTextPipeline,
    data: HeldOut,
    *,
    meaning: bool = False,
) -> Measurement:
    """How well captions name what the picture shows.

    `exact`: share of captions with the exact name. `cider`: CIDEr-D of that name, 0 to 10, the
    true name and the tags the references; `truth` is what the true name itself gets. `cosine`: of
    the MiniLM embeddings of the name and the true name, which gives credit to synonyms;
    `other_name` is that of the next picture's true name. Baselines: the name of the
    `nearest_neighbour` among the training pictures (cosine of pictures reduced to 16 x 16 pixels)
    and the most frequent training name, `majority`.

    Args:
        pipeline: Describes the pictures.
        data: Pictures whose truth is the record's concept, else the name in its first caption.
        meaning: Also take `cosine`.

    Raises:
        DataError: When the split is empty.
        ConfigError: When `meaning` is asked for and MiniLM is not installed.
    """
    samples = data.samples()
    images = [Image.fromarray(sample.image) for sample in samples]
    truths = [name_of_sample(sample) for sample in samples]
    captions = data.texts(pipeline, images)
    names = {"model": [name_of_caption(caption) for caption in captions]}
    train = list(data.reader("train"))
    if train:
        labels = [name_of_sample(sample) for sample in train]
        nearest = NearestPictures(pixel_features([sample.image for sample in train]), labels)
        names["nearest_neighbour"] = nearest.nearest(pixel_features([s.image for s in samples]))
        most = min(Counter(labels).items(), key=lambda item: (-item[1], item[0]))[0]
        names["majority"] = [most] * len(truths)
    references = [references_of_sample(sample) for sample in samples]
    metrics = {
        "exact": _metric({who: _right(said, truths) for who, said in names.items()}, data.seed),
        "cider": _metric(
            {who: cider_d(said, references) for who, said in {**names, "truth": truths}.items()},
            data.seed,
        ),
    }
    if meaning:
        others = [*truths[1:], truths[0]]
        said = {**names, "other_name": others}
        metrics["cosine"] = _metric(meaning_cosines(said, truths), data.seed)
    shown = slice(0, NUM_SHOWN)
    sheet = contact_sheet(
        images[shown],
        [
            f"{text} (true: {truth})"
            for text, truth in zip(captions[shown], truths[shown], strict=True)
        ],
        columns=6,
    )
    return Measurement(metrics, {"captions": sheet})


def meaning_cosines(
    said: Mapping[str, Sequence[str]], truths: Sequence[str]
) -> dict[str, list[float]]:
    """MiniLM cosine of what each speaker says with the truth, row by row.

    Args:
        said: Speaker -> one text a row.
        truths: One text a row.

    Raises:
        ConfigError: When MiniLM is not installed.
    """
    embed = minilm.TextEmbedder()
    own = embed(list(truths))
    return {who: (embed(list(texts)) * own).sum(dim=1).tolist() for who, texts in said.items()}


def _metric(rows: Mapping[str, Sequence[float]], seed: int) -> Metric:
    """The model's mean beside that of everybody else."""
    baselines = {who: values for who, values in rows.items() if who != "model"}
    return mean_metric(rows["model"], baselines=baselines, seed=seed)


def _right(names: Sequence[str], truths: Sequence[str]) -> list[float]:
    return [float(exact_match(name, truth)) for name, truth in zip(names, truths, strict=True)]
