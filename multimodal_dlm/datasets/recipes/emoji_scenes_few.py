"""Recipe `emoji_scenes_few`: scenes of two dozen things, where looking for a name is learned."""

from functools import cached_property

from multimodal_dlm.datasets.recipes.base import register_recipe
from multimodal_dlm.datasets.recipes.emoji_scenes import SCENE_STYLES, EmojiScenesRecipe
from multimodal_dlm.datasets.recipes.scene_plans import SceneObject
from multimodal_dlm.datasets.sampling import hash_fraction

CATEGORIES = ("an animal", "food", "a vehicle")
NUM_EACH = 8


@register_recipe
class FewScenesRecipe(EmojiScenesRecipe):
    """Scenes as `emoji_scenes`, of 24 things that all six styles draw, so each in many of them.

    "Is the A left of the B?" compares a name with what a place shows: neither name nor picture
    says anything about the answer alone. Of 24 names each is asked about often enough for the
    comparison to be found; of hundreds it is not (`docs/log.md`). Combinations that
    `emoji_scenes` holds out are left out here as well.
    """

    name = "emoji_scenes_few"
    version = 1
    splits = ("train", "val")
    weight = 10

    def count(self, split: str) -> int:
        """12,000 training scenes and 500 of `val`."""
        return 12_000 if split == "train" else 500

    @cached_property
    def objects(self) -> dict[str, list[SceneObject]]:
        """The first eight, ordered by hash, of each of three categories."""
        everything = super().objects["train"]
        complete = [thing for thing in everything if len(thing.styles) == len(SCENE_STYLES)]
        complete.sort(key=lambda thing: hash_fraction("few", thing.name))
        chosen = [
            thing
            for kind in CATEGORIES
            for thing in [each for each in complete if each.category == kind][:NUM_EACH]
        ]
        return {"train": sorted(chosen, key=lambda thing: thing.name)}
