"""Recipe `reasoning`: counted bits and matrix exercises from the generators of reasoning-gym.

Items are rendered in words and numbers that are one token each in `tokenizers/reasoning`, so a text
has as many tokens as words. A tenth of the records also ask their question behind worked
examples of the same task, packed to at most 1,024 tokens with the answer.
"""

import importlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, count, islice
from typing import Any

from multimodal_dlm.datasets.fetching import SourcePackage
from multimodal_dlm.datasets.recipes.base import Recipe, register_recipe
from multimodal_dlm.datasets.sampling import KeyedDraws, hash_fraction
from multimodal_dlm.datasets.schema import QuestionAnswer, Record, Sample
from multimodal_dlm.errors import DataError

REASONING_GYM = SourcePackage(
    "reasoning-gym", "0.1.25", "pypi", "Apache-2.0",
    "Open-Thought community, https://github.com/open-thought/reasoning-gym",
)  # fmt: skip
MAX_TOKENS = 1024
NUM_MARKERS = 3  # `<bos>`, and an `<eos>` behind prompt and answer.
NUM_EXAMPLES = 256  # Items of each task that prompts take their worked examples from.
FEW_SHOT_SHARE = 0.1
SEPARATOR = "|"
MIN_CHANGED = 6  # Cells; answers that are all but a copy teach and test little.
_EDGES = {"val": 0.04, "test": 0.12}  # Upper ends of the hash ranges; the rest is `train`.
_SIZE = 10**9  # Generators are asked for items by number; none is ever out of range.


@dataclass(frozen=True)
class Item:
    """A question with its worked answer.

    Args:
        task: Name of its task.
        number: Number of the item in the generator.
        question: Words, ending with `=`.
        answer: Words.
    """

    task: str
    number: int
    question: str
    answer: str

    @property
    def split(self) -> str:
        """The split its question falls into, whoever asks it."""
        fraction = hash_fraction("reasoning split", self.question)
        return next((name for name, edge in _EDGES.items() if fraction < edge), "train")


class Task(ABC):
    """A generator of reasoning-gym and how its items are written down.

    Attributes:
        name: Name of the generator.
        options: Its options.
    """

    name: str
    options: Mapping[str, Any]

    @cached_property
    def generator(self) -> Any:
        """The generator; item n is a function of its options and n.

        Raises:
            DataError: When the package is missing.
        """
        try:
            create_dataset = importlib.import_module("reasoning_gym").create_dataset
        except ModuleNotFoundError as error:
            raise DataError(
                "Recipe `reasoning` needs the package `reasoning-gym`, which is not installed. Run"
                " `pip install 'multimodal-dlm[reasoning]'`."
            ) from error
        return create_dataset(self.name, size=_SIZE, seed=0, **self.options)

    def items(self) -> Iterator[Item]:
        """All items that can be written down, each question once, without end."""
        seen = set()
        for number in count():
            written = self.write(self.generator[number])
            if written is not None and written[0] not in seen:
                seen.add(written[0])
                yield Item(self.name, number, *written)

    @abstractmethod
    def write(self, entry: Mapping[str, Any]) -> tuple[str, str] | None:
        """Question and worked answer of an entry; None for one that is left out."""

    @abstractmethod
    def result(self, answer: str) -> str:
        """What `generator.score_answer` takes for a worked answer."""


class CountBits(Task):
    """Ones among twenty bits; the count so far is filled in behind each bit."""

    name = "count_bits"
    options = {"min_n": 2**19, "max_n": 2**20 - 1}

    def write(self, entry: Mapping[str, Any]) -> tuple[str, str] | None:
        """`ones : 1 ? 0 ? 1 ? =` and `1 1 0 1 1 2`."""
        bits = entry["metadata"]["binary"]
        counts = accumulate(map(int, bits))
        asked = " ".join(f"{bit} ?" for bit in bits)
        return f"ones : {asked} =", " ".join(
            f"{bit} {total}" for bit, total in zip(bits, counts, strict=True)
        )

    def result(self, answer: str) -> str:
        """The last count."""
        return answer.split()[-1] if answer else ""


class ManipulateMatrix(Task):
    """Matrices of six rows and seven columns in which multiples become zero, six cells or more."""

    name = "manipulate_matrix"
    options = {
        "min_rows": 6, "max_rows": 6, "min_cols": 7, "max_cols": 7,
        "min_transforms": 1, "max_transforms": 1,
    }  # fmt: skip

    def write(self, entry: Mapping[str, Any]) -> tuple[str, str] | None:
        """`zero multiples of 3 : 3 1 / 4 6 =` and `0 1 / 4 0`, rows parted by a slash."""
        (operation,) = entry["metadata"]["operations"]
        if operation["transform"] != "zero_divisible":
            return None
        before, after = (_rows(entry["metadata"][name]) for name in ("matrix", "solution"))
        if _num_changed(before, after) < MIN_CHANGED:
            return None
        return f"zero multiples of {operation['k']} : {before} =", after

    def result(self, answer: str) -> str:
        """Rows on lines of their own."""
        return answer.replace(" / ", "\n")


TASKS: dict[str, Task] = {task.name: task for task in (CountBits(), ManipulateMatrix())}


@register_recipe
class ReasoningRecipe(Recipe):
    """Questions with worked answers, alone and behind worked examples."""

    name = "reasoning"
    version = 3
    packages = (REASONING_GYM,)
    splits = ("train", "val", "test")
    caption_templates = ("{question} {answer}",)
    weight = 1
    tasks = {"text": 1}

    def count(self, split: str) -> int:
        """64,000 training questions, 500 and 1,000 of the others; tasks take turns."""
        return {"train": 64_000, "val": 500, "test": 1_000}[split]

    @cached_property
    def _examples(self) -> dict[str, list[Item]]:
        """Training items that prompts take their worked examples from."""
        return {
            name: list(islice(_of_split(task, "train"), NUM_EXAMPLES))
            for name, task in TASKS.items()
        }

    def samples(self, split: str) -> Iterator[Sample]:
        """Records without pictures, the tasks in turn."""
        streams = [_of_split(task, split) for task in TASKS.values()]
        for number in range(self.count(split)):
            yield Sample(self._record(next(streams[number % len(streams)]), split))

    def _record(self, item: Item, split: str) -> Record:
        draws = KeyedDraws(0, f"reasoning/{item.task}", item.number)
        asked = [QuestionAnswer(item.question, item.answer, item.task)]
        if draws.uniform() < FEW_SHOT_SHARE:
            others = [e for e in self._examples[item.task] if e.question != item.question]
            room = MAX_TOKENS - NUM_MARKERS - len(item.answer.split())
            most = len(pack_examples(item.question, others, room)[1])
            # Log-uniform: most prompts are short.
            wanted = math.floor((most + 1) ** draws.uniform())
            chosen = [others[place] for place in draws.permutation(len(others))[:wanted]]
            prompt, _ = pack_examples(item.question, chosen, room)
            asked.append(QuestionAnswer(prompt, item.answer, f"{item.task} few-shot"))
        return Record(
            key=f"{item.task.replace('_', '-')}-{item.number:07d}",
            source=self.name,
            split=split,
            license=REASONING_GYM.license,
            captions=(f"{item.question} {item.answer}",),
            qa=tuple(asked),
            meta={"task": item.task, "number": item.number},
        )


def pack_examples(question: str, examples: list[Item], max_tokens: int) -> tuple[str, list[Item]]:
    """A prompt of worked examples and a question.

    Args:
        question: What is asked at the end.
        examples: As many of them as fit come first, in this order.
        max_tokens: Most tokens of the prompt.

    Returns:
        The prompt, and the examples in it.
    """
    room = max_tokens - len(question.split())
    parts, chosen = [], []
    for example in examples:
        text = f"{example.question} {example.answer} {SEPARATOR}"
        room -= len(text.split())
        if room < 0:
            break
        parts.append(text)
        chosen.append(example)
    return " ".join([*parts, question]), chosen


def _of_split(task: Task, split: str) -> Iterator[Item]:
    """The items of a split in the generator's order."""
    return (item for item in task.items() if item.split == split)


def _num_changed(before: str, after: str) -> int:
    return sum(a != b for a, b in zip(before.split(), after.split(), strict=True))


def _rows(matrix: list[list[int]]) -> str:
    return " / ".join(" ".join(str(cell) for cell in row) for row in matrix)
