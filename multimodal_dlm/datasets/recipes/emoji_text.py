"""Recipe `emoji_text`: names, tags and kinds of emoji as text alone, without pictures."""

from collections.abc import Iterator
from functools import cached_property

from multimodal_dlm.datasets.recipes.base import Recipe, register_recipe
from multimodal_dlm.datasets.recipes.emoji import category
from multimodal_dlm.datasets.recipes.emoji_catalogue import EMOJIBASE, Concept, load_concepts
from multimodal_dlm.datasets.sampling import KeyedDraws, hash_fraction
from multimodal_dlm.datasets.schema import QuestionAnswer, Record, Sample
from multimodal_dlm.datasets.wording import with_article


@register_recipe
class EmojiTextRecipe(Recipe):
    """What are the tags of a name, what has these tags, what kind of thing is it."""

    name = "emoji_text"
    version = 2
    packages = (EMOJIBASE,)
    splits = ("train", "val", "test")
    caption_templates = ("{a name}. tags: {up to three tags}",)
    weight = 5
    tasks = {"text": 3, "unconditional_text": 1}

    @cached_property
    def concepts(self) -> dict[str, list[Concept]]:
        """Concepts with tags by split, ordered by hash."""
        found = [concept for concept in load_concepts(self.sources).values() if _tags(concept)]
        found.sort(key=lambda concept: hash_fraction("text order", concept.hexcode))
        return {split: [c for c in found if c.split == split] for split in self.splits}

    def count(self, split: str) -> int:
        """One sample for each concept."""
        return len(self.concepts[split])

    def samples(self, split: str) -> Iterator[Sample]:
        """Records without pictures."""
        for concept in self.concepts[split]:
            yield Sample(_record(concept, split))


def _tags(concept: Concept) -> list[str]:
    return [tag for tag in concept.tags if tag != concept.name]


def _record(concept: Concept, split: str) -> Record:
    tags = _tags(concept)
    draws = KeyedDraws(0, f"emoji_text/{concept.hexcode}")
    listed = ", ".join(tags[i] for i in sorted(draws.permutation(len(tags))[:3]))
    kind = category(concept.subgroup, concept.group)
    return Record(
        key=f"text-{concept.hexcode}",
        source="emoji_text",
        split=split,
        license=EMOJIBASE.license,
        captions=(f"{with_article(concept.name)}. tags: {listed}",),
        qa=(
            QuestionAnswer(f"tags of {with_article(concept.name)}?", listed, "tags"),
            QuestionAnswer(f"what has the tags {listed}?", concept.name, "name"),
            QuestionAnswer(f"what is {with_article(concept.name)}?", kind, "category"),
        ),
        meta={"concept": concept.name, "hexcode": concept.hexcode, "family": concept.family},
    )
