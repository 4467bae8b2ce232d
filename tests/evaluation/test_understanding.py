"""Captions and answers measured on real shards with readers whose quality is known."""

from types import SimpleNamespace

import numpy as np
import pytest

from multimodal_dlm.errors import DataError
from multimodal_dlm.evaluation.understanding import (
    evaluate_answers,
    evaluate_captions,
    evaluate_lengths,
)
from multimodal_dlm.pipelines import UnifiedImageToTextPipeline
from tests.evaluation.toy import COLORS
from tests.pipelines.tiny import tiny_components


class Oracle:
    """Reads the color off the pixels."""

    def __init__(self):
        self.batches = []

    def __call__(self, images, questions=None):
        self.batches.append(len(images))
        names = [COLORS[np.asarray(image)[16, 16].argmax()] for image in images]
        if questions is None:
            texts = [f"a noto emoji of a {name} square" for name in names]
        else:
            pairs = zip(names, questions, strict=True)
            texts = [name if "color" in question else "no" for name, question in pairs]
        return SimpleNamespace(texts=texts)


def test_answers_of_a_known_reader(source):
    oracle = Oracle()
    result = evaluate_answers(oracle, source, split="test", batch_size=4)
    assert oracle.batches == [4, 2]
    assert result["model"]["by_type"] == {"color": 1.0, "yes_no": 0.0}
    assert result["model"]["accuracy"] == 0.5
    # Blind: every "is it a square?" is yes; of three balanced colors it always says blue.
    assert result["blind"]["by_type"] == {"color": round(1 / 3, 4), "yes_no": 1.0}


def test_captions_of_a_known_reader_and_its_neighbors(source):
    result = evaluate_captions(Oracle(), source, split="test")
    assert result["model"]["accuracy"] == 1.0
    assert result["nearest_neighbour_pixels"]["accuracy"] == 1.0
    assert result["model"]["count"] == 3


def test_limit(source):
    assert evaluate_answers(Oracle(), source, split="test", limit=2)["model"]["count"] == 2
    assert evaluate_captions(Oracle(), source, split="test", limit=1)["model"]["count"] == 1


def test_unknown_split_is_a_data_error(source):
    with pytest.raises(DataError, match=r"split `val`.*`train`"):
        evaluate_answers(Oracle(), source, split="val")


def test_a_real_pipeline_is_measured(source):
    pipe = UnifiedImageToTextPipeline(**tiny_components())
    pipe.set_progress_bar_config(disable=True)
    result = evaluate_answers(pipe, source, split="test", limit=4, batch_size=2)
    assert result["model"]["count"] == 4


class Cutting:
    """Writes as many characters as it is given positions; one character is one token."""

    def __init__(self, texts):
        self.texts = texts
        layout = {"max_window": {"text": 8}}
        self.processor = SimpleNamespace(encode_text=list, layout=layout)

    def __call__(self, images, gen_length):
        return SimpleNamespace(texts=[self.texts[: gen_length - 1] for _ in images])


def test_lengths_compare_captions_that_fit(source):
    short = evaluate_lengths(Cutting("abc"), source, split="test", lengths=(4, 8))
    assert short["same_as_longest"]["by_type"] == {"gen_length 4": 1.0, "gen_length 8": 1.0}
    assert (short["same_at_all"]["accuracy"], short["same_at_all"]["count"]) == (1.0, 3)
    long = evaluate_lengths(Cutting("abcdef"), source, split="test", lengths=(4, 24))
    assert long["same_as_longest"]["by_type"] == {"gen_length 8": 1.0}
    assert long["same_at_all"]["count"] == 0


def test_lengths_notice_a_caption_that_changes(source):
    class Fickle(Cutting):
        def __call__(self, images, gen_length):
            return SimpleNamespace(texts=[f"{gen_length}" for _ in images])

    result = evaluate_lengths(Fickle(""), source, split="test", lengths=(4, 8))
    assert result["same_as_longest"]["by_type"] == {"gen_length 4": 0.0, "gen_length 8": 1.0}
    assert result["same_at_all"]["accuracy"] == 0.0
