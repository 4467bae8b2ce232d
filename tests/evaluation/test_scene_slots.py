"""Slots of captions and things in pictures by hand; scenes measured with a reader that knows."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from multimodal_dlm.evaluation.held_out import HeldOut
from multimodal_dlm.evaluation.measures import scene_drawings
from multimodal_dlm.evaluation.measures.likelihood import trained_caption
from multimodal_dlm.evaluation.measures.scene_captions import measure_scene_captions
from multimodal_dlm.evaluation.measures.scene_drawings import measure_scene_drawings, place_of
from multimodal_dlm.evaluation.scene_slots import (
    background_of,
    find_blobs,
    slot_f1,
    slots_of_caption,
)


@pytest.mark.parametrize(
    ("caption", "slots"),
    [
        (
            "three green salads on an orange background",
            {"count": "three", "object": "green salads", "background": "orange"},
        ),
        (
            "a hibiscus below a rice ball, classic noto style, on a purple background",
            {
                "first": "a rice ball", "relation": "above", "second": "a hibiscus",
                "style": "classic noto", "background": "purple",
            },
        ),
        (
            "a flamingo to the left of a hat",
            {"first": "a flamingo", "relation": "left of", "second": "a hat"},
        ),
        (
            "a hat to the right of a flamingo",
            {"first": "a flamingo", "relation": "left of", "second": "a hat"},
        ),
        (
            "a picture of a small tomato in the bottom left",
            {"size": "small", "object": "tomato", "place": "bottom left"},
        ),
        ("a big ant at the top", {"size": "big", "object": "ant", "place": "top"}),
        ("a red apple", {"object": "a red apple"}),
        ("", {"object": ""}),
    ],
)  # fmt: skip
def test_slots_of_captions(caption, slots):
    assert slots_of_caption(caption) == slots


def test_f1_by_hand():
    true = {"count": "two", "object": "apples", "background": "white"}
    assert slot_f1(true, true) == 1.0
    assert slot_f1({"count": "two", "object": "pears"}, true) == pytest.approx(2 / 5)
    assert slot_f1({"object": "pears"}, true) == 0.0


def paper(*boxes):
    picture = np.full((64, 64, 3), 250, dtype=np.uint8)
    for left, top, right, bottom in boxes:
        picture[top:bottom, left:right] = (200, 20, 20)
    return picture


def test_things_stand_out_from_the_rim():
    picture = paper((10, 8, 20, 18), (40, 40, 60, 60), (30, 30, 32, 32))
    first, second = find_blobs(picture)  # The third is too small.
    assert (first.x, first.y, first.box) == (49.5, 49.5, (40, 40, 60, 60))
    assert (second.x, second.y, second.num_pixels) == (14.5, 12.5, 100)
    assert background_of(picture).tolist() == [250, 250, 250]
    assert len(find_blobs(paper((10, 10, 16, 16), (18, 10, 24, 16)))) == 1  # Two pixels apart.
    assert len(find_blobs(paper((10, 10, 16, 16), (19, 10, 25, 16)))) == 2
    assert find_blobs(paper()) == []
    assert place_of(first, picture) == "bottom right"
    assert place_of(find_blobs(paper((28, 28, 36, 36)))[0], picture) == "centre"
    assert place_of(find_blobs(paper((28, 2, 36, 10)))[0], picture) == "top"


class Reader:
    """Says what it is told to, in order."""

    def __init__(self, captions):
        self.captions = list(captions)

    def __call__(self, images, **_):
        said, self.captions = self.captions[: len(images)], self.captions[len(images) :]
        return SimpleNamespace(texts=said)


def test_scene_captions_of_a_known_reader(scenes):
    data = HeldOut(scenes, "test")
    true = [trained_caption(scenes, sample.record) for sample in data.samples()]
    assert all("background" in caption for caption in true)  # The form it was trained to write.
    perfect = measure_scene_captions(Reader(true), data).metrics
    assert {metric.value for metric in perfect.values()} == {1.0}
    assert perfect["f1"].baselines["nearest_neighbour"] < 1.0
    lazy = measure_scene_captions(Reader(["two apples on a white background"] * 99), data).metrics
    assert lazy["f1"].value < 0.5
    assert lazy["slot.count"].n == sum("count" in slots_of_caption(caption) for caption in true)
    # Saying the most frequent count of training in every caption is what `majority` does.
    said = train_slots(scenes, "count")
    most = min(said, key=lambda value: (-said[value], value))
    usual = measure_scene_captions(Reader([f"{most} apples"] * 99), data).metrics["slot.count"]
    assert usual.value == usual.baselines["majority"] == lazy["slot.count"].baselines["majority"]
    assert usual.value > 0


def train_slots(source, slot):
    reader = HeldOut(source, "test").reader("train")
    captions = [trained_caption(source, reader.record(index)) for index in range(len(reader))]
    return Counter(s[slot] for s in map(slots_of_caption, captions) if slot in s)


def test_drawn_scenes_are_judged_by_what_they_show(scenes, monkeypatch):
    data = HeldOut(scenes, "test")
    real = [sample.image for sample in data.samples()]
    monkeypatch.setattr(scene_drawings, "draw_pictures", lambda *_: real)
    found = measure_scene_drawings(None, data).metrics
    for metric in found.values():
        assert metric.value == metric.baselines["real"]
    assert found["background"].value == 1.0
    blank = np.asarray(Image.new("RGB", (64, 64), (205, 235, 205)))
    monkeypatch.setattr(scene_drawings, "draw_pictures", lambda *_: [blank] * len(real))
    empty = measure_scene_drawings(None, data).metrics
    assert empty["count"].value == 0.0
    assert empty["background"].value < 1.0
    assert set(empty) <= {"background", "count", "place"}
    true = [slots_of_caption(trained_caption(scenes, sample.record)) for sample in data.samples()]
    for slot in empty:
        said = train_slots(scenes, slot)
        most = min(said, key=lambda value: (-said[value], value))
        hits = [row[slot] == most for row in true if slot in row]
        baselines = empty[slot].baselines
        assert baselines["chance"] == pytest.approx(1 / len(said))
        if len(hits) == empty[slot].n:  # Every color was seen in training.
            assert baselines["majority"] == pytest.approx(sum(hits) / len(hits))


def test_a_relation_stands_beside_chance(scenes, monkeypatch):
    class Judge:
        def __init__(self, folder):
            pass

        def is_first(self, crops, names):
            return True

    data = HeldOut(scenes, "test")
    monkeypatch.setattr(scene_drawings, "_Judge", Judge)
    real = [sample.image for sample in data.samples()]
    monkeypatch.setattr(scene_drawings, "draw_pictures", lambda *_: real)
    found = measure_scene_drawings(None, data, scorer="any").metrics["relation"]
    assert found.baselines["chance"] == 0.5
    assert "majority" not in found.baselines
