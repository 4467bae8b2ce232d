"""Every saved picture carries its recipe: what made it, as JSON in the PNG's own metadata."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from multimodal_dlm.errors import ConfigError, DataError
from multimodal_dlm.intake import read_picture

RECIPE_KEY = "multimodal_dlm"  # The text chunk of the PNG.
INFO_KEY = "recipe"  # The entry of `image.info` of a picture in memory.


def attach_recipe(image: Image.Image, recipe: Mapping[str, Any]) -> Image.Image:
    """Store a recipe in `image.info` and return the picture."""
    image.info[INFO_KEY] = dict(recipe)
    return image


def save_image(
    image: Image.Image, path: str | Path, recipe: Mapping[str, Any] | None = None
) -> Path:
    """Save a picture as PNG with its recipe inside.

    Args:
        image: Picture; one from a pipeline holds its recipe in `image.info["recipe"]`.
        path: File ending in `.png`; missing folders are made.
        recipe: JSON values; None takes the picture's own, an empty one leaves none in the file.

    Returns:
        The path.

    Raises:
        ConfigError: When the path does not end in `.png` or the recipe is no JSON.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ConfigError(
            f"`path` must end in `.png`, which keeps the recipe; got `{path.name}`. Use"
            f" `{path.with_suffix('.png').name}`."
        )
    info = recipe_chunk(image, recipe)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, format="PNG", pnginfo=info)
    return path


def recipe_chunk(image: Image.Image, recipe: Mapping[str, Any] | None = None) -> PngInfo:
    """The text chunk of a PNG that holds a recipe, for `Image.save(..., pnginfo=...)`.

    Args:
        image: Picture; one from a pipeline holds its recipe in `image.info["recipe"]`.
        recipe: JSON values; None takes the picture's own, an empty one leaves none in the file.

    Raises:
        ConfigError: When the recipe is no JSON.
    """
    chosen = image.info.get(INFO_KEY, {}) if recipe is None else recipe
    info = PngInfo()
    if chosen:
        try:
            info.add_itxt(RECIPE_KEY, json.dumps(chosen, ensure_ascii=False, sort_keys=True))
        except TypeError as error:
            raise ConfigError(f"`recipe` must hold JSON values only; {error}.") from error
    return info


def read_recipe(path: str | Path) -> dict[str, Any]:
    """Read the recipe of a saved picture.

    Raises:
        DataError: When `multimodal_dlm.intake` refuses the picture, or it holds no recipe.
    """
    text = read_picture(
        path,
        lambda image: getattr(image, "text", {}).get(RECIPE_KEY),
        where=f"`{path}` is not a readable picture",
    )
    if text is None:
        raise DataError(f"`{path}` carries no recipe. Save pictures with `save_image`.")
    try:
        recipe = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"The recipe of `{path}` is damaged: {error}.") from error
    return recipe
