"""What a number must beat: answering without looking, and copying the nearest training picture."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from multimodal_dlm.errors import DataError
from multimodal_dlm.evaluation.text_metrics import normalise_text

FEATURE_SIDE = 16  # Pixel features: the picture reduced to 16 x 16.


class BlindAnswers:
    """Answers from the question alone: the most frequent training answer to the same question.

    A question that training never asked gets the most frequent answer of its type, and one of an
    unknown type the most frequent of all. Among equals it is the first in the alphabet.

    Args:
        rows: Question, answer and type of question, of the training split.

    Raises:
        DataError: When there is no row.
    """

    def __init__(self, rows: Iterable[tuple[str, str, str]]) -> None:
        by_question: dict[str, Counter[str]] = defaultdict(Counter)
        by_type: dict[str, Counter[str]] = defaultdict(Counter)
        overall: Counter[str] = Counter()
        for question, answer, kind in rows:
            by_question[normalise_text(question)][answer] += 1
            by_type[kind][answer] += 1
            overall[answer] += 1
        if not overall:
            raise DataError("A blind baseline needs at least one question of the training split.")
        self.majority = most_frequent(overall)
        self._answers = {question: most_frequent(found) for question, found in by_question.items()}
        self._majorities = {kind: most_frequent(found) for kind, found in by_type.items()}

    def answer(self, question: str, kind: str) -> str:
        """The answer nobody had to look for."""
        return self._answers.get(normalise_text(question), self.majority_of(kind))

    def majority_of(self, kind: str) -> str:
        """The most frequent answer to questions of a type."""
        return self._majorities.get(kind, self.majority)


class NearestPictures:
    """Labels of the training pictures whose features are most similar (cosine).

    Args:
        features: One row per training picture.
        labels: What each shows.

    Raises:
        DataError: When the numbers differ or there is none.
    """

    def __init__(self, features: np.ndarray, labels: Sequence[str]) -> None:
        if len(features) != len(labels) or not len(labels):
            raise DataError(
                f"Every training picture needs one label; got {len(labels)} for {len(features)}."
            )
        self._mean = features.mean(axis=0, keepdims=True)
        self._features = self._unit(features)
        self._labels = list(labels)

    def nearest(self, features: np.ndarray) -> list[str]:
        """The label of the nearest training picture of each row."""
        places = (self._unit(features) @ self._features.T).argmax(axis=1)
        return [self._labels[place] for place in places]

    def _unit(self, features: np.ndarray) -> np.ndarray:
        centred = features.astype(np.float32) - self._mean
        lengths = np.linalg.norm(centred, axis=1, keepdims=True)
        return centred / np.maximum(lengths, 1e-12)


def pixel_features(images: Sequence[np.ndarray]) -> np.ndarray:
    """Small RGB pictures as rows: the plainest features, which need no network.

    Args:
        images: uint8 (height, width, 3), of any sides. A side that is no multiple of 16 is cut into
            16 parts that overlap by a pixel at most.

    Returns:
        float32 (pictures, 768), values in [0, 1].
    """
    rows = []
    for image in images:
        pixels = torch.tensor(image, dtype=torch.float64).permute(2, 0, 1)
        cells = F.adaptive_avg_pool2d(pixels, FEATURE_SIDE)
        rows.append(cells.permute(1, 2, 0).reshape(-1).numpy() / 255)
    return np.asarray(rows, dtype=np.float32)


def most_frequent(counts: Counter[str]) -> str:
    """The most frequent entry, the first in the alphabet among equals."""
    return min(counts, key=lambda entry: (-counts[entry], entry))
