"""Dataset recipes. A new one is its own module and one import line here."""

import multimodal_dlm.datasets.recipes.easy_vqa
import multimodal_dlm.datasets.recipes.emoji
import multimodal_dlm.datasets.recipes.emoji_moved
import multimodal_dlm.datasets.recipes.emoji_scenes
import multimodal_dlm.datasets.recipes.emoji_text
import multimodal_dlm.datasets.recipes.reasoning  # noqa: F401
from multimodal_dlm.datasets.recipes.base import RECIPES, Recipe, get_recipe, register_recipe

__all__ = ["RECIPES", "Recipe", "get_recipe", "register_recipe"]
