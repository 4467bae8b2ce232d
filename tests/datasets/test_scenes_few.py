"""Scenes of a few things: which things, and that what `emoji_scenes` holds out stays held out."""

import pytest

from multimodal_dlm.datasets.fetching import SourceFolder
from multimodal_dlm.datasets.recipes import get_recipe
from multimodal_dlm.datasets.recipes.emoji_catalogue import Concept, Drawing
from multimodal_dlm.datasets.recipes.emoji_scenes import SCENE_STYLES
from multimodal_dlm.datasets.recipes.emoji_scenes_few import CATEGORIES, NUM_EACH
from multimodal_dlm.datasets.recipes.scene_plans import is_held_out

KINDS = {"animal-mammal": "an animal", "food-fruit": "food", "transport-ground": "a vehicle"}
SQUARE = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 8 8"><rect width="8" height="8"/></svg>'
)


def drawings(count: int) -> dict[tuple[str, str], Drawing]:
    """`count` things of each category; every third misses one style, another has a held-out one."""
    found = {}
    for subgroup in (*KINDS, "plant-flower"):
        for number in range(count):
            name = f"{subgroup.split('-')[0]}{chr(ord('a') + number)}"
            concept = Concept(name, name, name, "animals-nature", subgroup, (), "train")
            for place, style in enumerate(SCENE_STYLES):
                if number % 3 == 1 and place == 0:
                    continue
                split = "unseen_combinations" if number % 3 == 2 and place == 1 else "train"
                found[name, style] = Drawing(concept, style, SQUARE, split)
    return found


@pytest.fixture
def recipe(tmp_path):
    made = get_recipe("emoji_scenes_few")(SourceFolder(tmp_path))
    made.__dict__["_drawings"] = drawings(30)
    return made


def test_eight_of_each_category_and_all_in_every_style(recipe):
    things = recipe.objects["train"]
    assert len(things) == NUM_EACH * len(CATEGORIES) == len({thing.name for thing in things})
    for kind in CATEGORIES:
        assert sum(thing.category == kind for thing in things) == NUM_EACH
    assert all(set(thing.styles) == set(SCENE_STYLES) for thing in things)
    whole = get_recipe("emoji_scenes")(recipe.sources)
    whole.__dict__["_drawings"] = drawings(30)
    assert {t.name for t in things} < {t.name for t in whole.objects["train"]}


def test_scenes_show_those_things_and_nothing_held_out(recipe, monkeypatch):
    pytest.importorskip("resvg_py")
    monkeypatch.setattr(type(recipe), "count", lambda self, split: 60)
    names = {thing.name for thing in recipe.objects["train"]}
    samples = list(recipe.samples("train"))
    assert len(samples) == 60
    shown = set()
    for sample in samples:
        record = sample.record
        objects = record.meta["objects"]
        shown |= {thing[0] for thing in objects}
        assert record.source == "emoji_scenes_few"
        assert record.meta["held_out"] == []
        asked = {pair.type for pair in record.qa}
        if record.meta["kind"] == "relation":
            relation = "above" if " above " in record.captions[0] else "to the left of"
            assert not is_held_out("triple", objects[0][0], relation, objects[1][0])
            assert {"is_relation", "is_reverse_relation", "is_there"} <= asked
    assert shown <= names
    assert len(shown) > NUM_EACH
    assert [s.record for s in recipe.samples("train")] == [s.record for s in samples]
    assert [s.record for s in recipe.samples("val")] != [s.record for s in samples]
