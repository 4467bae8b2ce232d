"""Captions and answers of a pipeline on held-out samples, beside baselines."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from PIL import Image

from multimodal_dlm.datasets.manifest import Source
from multimodal_dlm.datasets.reading import ShardReader, first_samples, iterate_samples
from multimodal_dlm.datasets.schema import Record, Sample
from multimodal_dlm.errors import DataError
from multimodal_dlm.evaluation.baselines import BlindAnswers, NearestPictures, pixel_features
from multimodal_dlm.evaluation.text_metrics import Accuracy, exact_match, name_of_caption
from multimodal_dlm.pipelines import UnifiedImageToTextPipeline


@dataclass(frozen=True)
class Question:
    """One question about one picture.

    Args:
        image: The picture.
        question: Its question.
        answer: The true answer.
        kind: Kind of question.
    """

    image: Image.Image
    question: str
    answer: str
    kind: str


def evaluate_answers(
    pipeline: UnifiedImageToTextPipeline,
    source: Source,
    *,
    split: str,
    limit: int | None = None,
    batch_size: int = 64,
) -> dict[str, Any]:
    """Exact match of the answers to the questions of a split, beside the blind baseline.

    Args:
        pipeline: Answers the questions.
        source: Dataset with questions.
        split: Held-out split.
        limit: Questions at most.
        batch_size: Questions at once.

    Raises:
        DataError: When the split has no question.
    """
    questions = list(islice(_questions(iterate_samples(source, split)), limit))
    if not questions:
        raise DataError(f"`{source.name}` has no question in split `{split}`.")
    blind = _blind(source)
    model, baseline = Accuracy(), Accuracy()
    answer: Any = pipeline
    start = time.perf_counter()
    for first in range(0, len(questions), batch_size):
        part = questions[first : first + batch_size]
        texts = answer([q.image for q in part], [q.question for q in part]).texts
        for asked, text in zip(part, texts, strict=True):
            model.add(asked.kind, exact_match(text, asked.answer))
            if blind is not None:
                baseline.add(asked.kind, exact_match(blind.answer(asked.question), asked.answer))
    result: dict[str, Any] = {"model": model.to_dict()}
    if blind is not None:
        result["blind"] = baseline.to_dict()
    result["seconds"] = round(time.perf_counter() - start, 1)
    return result


def evaluate_captions(
    pipeline: UnifiedImageToTextPipeline,
    source: Source,
    *,
    split: str,
    limit: int | None = None,
    batch_size: int = 64,
    with_neighbours: bool = True,
) -> dict[str, Any]:
    """Exact name in the captions of a split, beside the name of the nearest training picture.

    Args:
        pipeline: Describes the pictures.
        source: Dataset with captions; the truth is the name in the first one.
        split: Held-out split.
        limit: Pictures at most.
        batch_size: Pictures at once.
        with_neighbours: Also measure the nearest-neighbour baseline on pixels.

    Raises:
        DataError: When the split is empty.
    """
    samples = first_samples(source, split, limit)
    truths = [name_of_sample(sample) for sample in samples]
    describe: Any = pipeline
    start = time.perf_counter()
    captions: list[str] = []
    for first in range(0, len(samples), batch_size):
        part = samples[first : first + batch_size]
        captions += describe([Image.fromarray(sample.image) for sample in part]).texts
    seconds = time.perf_counter() - start
    result: dict[str, Any] = {"model": _names_accuracy(map(name_of_caption, captions), truths)}
    if with_neighbours and source.count("train"):
        train = list(iterate_samples(source, "train"))
        labels = [name_of_sample(sample) for sample in train]
        nearest = NearestPictures(pixel_features([sample.image for sample in train]), labels)
        found = nearest.nearest(pixel_features([sample.image for sample in samples]))
        result["nearest_neighbour_pixels"] = _names_accuracy(found, truths)
    result["seconds"] = round(seconds, 1)
    return result


def evaluate_lengths(
    pipeline: UnifiedImageToTextPipeline,
    source: Source,
    *,
    split: str,
    limit: int | None = None,
    batch_size: int = 64,
    lengths: Sequence[int] = (8, 16, 24),
) -> dict[str, Any]:
    """Share of pictures whose greedy caption does not depend on `gen_length`.

    A caption of n tokens needs n + 1 positions, so each length is compared with the longest one
    over the pictures whose longest-window caption fits in it.

    Args:
        pipeline: Describes the pictures, greedily.
        source: Dataset with pictures.
        split: Split to measure.
        limit: Pictures at most.
        batch_size: Pictures at once.
        lengths: Values of `gen_length`; those beyond the model's text window are cut to it.

    Raises:
        DataError: When the split is empty.
    """
    samples = first_samples(source, split, limit)
    images = [Image.fromarray(sample.image) for sample in samples]
    describe: Any = pipeline
    start = time.perf_counter()
    limit_tokens = pipeline.processor.layout["max_window"]["text"]
    lengths = sorted({min(length, limit_tokens) for length in lengths})
    texts: dict[int, list[str]] = {}
    for length in lengths:
        texts[length] = []
        for first in range(0, len(images), batch_size):
            part = images[first : first + batch_size]
            texts[length] += describe(part, gen_length=length).texts
    longest = texts[lengths[-1]]
    sizes = [len(pipeline.processor.encode_text(text)) + 1 for text in longest]
    result: dict[str, Any] = {}
    agreeing = Accuracy()
    for length in lengths:
        rows = [
            (f"gen_length {length}", text == whole)
            for text, whole, size in zip(texts[length], longest, sizes, strict=True)
            if size <= length
        ]
        agreeing.extend(rows)
    fitting = [
        all(texts[length][i] == longest[i] for length in lengths)
        for i, size in enumerate(sizes)
        if size <= lengths[0]
    ]
    result["same_as_longest"] = agreeing.to_dict()
    result["same_at_all"] = Accuracy().extend(("fits all", same) for same in fitting).to_dict()
    result["seconds"] = round(time.perf_counter() - start, 1)
    return result


def name_of_sample(sample: Sample) -> str:
    """The true name: the concept in the record's meta, else the name in its first caption."""
    concept = sample.record.meta.get("concept")
    return name_of_caption(concept if isinstance(concept, str) else sample.record.captions[0])


def _names_accuracy(found: Iterable[str], truths: Sequence[str]) -> dict[str, Any]:
    rows = zip(found, truths, strict=True)
    return Accuracy().extend(("name", exact_match(name, truth)) for name, truth in rows).to_dict()


def _questions(samples: Iterable[Sample]) -> Iterable[Question]:
    for sample in samples:
        if not sample.record.qa:
            continue
        image = Image.fromarray(sample.image)
        for pair in sample.record.qa:
            yield Question(image, pair.question, pair.answer, pair.type)


def _records(source: Source, split: str) -> Iterable[Record]:
    """The records of a split, pictures left alone."""
    reader = ShardReader(source.splits[split], source=source.name)
    return (reader.record(index) for index in range(len(reader)))


def _blind(source: Source) -> BlindAnswers | None:
    """The blind baseline of the training questions; None when the dataset has none."""
    if not source.count("train"):
        return None
    pairs = [
        (pair.question, pair.answer) for record in _records(source, "train") for pair in record.qa
    ]
    return BlindAnswers(pairs) if pairs else None
