"""Calibration by hand and against answers whose probability is known."""

import numpy as np
import pytest

from multimodal_dlm.evaluation.measures.calibration import calibration_error, reliability


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
