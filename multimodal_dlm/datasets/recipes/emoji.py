"""Recipe `emoji`: nine sets of emoji with names, tags, styles and named backgrounds."""

from collections import Counter
from collections.abc import Iterator
from functools import cached_property

import numpy as np
from PIL import Image

from multimodal_dlm.datasets.recipes.base import Recipe, register_recipe
from multimodal_dlm.datasets.recipes.emoji_catalogue import (
    PACKAGES,
    STYLES,
    Drawing,
    load_drawings,
)
from multimodal_dlm.datasets.recipes.emoji_rendering import (
    BACKGROUNDS,
    IMAGE_SIZE,
    WHITE_SHARE,
    new_canvas,
    place,
    rasterise,
    to_pixels,
)
from multimodal_dlm.datasets.sampling import KeyedDraws, hash_fraction
from multimodal_dlm.datasets.schema import QuestionAnswer, Record, Sample
from multimodal_dlm.datasets.wording import with_article
from multimodal_dlm.intake import encode_png

CENTRED_SIZE = 58
LARGEST_SIZE = 62
MAX_NAME_WORDS = 3  # Longer names are no closed-form answers.
DUPLICATE_COSINE = 0.98

# What a subgroup of Unicode is, by the start of its name; the first match counts.
_CATEGORIES = (
    ("animal", "an animal"), ("cat-face", "a face"), ("monkey-face", "a face"),
    ("plant", "a plant"), ("food", "food"), ("drink", "a drink"), ("dishware", "an object"),
    ("transport-sign", "a sign"), ("transport", "a vehicle"), ("place", "a place"),
    ("hotel", "an object"), ("time", "a clock"), ("sky", "the sky or weather"),
    ("sport", "a sport or game"), ("game", "a sport or game"), ("award", "an award"),
    ("face", "a face"), ("heart", "a heart"), ("emotion", "a symbol"), ("hand", "a hand"),
    ("body", "a body part"), ("person", "a person"), ("family", "a person"),
    ("clothing", "clothing"), ("music", "music"), ("country", "a flag"), ("flag", "a flag"),
    ("subdivision", "a flag"), ("event", "an object"), ("arts", "an object"),
)  # fmt: skip
_SYMBOL_GROUP = "symbols"


def category(subgroup: str, group: str) -> str:
    """What kind of thing a concept is, with its article."""
    for start, word in _CATEGORIES:
        if subgroup.startswith(start):
            return word
    return "a symbol" if group == _SYMBOL_GROUP else "an object"


@register_recipe
class EmojiRecipe(Recipe):
    """Single emoji, 64 x 64; two renderings of each training drawing, one of the others."""

    name = "emoji"
    version = 2
    packages = PACKAGES
    splits = ("train", "val", "test", "unseen_combinations")
    caption_templates = (
        "{name}",
        "a {style} emoji of {a name}",
        "{a name}, {style} style, on a {background} background",
        "a picture of {a name}. tags: {two or three tags}",
    )
    weight = 40
    tasks = {
        "text_to_image": 45,
        "caption": 30,
        "joint": 15,
        "unconditional_image": 6,
        "unconditional_text": 4,
    }
    caption_weights = {
        "text_to_image": (2, 3, 3, 2),
        "caption": (0, 1, 0, 0),
        "joint": (0, 1, 1, 0),
        "unconditional_text": (0, 1, 0, 0),
    }

    @cached_property
    def drawings(self) -> dict[str, list[Drawing]]:
        """Drawings by split, near duplicates of training drawings left out, ordered by hash."""
        everything = load_drawings(self.sources)
        everything.sort(key=lambda d: hash_fraction("order", d.concept.hexcode, d.style))
        return drop_duplicates(everything, self.splits)

    def count(self, split: str) -> int:
        """Two renderings of each training drawing, one of each other."""
        return len(self.drawings[split]) * num_renderings(split)

    def samples(self, split: str) -> Iterator[Sample]:
        """Render a split."""
        drawings = self.drawings[split]
        distractors = distracting_categories(drawings)
        for drawing, other in zip(drawings, distractors, strict=True):
            sprite = rasterise(drawing.svg)
            for rendering in range(num_renderings(split)):
                yield emoji_sample(drawing, sprite, split, rendering, other)


def num_renderings(split: str) -> int:
    """How often a drawing of a split is rendered."""
    return 2 if split == "train" else 1


def drop_duplicates(drawings: list[Drawing], splits: tuple[str, ...]) -> dict[str, list[Drawing]]:
    """Sort drawings into splits, leaving out held-out ones that look like a training drawing.

    Two drawings are near duplicates when the cosine of their 16 x 16 pictures, each less its mean,
    exceeds 0.98 (pixels, not network features: building needs no weights).
    """
    features = np.stack([_thumbnail(drawing) for drawing in drawings])
    is_train = np.array([drawing.split == "train" for drawing in drawings])
    closest = (features[~is_train] @ features[is_train].T).max(axis=1, initial=-1.0)
    nearest = iter(closest)
    by_split: dict[str, list[Drawing]] = {split: [] for split in splits}
    for drawing in drawings:
        if drawing.split == "train" or next(nearest) <= DUPLICATE_COSINE:
            by_split[drawing.split].append(drawing)
    return by_split


def _thumbnail(drawing: Drawing) -> np.ndarray:
    canvas = new_canvas("white")
    place(canvas, rasterise(drawing.svg), (IMAGE_SIZE // 2, IMAGE_SIZE // 2), CENTRED_SIZE)
    small = canvas.convert("RGB").reduce(4)
    vector = np.asarray(small, dtype=np.float32).ravel()
    vector = vector - vector.mean()
    return vector / max(float(np.linalg.norm(vector)), 1e-6)


def balanced_distractors(categories: list[str]) -> list[str]:
    """A wrong category for each item, so that every question has as many yes as no.

    The items, sorted by category, are matched with themselves shifted by the size of the largest
    category: nobody meets its own (unless one category holds more than half of all items).
    """
    order = sorted(range(len(categories)), key=lambda i: (categories[i], i))
    shift = max(Counter(categories).values(), default=0)
    wrong = [""] * len(categories)
    for position, index in enumerate(order):
        wrong[index] = categories[order[(position + shift) % len(order)]]
    return wrong


def distracting_categories(drawings: list[Drawing]) -> list[str]:
    """A wrong category for each drawing, see `balanced_distractors`."""
    return balanced_distractors([_category(drawing) for drawing in drawings])


def _category(drawing: Drawing) -> str:
    return category(drawing.concept.subgroup, drawing.concept.group)


def emoji_sample(
    drawing: Drawing,
    sprite: Image.Image,
    split: str,
    rendering: int,
    distractor: str,
    *,
    source: str = "emoji",
    smallest: int = 46,
    largest_shift: int = 3,
) -> Sample:
    """One rendering of a drawing: number 0 is centred, others are moved about.

    Args:
        drawing: What is drawn.
        sprite: Its pixels, from `rasterise`.
        split: Split of the record.
        rendering: Number of the rendering; with hexcode and style it decides everything random.
        distractor: A wrong category for the question about it.
        source: Source of the record.
        smallest: Smallest size of a rendering that is not centred, an even number of pixels; the
            largest is 62.
        largest_shift: How far its centre may lie from that of the picture, in pixels either way;
            less where it would leave the picture.
    """
    concept, style = drawing.concept, STYLES[drawing.style]
    key = f"{concept.hexcode}-{drawing.style}-{rendering}"
    draws = KeyedDraws(0, f"emoji/{key}")
    background = "white"
    if draws.uniform() >= WHITE_SHARE:
        background = draws.choice([name for name in BACKGROUNDS if name != "white"])
    size, centre = CENTRED_SIZE, (IMAGE_SIZE // 2, IMAGE_SIZE // 2)
    if rendering:
        size = smallest + 2 * draws.integer((LARGEST_SIZE - smallest) // 2 + 1)
        slack = min(largest_shift, (IMAGE_SIZE - size) // 2)
        x, y = (IMAGE_SIZE // 2 + draws.integer(2 * slack + 1) - slack for _ in range(2))
        centre = (x, y)
    canvas = new_canvas(background)
    place(canvas, sprite, centre, size)
    record = Record(
        key=key,
        source=source,
        split=split,
        license=style.package.license,
        captions=_captions(drawing, background, draws),
        qa=_questions(drawing, background, distractor),
        meta={
            "concept": concept.name,
            "hexcode": concept.hexcode,
            "family": concept.family,
            "style": style.word,
            "artist": style.artist,
            "background": background,
            "group": concept.group,
            "subgroup": concept.subgroup,
            "category": _category(drawing),
            "rendering": {"size": size, "centre": list(centre)},
            "package": f"{style.package.name}@{style.package.version}",
            "credit": style.package.credit,
        },
    )
    return Sample(record, encode_png(to_pixels(canvas)))


def _captions(drawing: Drawing, background: str, draws: KeyedDraws) -> tuple[str, ...]:
    name, style = drawing.concept.name, STYLES[drawing.style].word
    named = with_article(name)
    tags = [tag for tag in drawing.concept.tags if tag not in name.split() and tag != name]
    chosen = [tags[i] for i in draws.permutation(len(tags))[: 2 + draws.integer(2)]] if tags else []
    listed = f". tags: {', '.join(chosen)}" if chosen else ""
    return (
        name,
        f"{with_article(f'{style} emoji')} of {named}",
        f"{named}, {style} style, on {with_article(f'{background} background')}",
        f"a picture of {named}{listed}",
    )


def _questions(drawing: Drawing, background: str, distractor: str) -> tuple[QuestionAnswer, ...]:
    name = drawing.concept.name
    questions = [
        QuestionAnswer("which style?", STYLES[drawing.style].word, "style"),
        QuestionAnswer("what color is the background?", background, "background"),
        QuestionAnswer(f"is it {_category(drawing)}?", "yes", "category"),
        QuestionAnswer(f"is it {distractor}?", "no", "category"),
    ]
    if len(name.split()) <= MAX_NAME_WORDS:
        questions.append(QuestionAnswer("what is this?", name, "name"))
    return tuple(questions)
