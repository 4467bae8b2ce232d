"""Answers to the questions of held-out pictures, beside answering without looking."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from PIL import Image

from multimodal_dlm.datasets.reading import iterate_samples
from multimodal_dlm.errors import DataError
from multimodal_dlm.evaluation.baselines import BlindAnswers
from multimodal_dlm.evaluation.held_out import HeldOut
from multimodal_dlm.evaluation.measurement import (
    Measurement,
    Metric,
    Table,
    mean_metric,
    register_measure,
)
from multimodal_dlm.evaluation.sheets import contact_sheet
from multimodal_dlm.evaluation.text_metrics import exact_match, normalise_text
from multimodal_dlm.pipelines import UnifiedImageToTextPipeline

MAX_ANSWERS = 12  # A table of more different answers is not drawn.
NUM_SHOWN = 12


@dataclass(frozen=True)
class Question:
    """One question about one picture.

    Args:
        image: The picture.
        picture: Its number.
        question: The question.
        answer: The true answer.
        kind: Type of the question.
    """

    image: Image.Image
    picture: int
    question: str
    answer: str
    kind: str


@register_measure("answers", "UnifiedImageToTextPipeline", ["vqa"])
def measure_answers(
    pipeline: UnifiedImageToTextPipeline,
    data: HeldOut,
) -> Measurement:
    """Exact match of the answers, in all and by question type.

    Intervals draw pictures, not questions. Baselines: `blind` is the most frequent training answer
    to the same question, or to its type where training never asked it; `majority` the most frequent
    of all for `accuracy`, and the most frequent of that type for `accuracy.TYPE`.

    Args:
        pipeline: Answers the questions.
        data: Held-out questions; `limit` counts questions.

    Raises:
        DataError: When the split has no question.
    """
    asked = list_questions(data)
    texts = data.texts(pipeline, [q.image for q in asked], [q.question for q in asked])
    right = [exact_match(text, q.answer) for text, q in zip(texts, asked, strict=True)]
    blind = _blind(data)
    kinds = sorted({q.kind for q in asked})
    metrics = {"accuracy": _accuracy(asked, right, blind, None, data.seed)}
    for kind in kinds:
        metrics[f"accuracy.{kind}"] = _accuracy(asked, right, blind, kind, data.seed)
    tables = {}
    for kind in kinds:
        rows = [(q, t) for q, t in zip(asked, texts, strict=True) if q.kind == kind]
        table = confusion([q.answer for q, _ in rows], [text for _, text in rows])
        if table is not None:
            tables[f"answers of type {kind}"] = table
    captions = [
        f"{q.question} {text}" + ("" if is_right else f" (true: {q.answer})")
        for q, text, is_right in zip(asked, texts, right, strict=True)
    ]
    shown = _spread(len(asked), NUM_SHOWN)
    sheet = contact_sheet([asked[i].image for i in shown], [captions[i] for i in shown], columns=6)
    return Measurement(metrics, {"questions and answers": sheet}, tables)


def confusion(truths: Sequence[str], predictions: Sequence[str]) -> Table | None:
    """True answers against given ones; None when there are too many to draw.

    Args:
        truths: True answers.
        predictions: Given answers; those that are nobody's true answer are `other`.
    """
    rows = sorted({normalise_text(truth) for truth in truths})
    if len(rows) > MAX_ANSWERS:
        return None
    given = [normalise_text(text) for text in predictions]
    given = [text if text in rows else "other" for text in given]
    columns = [*rows, "other"] if "other" in given and "other" not in rows else rows
    counts = Counter(zip(map(normalise_text, truths), given, strict=True))
    return Table(rows, columns, [[counts[row, column] for column in columns] for row in rows])


def _accuracy(
    asked: Sequence[Question],
    right: Sequence[bool],
    blind: BlindAnswers | None,
    kind: str | None,
    seed: int,
) -> Metric:
    """Share of right answers to questions of a type, of all when None."""
    places = [i for i, q in enumerate(asked) if kind is None or q.kind == kind]
    rows = [asked[i] for i in places]
    baselines = {}
    if blind is not None:
        most = blind.majority if kind is None else blind.majority_of(kind)
        baselines = {
            "blind": [exact_match(blind.answer(q.question, q.kind), q.answer) for q in rows],
            "majority": [exact_match(most, q.answer) for q in rows],
        }
    return mean_metric(
        [right[i] for i in places],
        groups=[q.picture for q in rows],
        baselines=baselines,
        seed=seed,
    )


def _blind(data: HeldOut) -> BlindAnswers | None:
    """Answers without looking; None when the dataset has no training questions."""
    reader = data.reader("train")
    records = (reader.record(index) for index in range(len(reader)))
    rows = [(pair.question, pair.answer, pair.type) for record in records for pair in record.qa]
    return BlindAnswers(rows) if rows else None


def list_questions(data: HeldOut) -> list[Question]:
    """The questions of a split, picture by picture, at most `data.limit`.

    Raises:
        DataError: When there is none.
    """
    questions = (
        Question(Image.fromarray(sample.image), number, pair.question, pair.answer, pair.type)
        for number, sample in enumerate(iterate_samples(data.source, data.split))
        for pair in sample.record.qa
    )
    asked = list(islice(questions, data.limit))
    if not asked:
        raise DataError(f"`{data.source.name}` has no question in split `{data.split}`.")
    return asked


def _spread(count: int, wanted: int) -> list[int]:
    """`wanted` places spread evenly over `count`."""
    wanted = min(count, wanted)
    return [place * count // wanted for place in range(wanted)]
