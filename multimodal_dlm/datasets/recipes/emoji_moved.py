"""Recipe `emoji_moved`: the training drawings of `emoji` six more times each, moved about."""

from collections.abc import Iterator
from functools import cached_property

from multimodal_dlm.datasets.recipes.base import register_recipe
from multimodal_dlm.datasets.recipes.emoji import (
    EmojiRecipe,
    distracting_categories,
    emoji_sample,
)
from multimodal_dlm.datasets.recipes.emoji_catalogue import Drawing, load_drawings
from multimodal_dlm.datasets.recipes.emoji_rendering import rasterise
from multimodal_dlm.datasets.sampling import hash_fraction
from multimodal_dlm.datasets.schema import Sample

FIRST_RENDERING = 2  # `emoji` has 0 and 1.
NUM_RENDERINGS = 6
SMALLEST = 42
LARGEST_SHIFT = 11


@register_recipe
class EmojiMovedRecipe(EmojiRecipe):
    """Six more renderings of each training drawing of `emoji`: 42 to 62 pixels, anywhere.

    For reading: a picture that is to be named is then rarely twice the same.
    """

    name = "emoji_moved"
    version = 1
    splits = ("train",)
    weight = 1
    tasks = {"caption": 1}
    caption_weights = {"caption": (0, 1, 0, 0)}

    @cached_property
    def drawings(self) -> dict[str, list[Drawing]]:
        """Training drawings, ordered by hash."""
        found = [d for d in load_drawings(self.sources) if d.split == "train"]
        found.sort(key=lambda d: hash_fraction("moved order", d.concept.hexcode, d.style))
        return {"train": found}

    def count(self, split: str) -> int:
        """Six renderings of each drawing."""
        return len(self.drawings[split]) * NUM_RENDERINGS

    def samples(self, split: str) -> Iterator[Sample]:
        """Render a split; the renderings of a drawing follow each other."""
        drawings = self.drawings[split]
        for drawing, other in zip(drawings, distracting_categories(drawings), strict=True):
            sprite = rasterise(drawing.svg)
            for rendering in range(FIRST_RENDERING, FIRST_RENDERING + NUM_RENDERINGS):
                yield emoji_sample(
                    drawing,
                    sprite,
                    split,
                    rendering,
                    other,
                    source=self.name,
                    smallest=SMALLEST,
                    largest_shift=LARGEST_SHIFT,
                )
