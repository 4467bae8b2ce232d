"""Exact match, the name inside a caption, and CIDEr-D."""

import math

import pytest

from multimodal_dlm.datasets.schema import Record, Sample
from multimodal_dlm.errors import ConfigError
from multimodal_dlm.evaluation.text_metrics import (
    cider_d,
    exact_match,
    name_of_caption,
    references_of_sample,
)


@pytest.mark.parametrize(
    ("caption", "name"),
    [
        ("red apple", "red apple"),
        ("a red apple", "red apple"),
        ("a flat fluent emoji of a red apple", "red apple"),
        ("an emojione emoji of an ant", "ant"),
        ("a black and white emoji of red hair", "red hair"),
        ("a red apple, twemoji style, on a blue background", "red apple"),
        ("an apple on a white background", "apple"),
        ("a blue circle on a pale background", "blue circle"),
        ("a picture of a red apple. tags: fruit, food", "red apple"),
        ("red apple. tags: fruit", "red apple"),
        ("A Red  Apple.", "red apple"),
        ("a flat fluent emoji of flag of france", "flag of france"),
        ("", ""),
    ],
)
def test_the_name_of_a_caption(caption, name):
    assert name_of_caption(caption) == name


def test_exact_match_ignores_case_blanks_and_the_full_stop():
    assert exact_match("Yes.", "yes")
    assert exact_match(" red  apple", "red apple")
    assert not exact_match("red apples", "red apple")


def grams(text, size):
    return list(zip(*[text.split()[start:] for start in range(size)], strict=False))


def by_hand(candidate, reference, rows, document_frequency):
    """CIDEr-D of one word or two against one reference, spelled out."""
    weights = {gram: math.log(rows / count) for gram, count in document_frequency.items()}
    total = 0.0
    for size in (1, 2):
        own, other = (
            {gram: weights.get(gram, math.log(rows)) for gram in grams(text, size)}
            for text in (candidate, reference)
        )
        dot = sum(min(own.get(g, 0.0), w) * w for g, w in other.items())
        lengths = math.hypot(*own.values()) * math.hypot(*other.values())
        total += dot / lengths if lengths else 0.0
    difference = len(candidate.split()) - len(reference.split())
    return 10 * total / 4 * math.exp(-(difference**2) / 72)


def test_cider_d_by_hand():
    references = [["red apple"], ["red car"], ["fish"], ["blue fish"]]
    frequency = {("red",): 2, ("apple",): 1, ("car",): 1, ("fish",): 2, ("blue",): 1,
                 ("red", "apple"): 1, ("red", "car"): 1, ("blue", "fish"): 1}  # fmt: skip
    said = ["red apple", "red apple", "fish", "fish"]
    expected = [
        by_hand(text, row[0], 4, frequency) for text, row in zip(said, references, strict=True)
    ]
    found = cider_d(said, references)
    assert found == pytest.approx(expected)
    assert found[0] == pytest.approx(5.0)  # Words and pairs of words: half of the four sizes.
    assert 0 < found[1] < found[0]
    assert cider_d(["pear", ""], [["apple"], ["car"]]) == [0.0, 0.0]
    both = cider_d(["apple", "car"], [["apple", "fruit"], ["car"]])
    assert both[0] == pytest.approx(both[1] / 2)  # The mean over references.
    with pytest.raises(ConfigError, match="at least one text a candidate"):
        cider_d(["a"], [[]])


def test_references_are_the_name_and_the_tags():
    captions = ("snowman", "a picture of a snowman. tags: man, snow")
    record = Record("a", "b", "c", "MIT", captions, meta={"concept": "snowman"})
    assert references_of_sample(Sample(record)) == ["snowman", "man", "snow"]
