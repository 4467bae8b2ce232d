"""Asking the questions of a picture so that the words of a question do not give its answer away."""

from collections import Counter, defaultdict
from collections.abc import Iterable

from multimodal_dlm.datasets.schema import QuestionAnswer, Record


class AnswerBalance:
    """Weights 1 / P(answer | question), with P counted over a split.

    Drawn with these weights, every answer to a question is asked about as often as any other, so
    that guessing from the question alone earns nothing (the aim of VQA v2, Goyal et al. 2017,
    arXiv 1612.00837). Pictures ask about the same things as before.

    Args:
        records: The split.
    """

    def __init__(self, records: Iterable[Record]) -> None:
        self._counts: dict[str, Counter[str]] = defaultdict(Counter)
        for record in records:
            for pair in record.qa:
                self._counts[pair.question][pair.answer] += 1

    def weights(self, pairs: Iterable[QuestionAnswer]) -> list[float]:
        """The weight of each question of a record of the split, at least 1."""
        return [
            self._counts[pair.question].total() / self._counts[pair.question][pair.answer]
            for pair in pairs
        ]
