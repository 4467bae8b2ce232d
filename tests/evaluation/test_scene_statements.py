"""True statements about scenes against false ones, chosen by pipelines of known sight."""

import pytest

from multimodal_dlm.diffusion.likelihood import LikelihoodEstimate
from multimodal_dlm.errors import DataError
from multimodal_dlm.evaluation.held_out import HeldOut
from multimodal_dlm.evaluation.measures import scene_statements
from multimodal_dlm.evaluation.measures.likelihood import trained_caption
from multimodal_dlm.evaluation.measures.scene_statements import (
    false_statements,
    measure_scene_statements,
    parse_statement,
)
from multimodal_dlm.evaluation.scene_slots import slots_of_caption
from multimodal_dlm.pipelines import UnifiedImageToTextPipeline
from tests.pipelines.tiny import tiny_components


def test_statements_by_hand():
    true = parse_statement("a cat to the left of a cat toy on a blue background")
    assert str(true) == "a cat to the left of a cat toy on a blue background"
    assert (true.first, true.second) == ("a cat", "a cat toy")
    other = parse_statement("an apple below a pear, noto style, on a red background")
    assert (other.first, other.relation, other.second) == ("an apple", "below", "a pear")
    assert parse_statement("two apples on a white background") is None
    false = false_statements([true, other], seed=0)
    assert [str(row) for row in false["swapped"]] == [
        "a cat toy to the left of a cat on a blue background",
        "a pear below an apple, noto style, on a red background",
    ]
    assert [str(row) for row in false["reversed"]] == [
        "a cat to the right of a cat toy on a blue background",
        "an apple above a pear, noto style, on a red background",
    ]
    first, second = false["renamed"]
    assert first.first == "a cat"
    assert first.second in ("a pear", "an apple")
    assert second.first in ("a cat", "a cat toy")
    assert second.second == "a pear"
    with pytest.raises(DataError, match="at least three things; got a cat, a cat toy"):
        false_statements([true], seed=0)


class Knowing:
    """A text costs 9 nats without a picture and, with it, one nat for each slot that is wrong."""

    def __init__(self, true, slots=("first", "relation", "second")):
        self.true = [slots_of_caption(text) for text in true]
        self.slots = slots

    def score(self, task, *, codes, text, generator, num_draws, batch_size):
        assert len(text) == len(generator) == len(codes) == len(self.true)
        values = [9.0] * len(text)
        if task == "caption":
            said = map(slots_of_caption, text)
            values = [
                float(sum(own[slot] != row[slot] for slot in self.slots))
                for own, row in zip(said, self.true, strict=True)
            ]
        return [LikelihoodEstimate(value, 0.0, num_draws, True) for value in values]


def test_what_is_seen_decides(scenes, monkeypatch):
    data = HeldOut(scenes, "test")
    captions = [trained_caption(scenes, sample.record) for sample in data.samples()]
    true = [text for text in captions if "relation" in slots_of_caption(text)]
    assert 0 < len(true) < len(captions)
    monkeypatch.setattr(scene_statements, "encode_images", lambda _, images, __: images)
    for slots, expected in (
        (("first", "relation", "second"), [1.0, 1.0, 1.0]),
        (("relation",), [0.5, 0.5, 0.5]),  # Both false relations are the other way round only.
        ((), [0.5, 0.5, 0.5]),
    ):
        metrics = measure_scene_statements(Knowing(true, slots), data).metrics
        assert list(metrics) == ["swapped", "reversed", "renamed"]
        assert [metric.value for metric in metrics.values()] == expected
        for metric in metrics.values():
            assert metric.n == len(true)
            assert metric.baselines == {"chance": 0.5, "text_alone": 0.5}
    # Who knows only which things are there cannot tell what is where, and knows the names.
    bags = Knowing(true)

    def count_missing(task, *, text, num_draws, **_):
        missing = [
            len({row["first"], row["second"]} - set(slots_of_caption(own).values()))
            for own, row in zip(text, bags.true, strict=True)
        ]
        return [LikelihoodEstimate(float(count), 0.0, num_draws, True) for count in missing]

    bags.score = count_missing
    found = measure_scene_statements(bags, data, tasks=["caption"]).metrics
    assert [metric.value for metric in found.values()] == [0.5, 0.5, 1.0]
    assert found["swapped"].baselines == {"chance": 0.5}


def test_a_real_pipeline_is_measured_the_same_twice(scenes, monkeypatch):
    monkeypatch.setattr(  # Short enough for a tiny model.
        scene_statements,
        "trained_caption",
        lambda _, record: (
            f"a {'dca'[len(record.key) % 2]} above a b"
            if record.meta["kind"] == "relation"
            else f"a {'ef'[len(record.captions[0]) % 2]} above a b"
        ),
    )
    pipe = UnifiedImageToTextPipeline(**tiny_components())
    data = HeldOut(scenes, "test", limit=6)
    first, again = (measure_scene_statements(pipe, data, num_draws=2).metrics for _ in range(2))
    assert first == again


def test_a_split_without_relations_is_refused(source):
    with pytest.raises(DataError, match="none of 3 states a relation"):
        measure_scene_statements(None, HeldOut(source, "test"))
