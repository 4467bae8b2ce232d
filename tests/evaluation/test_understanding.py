"""Captions and answers measured on real shards with readers whose quality is known."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from multimodal_dlm.datasets.reading import iterate_samples
from multimodal_dlm.errors import DataError
from multimodal_dlm.evaluation.held_out import HeldOut
from multimodal_dlm.evaluation.measures import answers
from multimodal_dlm.evaluation.measures.answers import confusion, measure_answers
from multimodal_dlm.evaluation.measures.captions import measure_captions
from multimodal_dlm.evaluation.measures.lengths import measure_lengths
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
    found = measure_answers(oracle, HeldOut(source, "test", batch_size=4))
    assert oracle.batches == [4, 2]
    metrics = found.metrics
    assert metrics["accuracy.color"].value == 1.0
    assert metrics["accuracy.yes_no"].value == 0.0
    assert (metrics["accuracy"].value, metrics["accuracy"].n) == (0.5, 6)
    # Blind: every "is it a square?" is yes; of three balanced colors it always says blue.
    assert metrics["accuracy.color"].baselines["blind"] == pytest.approx(1 / 3)
    assert metrics["accuracy.yes_no"].baselines["blind"] == 1.0
    # Of all training answers "yes" is the most frequent, of those to questions of color "blue".
    assert metrics["accuracy"].baselines["majority"] == pytest.approx(1 / 2)
    assert metrics["accuracy.color"].baselines["majority"] == pytest.approx(1 / 3)
    assert metrics["accuracy.yes_no"].baselines["majority"] == 1.0
    # Every picture has one right and one wrong answer: drawing pictures changes nothing.
    assert (metrics["accuracy"].low, metrics["accuracy"].high) == (0.5, 0.5)
    assert found.tables["answers of type yes_no"].columns == ["yes", "other"]
    assert list(found.tables["answers of type color"].counts[0]) == [1, 0, 0]


def test_a_question_never_asked_in_training_gets_its_types_answer(source, monkeypatch):
    def reworded(source, split):
        for sample in iterate_samples(source, split):
            pairs = tuple(
                replace(pair, question=f"say: {pair.question}") for pair in sample.record.qa
            )
            yield replace(sample, record=replace(sample.record, qa=pairs))

    monkeypatch.setattr(answers, "iterate_samples", reworded)
    metrics = measure_answers(Oracle(), HeldOut(source, "test")).metrics
    assert metrics["accuracy.color"].baselines["blind"] == pytest.approx(1 / 3)
    assert metrics["accuracy"].baselines["blind"] == pytest.approx(4 / 6)


def test_confusion_counts_by_hand():
    table = confusion(["a", "b", "b", "a"], ["a", "a", "b", "what?"])
    assert table.rows == ["a", "b"]
    assert table.columns == ["a", "b", "other"]
    assert table.counts == [[1, 0, 1], [1, 1, 0]]
    assert confusion([str(n) for n in range(13)], ["0"] * 13) is None


def test_captions_of_a_known_reader_and_its_neighbors(source):
    exact = measure_captions(Oracle(), HeldOut(source, "test")).metrics["exact"]
    assert (exact.value, exact.n) == (1.0, 3)
    assert exact.baselines["nearest_neighbour"] == 1.0
    assert exact.baselines["majority"] == pytest.approx(1 / 3)


def test_limit(source):
    assert measure_answers(Oracle(), HeldOut(source, "test", limit=2)).metrics["accuracy"].n == 2
    assert measure_captions(Oracle(), HeldOut(source, "test", limit=1)).metrics["exact"].n == 1


def test_unknown_split_is_a_data_error(source):
    with pytest.raises(DataError, match=r"split `val`.*`train`"):
        measure_answers(Oracle(), HeldOut(source, "val"))


def test_a_real_pipeline_is_measured(source):
    pipe = UnifiedImageToTextPipeline(**tiny_components())
    pipe.set_progress_bar_config(disable=True)
    result = measure_answers(pipe, HeldOut(source, "test", limit=4, batch_size=2))
    assert result.metrics["accuracy"].n == 4


class Cutting:
    """Writes as many characters as it is given positions; one character is one token."""

    def __init__(self, texts):
        self.texts = texts
        layout = {"max_window": {"text": 8}}
        self.processor = SimpleNamespace(encode_text=list, layout=layout)

    def __call__(self, images, *, gen_length):
        return SimpleNamespace(texts=[self.texts[: gen_length - 1] for _ in images])


def test_lengths_compare_captions_that_fit(source):
    short = measure_lengths(Cutting("abc"), HeldOut(source, "test"), lengths=(4, 8)).metrics
    assert short["same_as_longest.4"].value == 1.0
    assert (short["same_at_all"].value, short["same_at_all"].n) == (1.0, 3)
    # Cut to 8 positions, and no caption fits in 4.
    long = measure_lengths(Cutting("abcdef"), HeldOut(source, "test"), lengths=(4, 24)).metrics
    assert long == {}


def test_lengths_notice_a_caption_that_changes(source):
    class Fickle(Cutting):
        def __call__(self, images, *, gen_length):
            return SimpleNamespace(texts=[f"{gen_length}" for _ in images])

    found = measure_lengths(Fickle(""), HeldOut(source, "test"), lengths=(4, 8)).metrics
    assert found["same_as_longest.4"].value == 0.0
    assert found["same_at_all"].value == 0.0
