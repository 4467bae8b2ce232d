"""Calibration by hand and against answers whose probability is known."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from multimodal_dlm.evaluation.held_out import HeldOut
from multimodal_dlm.evaluation.measurement import mean_metric
from multimodal_dlm.evaluation.measures.calibration import (
    calibration_error,
    calibration_interval,
    measure_calibration,
    reliability,
)


def test_error_by_hand():
    confidence, right = np.array([0.95, 0.95, 0.55, 0.55]), np.array([1.0, 0.0, 1.0, 0.0])
    assert calibration_error(confidence, right) == pytest.approx((2 * 0.45 + 2 * 0.05) / 4)
    assert calibration_error(np.ones(3), np.ones(3)) == 0.0
    assert calibration_error(np.ones(3), np.zeros(3)) == 1.0
    assert reliability(confidence, right) == ([0.55, 0.95], [0.5, 0.5])


def test_a_resample_is_the_same_as_its_rows():
    rng = np.random.default_rng(0)
    confidence, right = rng.random(30), (rng.random(30) < 0.5).astype(float)
    counts = rng.multinomial(30, np.full(30, 1 / 30)).astype(float)
    rows = np.repeat(np.arange(30), counts.astype(int))
    expected = calibration_error(confidence[rows], right[rows])
    assert calibration_error(confidence, right, counts) == pytest.approx(expected)


def test_answers_right_as_often_as_said_have_little_error():
    rng = np.random.default_rng(0)
    confidence = rng.random(20_000)
    right = (rng.random(20_000) < confidence).astype(float)
    assert calibration_error(confidence, right) < 0.02
    assert calibration_error(confidence, 1 - right) > 0.3


def test_questions_about_a_picture_are_drawn_together():
    rng = np.random.default_rng(0)
    confidence, right = rng.random(30), (rng.random(30) < 0.5).astype(float)
    once = calibration_interval(confidence, right, range(30))
    assert once[0] < calibration_error(confidence, right) < once[1]
    four = [np.repeat(rows, 4) for rows in (confidence, right, np.arange(30))]
    assert calibration_interval(*four) == pytest.approx(once)


def test_intervals_of_a_pipeline_are_of_pictures(source):
    class Sure:
        """Says yes, and is as sure as the picture's number says."""

        image_tokenizer = SimpleNamespace(
            config={"image_size": 32}, encode=lambda pixels: (pixels[:, :, 0, 0],)
        )
        device = torch.device("cpu")

        def __call__(self, images, questions):
            return SimpleNamespace(texts=["yes" for _ in images])

        def score(self, *_, text, **__):
            return [SimpleNamespace(value=0.1 + row // 2) for row in range(len(text))]

    found = measure_calibration(Sure(), HeldOut(source, "test")).metrics
    values = np.exp(-(0.1 + np.arange(3)))
    assert found["confidence"].n == 6
    expected = mean_metric(values.tolist())
    assert found["confidence"].low == pytest.approx(expected.low)
    assert found["confidence"].high == pytest.approx(expected.high)
    interval = found["calibration_error"].low, found["calibration_error"].high
    rows = np.repeat(values, 2), np.array([0.0, 1.0] * 3), [0, 0, 1, 1, 2, 2]
    assert interval == pytest.approx(calibration_interval(*rows))
