"""Intervals against the normal approximation and by hand."""

import numpy as np
import pytest

from multimodal_dlm.errors import ConfigError
from multimodal_dlm.evaluation.bootstrap import bootstrap_interval, bootstrap_weights


def test_the_interval_of_a_mean_is_the_normal_one_for_many_rows():
    values = np.random.default_rng(0).normal(3, 2, 2000)
    low, high = bootstrap_interval(values)
    half = 1.96 * values.std() / np.sqrt(2000)
    assert low == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.15 * half)


def test_copies_of_a_unit_do_not_narrow_the_interval():
    values = np.random.default_rng(0).normal(0, 1, 50)
    alone = bootstrap_interval(values)
    copied = bootstrap_interval(np.repeat(values, 10), groups=np.repeat(np.arange(50), 10))
    assert copied == pytest.approx(alone)
    assert np.diff(bootstrap_interval(np.repeat(values, 10)))[0] < 0.5 * np.diff(alone)[0]


def test_units_of_different_size_count_their_rows():
    low, high = bootstrap_interval([1, 1, 1, 0], groups=[7, 7, 7, 9])
    assert (low, high) == (0.0, 1.0)


def test_the_same_seed_gives_the_same_interval():
    values = [0.0, 1.0, 4.0, 2.0]
    assert bootstrap_interval(values, seed=1) == bootstrap_interval(values, seed=1)
    assert bootstrap_interval(values, seed=1, num_resamples=9) != bootstrap_interval(
        values, seed=2, num_resamples=9
    )
    assert (bootstrap_weights(7, num_resamples=20).sum(axis=1) == 7).all()


def test_nothing_has_no_interval():
    with pytest.raises(ConfigError, match="`values` must hold at least one number; got none"):
        bootstrap_interval([])
