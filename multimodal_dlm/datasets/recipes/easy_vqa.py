"""Recipe `easy_vqa`: one coloured shape on a pale background, with questions (Zhou 2020, MIT)."""

from collections import defaultdict
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from types import ModuleType

import numpy as np

from multimodal_dlm.datasets.fetching import SourcePackage
from multimodal_dlm.datasets.recipes.base import Recipe, register_recipe
from multimodal_dlm.datasets.sampling import hash_fraction
from multimodal_dlm.datasets.schema import QuestionAnswer, Record, Sample
from multimodal_dlm.errors import DataError
from multimodal_dlm.intake import decode_image

VAL_SHARE = 0.05
SHAPES = ("circle", "rectangle", "triangle")
PALETTE = {
    "black": (0, 0, 0), "blue": (0, 0, 255), "brown": (165, 42, 42), "gray": (128, 128, 128),
    "green": (0, 255, 0), "red": (255, 0, 0), "teal": (0, 128, 128), "yellow": (255, 255, 0),
}  # fmt: skip
COLOURS = tuple(PALETTE)
_NEGATIONS = {"not", "no"}


@register_recipe
class EasyVqaRecipe(Recipe):
    """The packaged pictures and questions; the official test split, and 5 % of train as val."""

    name = "easy_vqa"
    version = 4
    packages = (
        SourcePackage(
            "easy-vqa", "1.0", "pypi", "MIT", "Victor Zhou, https://github.com/vzhou842/easy-VQA"
        ),
    )
    splits = ("train", "val", "test")
    caption_templates = ("a {colour} {shape} on a pale background",)
    weight = 20
    tasks = {
        "vqa": 50,
        "caption": 20,
        "text_to_image": 25,
        "unconditional_image": 3,
        "unconditional_text": 2,
    }

    @cached_property
    def _pictures(self) -> dict[str, list[tuple[int, Path]]]:
        package = _package()
        train = sorted(package.get_train_image_paths().items(), key=_shuffled)
        is_val = {number: hash_fraction("easy-vqa val", number) < VAL_SHARE for number, _ in train}
        return {
            "train": [(n, Path(path)) for n, path in train if not is_val[n]],
            "val": [(n, Path(path)) for n, path in train if is_val[n]],
            "test": [
                (n, Path(path))
                for n, path in sorted(package.get_test_image_paths().items(), key=_shuffled)
            ],
        }

    @cached_property
    def _questions(self) -> dict[str, dict[int, list[QuestionAnswer]]]:
        package = _package()
        found = {}
        for split, rows in (
            ("train", package.get_train_questions()),
            ("test", package.get_test_questions()),
        ):
            by_picture: dict[int, list[QuestionAnswer]] = defaultdict(list)
            for question, answer, number in zip(*rows, strict=True):
                by_picture[number].append(
                    QuestionAnswer(question, answer, question_type(question, answer))
                )
            found[split] = by_picture
        return found

    def count(self, split: str) -> int:
        """One sample for each picture."""
        return len(self._pictures[split])

    def samples(self, split: str) -> Iterator[Sample]:
        """Pictures as published, with all their questions."""
        origin = "test" if split == "test" else "train"
        for number, path in self._pictures[split]:
            questions = self._questions[origin][number]
            data = path.read_bytes()
            pixels = decode_image(data, str(path))
            colour = deduce(questions, COLOURS) or colour_in(pixels)
            shape = deduce(questions, SHAPES) or shape_in(pixels)
            record = Record(
                key=f"{origin}-{number:05d}",
                source="easy_vqa",
                split=split,
                license="MIT",
                captions=(f"a {colour} {shape} on a pale background",),
                qa=tuple(questions),
                meta={
                    "color": colour,
                    "shape": shape,
                    "package": "easy-vqa@1.0",
                    "credit": self.packages[0].credit,
                },
            )
            yield Sample(record, data)


def question_type(question: str, answer: str) -> str:
    """`shape`, `color`, or for yes/no `is_shape`, `is_color`, `is_not_shape`, `is_not_color`."""
    if answer in SHAPES:
        return "shape"
    if answer in COLOURS:
        return "color"
    asked = "color" if set(COLOURS) & set(question.rstrip("?").split()) else "shape"
    return f"is_not_{asked}" if is_negated(question) else f"is_{asked}"


def is_negated(question: str) -> bool:
    """Whether a yes/no question asks for what is absent."""
    return bool(_NEGATIONS & set(question.split()))


def deduce(questions: list[QuestionAnswer], words: tuple[str, ...]) -> str | None:
    """The word among `words` that a picture's own questions settle; None when they do not."""
    left = set(words)
    for asked in questions:
        named = [word for word in words if word in asked.question.rstrip("?").split()]
        if asked.answer in words:
            return asked.answer
        if asked.answer not in ("yes", "no"):
            # `what is the blue shape?` tells the colour, `what color is the circle?` the shape.
            if named:
                return named[0]
            continue
        if len(named) == 1 and (asked.answer == "yes") != is_negated(asked.question):
            return named[0]
        left -= set(named)
    return left.pop() if len(left) == 1 else None


def colour_in(pixels: np.ndarray) -> str:
    """The name of the shape's colour."""
    colour = _shape_colour(pixels).astype(int)
    return min(PALETTE, key=lambda name: int(np.abs(colour - PALETTE[name]).sum()))


def shape_in(pixels: np.ndarray) -> str:
    """The shape by how much of its bounding box it fills: all, pi / 4, or half."""
    is_shape = (pixels != _shape_colour(pixels)).sum(axis=2) == 0
    rows, columns = np.nonzero(is_shape.any(axis=1))[0], np.nonzero(is_shape.any(axis=0))[0]
    box = (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)
    share = is_shape.sum() / box
    return "rectangle" if share > 0.95 else "circle" if share > 0.65 else "triangle"


def _shape_colour(pixels: np.ndarray) -> np.ndarray:
    """The most frequent colour but one: the most frequent is the background's."""
    colours, counts = np.unique(pixels.reshape(-1, 3), axis=0, return_counts=True)
    return colours[np.argsort(-counts)[1]]


def _shuffled(item: tuple[int, str]) -> float:
    return hash_fraction("easy-vqa order", item[0])


def _package() -> ModuleType:
    try:
        import easy_vqa
    except ModuleNotFoundError as error:
        raise DataError(
            "Recipe `easy_vqa` needs the package `easy-vqa`, which is not installed. Run"
            " `pip install 'multimodal-dlm[data]'`."
        ) from error
    return easy_vqa
