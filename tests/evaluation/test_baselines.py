"""The baselines: what they answer, and that they look at nothing else."""

import numpy as np
import pytest

from multimodal_dlm.errors import DataError
from multimodal_dlm.evaluation.baselines import BlindAnswers, NearestPictures, pixel_features


def test_blind_answers_are_the_most_frequent_by_question():
    blind = BlindAnswers([
        ("is it red?", "no", "is"), ("Is it red", "no", "is"), ("is it red?", "yes", "is"),
        ("what?", "cat", "what"), ("what?", "ant", "what"), ("which?", "cat", "what"),
    ])  # fmt: skip
    assert blind.answer("is it RED?", "is") == "no"
    assert blind.answer("what?", "what") == "ant"  # A tie: the first in the alphabet.
    # Training never asked it: the most frequent answer of its type, not "cat" or "no" of all.
    assert blind.answer("never asked", "what") == "cat"
    assert blind.answer("never asked", "is") == "no"
    assert blind.majority == "cat"
    assert blind.answer("never asked", "of no type") == "cat"
    assert [blind.majority_of(kind) for kind in ("is", "what", "else")] == ["no", "cat", "cat"]


def test_baselines_need_data():
    with pytest.raises(DataError, match="at least one question"):
        BlindAnswers([])
    with pytest.raises(DataError, match="one label; got 1 for 2"):
        NearestPictures(np.zeros((2, 3)), ["a"])


def test_nearest_picture_by_brute_force():
    draw = np.random.default_rng(0)
    train, test = draw.normal(size=(20, 6)), draw.normal(size=(7, 6))
    mean = train.mean(axis=0)

    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        a, b = a - mean, b - mean
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    expected = [str(max(range(20), key=lambda i: cosine(train[i], row))) for row in test]
    nearest = NearestPictures(train, [str(number) for number in range(20)])
    assert nearest.nearest(test) == expected


def test_a_picture_is_its_own_neighbor():
    draw = np.random.default_rng(0)
    images = [draw.integers(0, 256, (32, 32, 3), dtype=np.uint8) for _ in range(5)]
    features = pixel_features(images)
    assert features.shape == (5, 768)
    assert features[0, 0] == pytest.approx(images[0][:2, :2, 0].mean() / 255)
    assert NearestPictures(features, list("abcde")).nearest(features) == list("abcde")


def test_any_side_is_reduced_to_sixteen():
    draw = np.random.default_rng(0)
    image = draw.integers(0, 256, (32, 48, 3), dtype=np.uint8)
    cells = image.reshape(16, 2, 16, 3, 3).mean(axis=(1, 3)) / 255
    assert pixel_features([image])[0] == pytest.approx(cells.reshape(-1), abs=1e-7)
    odd = draw.integers(0, 256, (40, 24, 3), dtype=np.uint8)
    small = pixel_features([odd, odd[:8, :8]])
    assert small.shape == (2, 768)
    assert small[0, 0] == pytest.approx(odd[:3, :2, 0].mean() / 255)
    assert small[1, 0] == pytest.approx(odd[0, 0, 0] / 255)
