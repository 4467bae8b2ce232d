"""Retrieval by likelihood: the AUC and pairs by hand, and a pipeline that is measured."""

import numpy as np
import pytest

from multimodal_dlm.diffusion.likelihood import LikelihoodEstimate
from multimodal_dlm.errors import DataError
from multimodal_dlm.evaluation.held_out import HeldOut
from multimodal_dlm.evaluation.measures.likelihood import (
    area_metric,
    area_under_curve,
    measure_likelihood,
    mismatched,
)
from multimodal_dlm.pipelines import UnifiedImageToTextPipeline
from tests.evaluation.toy import COLORS
from tests.pipelines.tiny import tiny_components


def test_area_under_curve_by_hand():
    assert area_under_curve([3.0, 2.0], [1.0, 0.0]) == 1.0
    assert area_under_curve([0.0], [1.0]) == 0.0
    assert area_under_curve([1.0], [1.0]) == 0.5
    assert area_under_curve([3.0, 1.0], [2.0, 0.0]) == 0.75


def test_an_area_has_an_interval_of_its_pairs():
    rng = np.random.default_rng(0)
    metric = area_metric(rng.normal(1, 1, 60), rng.normal(0, 1, 60))
    assert metric.low < metric.value < metric.high
    # Hanley and McNeil 1982, Eq. 1: the standard error of an area of 0.76 over 60 + 60 is 0.044.
    assert 0.12 < metric.high - metric.low < 0.23
    sure = area_metric([2.0, 3.0], [0.0, 1.0])
    assert (sure.low, sure.high) == (1.0, 1.0)


def test_partners_have_other_names():
    names = ["a", "a", "b", "c"]
    for seed in range(20):
        assert all(names[i] != names[j] for i, j in enumerate(mismatched(names, seed)))
    assert len({tuple(mismatched(names, seed)) for seed in range(20)}) > 1
    with pytest.raises(DataError, match=r"at least two names; row 0 has no partner"):
        mismatched(["a", "a"], 0)


class Eye:
    """An image tokenizer whose one code is the color."""

    config = {"image_size": 32}

    def encode(self, pixels):
        assert len(pixels) <= 2
        return (pixels[:, :, 16, 16].argmax(dim=1)[:, None, None],)


class Knowing:
    """Every text costs 5 nats, or 1 when the picture shows its color; pictures cost 50."""

    image_tokenizer = Eye()
    device = "cpu"

    def score(self, task, *, codes, text, generator, num_draws, batch_size):
        assert len(generator) == len(codes[0]) == len(text)
        found = []
        for code, caption in zip(codes[0].flatten().tolist(), text, strict=True):
            value = {"unconditional_text": 5.0, "text_to_image": 50.0}.get(task)
            value = value or (1.0 if COLORS[code] in caption else 6.0)
            found.append(LikelihoodEstimate(value, 0.0, num_draws, True))
        return found


def test_a_pipeline_that_knows_tells_all_pairs_apart(source):
    found = measure_likelihood(Knowing(), HeldOut(source, "test", batch_size=2)).metrics
    assert found["auc"].value == 1.0
    assert found["text_given_image_nats"].value == 1.0
    assert found["text_given_image_nats"].baselines == {"without_image": 5.0}
    assert found["joint_nats"].value == 55.0
    assert found["auc"].n == 3


def test_a_blind_pipeline_is_at_chance(source):
    blind = Knowing()
    blind.score = lambda task, *, text, **_: [LikelihoodEstimate(4.0, 0.1, 2, True)] * len(text)
    found = measure_likelihood(blind, HeldOut(source, "test", batch_size=2)).metrics
    assert found["auc"].value == 0.5


def test_a_real_pipeline_is_measured_the_same_twice(source):
    pipe = UnifiedImageToTextPipeline(**tiny_components())
    data = HeldOut(source, "test")
    first, again = (measure_likelihood(pipe, data, num_draws=4).metrics for _ in range(2))
    assert first == again
    assert 0.0 <= first["auc"].value <= 1.0
    assert first["image_given_text_nats"].value > 0
