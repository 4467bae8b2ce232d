"""Recipe `emoji_scenes`: emoji counted, placed and related on 64 x 64 pixels."""

from collections import defaultdict
from collections.abc import Iterator
from functools import cached_property

from PIL import Image

from multimodal_dlm.datasets.recipes.base import Recipe, register_recipe
from multimodal_dlm.datasets.recipes.emoji import category
from multimodal_dlm.datasets.recipes.emoji_catalogue import (
    PACKAGES,
    STYLES,
    Concept,
    Drawing,
    load_drawings,
)
from multimodal_dlm.datasets.recipes.emoji_rendering import (
    crop_to_ink,
    new_canvas,
    place,
    rasterise,
    to_pixels,
)
from multimodal_dlm.datasets.recipes.scene_plans import SceneObject, ScenePlan, draw_plan
from multimodal_dlm.datasets.sampling import KeyedDraws
from multimodal_dlm.datasets.schema import Record, Sample
from multimodal_dlm.datasets.wording import is_plural, with_article
from multimodal_dlm.intake import encode_png

SCENE_STYLES = ("noto", "noto-v1", "twemoji", "fluent-emoji", "fluent-emoji-flat", "emojione")
MIN_STYLES = 4
MAX_WORDS = 2
# Which held-out rule each split must fall under; the others fall under none.
_RULES = {
    "test_triples": "triple",
    "test_style_background": "style_background",
    "test_counts": "count",
}
_LEGIBLE = {
    "an animal", "a plant", "food", "a drink", "a vehicle", "the sky or weather", "a heart",
    "a sport or game", "clothing", "music", "an object", "a place", "an award",
}  # fmt: skip


@register_recipe
class EmojiScenesRecipe(Recipe):
    """Scenes of one to four objects with captions and questions that have one answer."""

    name = "emoji_scenes"
    version = 3
    packages = PACKAGES
    splits = ("train", "val", "test", *_RULES, "test_objects")
    caption_templates = (
        "{scene}",
        "{scene} on a {background} background",
        "{scene}, {style} style, on a {background} background",
        "{scene in other words}",
    )
    weight = 35
    tasks = {
        "text_to_image": 30,
        "caption": 20,
        "vqa": 35,
        "joint": 10,
        "unconditional_image": 3,
        "unconditional_text": 2,
    }
    caption_weights = {
        "text_to_image": (2, 3, 3, 2),
        "caption": (0, 1, 0, 0),
        "joint": (0, 1, 1, 0),
        "unconditional_text": (0, 1, 0, 0),
    }

    def count(self, split: str) -> int:
        """48,000 training scenes and 1,000 of each other split."""
        return 48_000 if split == "train" else 1_000

    @cached_property
    def _drawings(self) -> dict[tuple[str, str], Drawing]:
        """Drawings of the six styles that scenes use, by name and style."""
        return {
            (d.concept.name, d.style): d
            for d in load_drawings(self.sources)
            if d.style in SCENE_STYLES
        }

    @cached_property
    def objects(self) -> dict[str, list[SceneObject]]:
        """What scenes may show, by split of the concept; held-out drawings are not used."""
        styles: dict[Concept, list[str]] = defaultdict(list)
        for drawing in self._drawings.values():
            styles[drawing.concept].append(drawing.style)
        found: dict[str, list[SceneObject]] = {"train": [], "test": []}
        for concept, drawn in sorted(styles.items(), key=lambda item: item[0].name):
            if concept.split not in found or len(drawn) < MIN_STYLES or not _is_plain(concept):
                continue
            allowed = tuple(
                s for s in drawn if self._drawings[concept.name, s].split == concept.split
            )
            if allowed:
                kind = category(concept.subgroup, concept.group)
                found[concept.split].append(SceneObject(concept.name, kind, allowed))
        return found

    def samples(self, split: str) -> Iterator[Sample]:
        """Draw plans until the split is full, keeping those that belong to it."""
        objects = self.objects["test" if split == "test_objects" else "train"]
        words = {style: STYLES[style].word for style in SCENE_STYLES}
        done = attempt = 0
        while done < self.count(split):
            plan = draw_plan(objects, words, KeyedDraws(0, f"scenes/{split}", attempt))
            attempt += 1
            if split != "test_objects" and plan.held_out != frozenset(
                [_RULES[split]] if split in _RULES else []
            ):
                continue
            yield self._sample(plan, split, done)
            done += 1

    @cached_property
    def _sprites(self) -> dict[tuple[str, str], Image.Image]:
        return {}

    def _sprite(self, name: str, style: str) -> Image.Image:
        if (name, style) not in self._sprites:
            self._sprites[name, style] = crop_to_ink(rasterise(self._drawings[name, style].svg))
        return self._sprites[name, style]

    def _sample(self, plan: ScenePlan, split: str, number: int) -> Sample:
        canvas = new_canvas(plan.background)
        for name, x, y, size in plan.placed:
            place(canvas, self._sprite(name, plan.style), (x, y), size)
        style = STYLES[plan.style]
        on_background = f"on {with_article(f'{plan.background} background')}"
        record = Record(
            key=f"{split.replace('_', '-')}-{number:05d}",
            source="emoji_scenes",
            split=split,
            license=style.package.license,
            captions=(
                plan.sentence,
                f"{plan.sentence} {on_background}",
                f"{plan.sentence}, {style.word} style, {on_background}",
                plan.alternative,
            ),
            qa=plan.questions,
            meta={
                "kind": plan.kind,
                "objects": [list(thing) for thing in plan.placed],
                "style": style.word,
                "artist": style.artist,
                "background": plan.background,
                "held_out": sorted(plan.held_out),
                "package": f"{style.package.name}@{style.package.version}",
                "credit": style.package.credit,
            },
        )
        return Sample(record, encode_png(to_pixels(canvas)))


def _is_plain(concept: Concept) -> bool:
    """Countable, with a short name, and legible at 26 pixels."""
    name = concept.name
    return (
        len(name.split()) <= MAX_WORDS
        and not is_plural(name)
        and with_article(name) != name
        and category(concept.subgroup, concept.group) in _LEGIBLE
        and concept.group not in ("flags", "people-body", "smileys-emotion", "symbols")
        or name in ("red heart", "star", "sun", "moon")
    )
