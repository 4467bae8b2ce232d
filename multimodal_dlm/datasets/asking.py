"""Which of a picture's questions is asked: by type, and so that words do not tell."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping

from multimodal_dlm.datasets.schema import QuestionAnswer, Record
from multimodal_dlm.errors import DataError, unknown_name


class QuestionWeights:
    """Weight of a question = weight of its type, over P(answer | question) where balanced.

    Balanced, every answer to a question is asked about as often as any other, so that guessing from
    the question alone earns nothing (the aim of VQA v2, Goyal et al. 2017, arXiv 1612.00837). With
    negated questions among them that leaves no gradient at first: negation, word and picture then
    matter only all three together. Weigh negated questions low instead, so that the comparison of
    word and picture is learned before its negation.

    Args:
        records: The split.
        by_type: Weight of each question type, 1 where none is given.
        balance_answers: Count P(answer | question) over the split and divide by it.

    Raises:
        DataError: When `by_type` names a type that no question of the split has.
    """

    def __init__(
        self,
        records: Iterable[Record],
        *,
        by_type: Mapping[str, int] | None = None,
        balance_answers: bool = False,
    ) -> None:
        self.by_type = dict(by_type or {})
        self.balance_answers = balance_answers
        self._counts: dict[str, Counter[str]] = defaultdict(Counter)
        types = set()
        for record in records:
            for pair in record.qa:
                types.add(pair.type)
                self._counts[pair.question][pair.answer] += 1
        for name in self.by_type:
            if name not in types:
                raise DataError(str(unknown_name("question type", name, sorted(types))))

    def weights(self, record: Record) -> list[float]:
        """The weight of each question of a record of the split.

        Raises:
            DataError: When all of them weigh nothing.
        """
        found = [float(self.by_type.get(pair.type, 1)) for pair in record.qa]
        if not any(found):
            raise DataError(
                f"Sample {record.key} of `{record.source}` must have a question of a type with a"
                f" weight above 0 in `question_weights`; got {self.by_type}. Give another type"
                " of its questions a weight."
            )
        if not self.balance_answers:
            return found
        return [w * self._rarity(pair) for w, pair in zip(found, record.qa, strict=True)]

    def _rarity(self, pair: QuestionAnswer) -> float:
        """1 / P(answer | question), at least 1."""
        answers = self._counts[pair.question]
        return answers.total() / answers[pair.answer]
