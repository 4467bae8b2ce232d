"""Exact match and the name inside a caption."""

import pytest

from multimodal_dlm.evaluation.text_metrics import exact_match, name_of_caption


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
