"""What a recipe is, and the table they are registered in."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

from multimodal_dlm.datasets.fetching import SourceFolder, SourcePackage
from multimodal_dlm.datasets.schema import Sample
from multimodal_dlm.errors import ConfigError, unknown_name

RECIPES: dict[str, type["Recipe"]] = {}


class Recipe(ABC):
    """Makes the samples of one source from published packages, the same ones every time.

    Attributes:
        name: Name of the recipe and of its source in manifests.
        version: Raised whenever the samples change.
        packages: What it reads.
        splits: Names of its splits, `train` first.
        caption_templates: What each place in a record's captions holds.
        weight: Share in the released mixture, in percent.
        tasks: Task shares in the released mixture, integers.
        caption_weights: Weights of the captions by task; tasks that are not named draw evenly.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1
    packages: ClassVar[Sequence[SourcePackage]]
    splits: ClassVar[tuple[str, ...]]
    caption_templates: ClassVar[tuple[str, ...]]
    weight: ClassVar[int]
    tasks: ClassVar[Mapping[str, int]]
    caption_weights: ClassVar[Mapping[str, Sequence[int]]] = {}

    def __init__(self, sources: SourceFolder) -> None:
        self.sources = sources

    @abstractmethod
    def count(self, split: str) -> int:
        """Number of samples of a split, for the progress bar."""

    @abstractmethod
    def samples(self, split: str) -> Iterator[Sample]:
        """The samples of a split in an order fixed by hashes: any start of it is representative."""


def register_recipe(recipe: type[Recipe]) -> type[Recipe]:
    """Class decorator that enters a recipe under its name.

    Raises:
        ConfigError: When the name is taken.
    """
    if recipe.name in RECIPES:
        raise ConfigError(f"Recipe names must be unique; got `{recipe.name}` twice. Rename one.")
    RECIPES[recipe.name] = recipe
    return recipe


def get_recipe(name: str) -> type[Recipe]:
    """The recipe of a name.

    Raises:
        ConfigError: Listing the known recipes.
    """
    if name not in RECIPES:
        raise unknown_name("recipe", name, RECIPES)
    return RECIPES[name]
