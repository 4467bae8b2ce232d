"""What one sample is: a record, usually a picture, and the rules both must keep.

In a shard a sample is `<key>.png` (or jpg, webp; absent for text-only sources), `<key>.json` (the
record) and `<key>.txt` (the first caption, for other readers).
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from multimodal_dlm.errors import DataError, unknown_name
from multimodal_dlm.intake import decode_image

KEY_RULE = re.compile(r"[a-z0-9][a-z0-9_-]{0,127}")
IMAGE_EXTENSIONS = ("png", "jpg", "webp")
MAX_TEXT_CHARACTERS = 4096
MAX_TEXTS = 256
ENTRIES = ("key", "source", "split", "license", "captions", "qa", "meta")
# Control characters but tab and line feed, and halves of surrogate pairs.
_UNFIT = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


@dataclass(frozen=True)
class QuestionAnswer:
    """A question about the sample with its closed-form answer.

    Args:
        question: Text of the question.
        answer: Text of the answer.
        type: Kind of question, for accuracies by kind, such as `count` or `is_there`.
    """

    question: str
    answer: str
    type: str


@dataclass(frozen=True)
class Record:
    """The words and the provenance of a sample: the content of `<key>.json`.

    Args:
        key: Unique in its source; lower-case letters, digits, `-` and `_`.
        source: Name of the source, such as `emoji`.
        split: Name of the split it belongs to.
        license: SPDX expression of the sample.
        captions: At least one caption; the place in the tuple says which template it came from.
        qa: Questions with answers.
        meta: JSON values that describe the sample: concept, style, package and version, ...
    """

    key: str
    source: str
    split: str
    license: str
    captions: tuple[str, ...]
    qa: tuple[QuestionAnswer, ...] = ()
    meta: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON values."""
        return {
            "key": self.key,
            "source": self.source,
            "split": self.split,
            "license": self.license,
            "captions": list(self.captions),
            "qa": [{"question": q.question, "answer": q.answer, "type": q.type} for q in self.qa],
            "meta": dict(self.meta),
        }

    def to_json(self) -> bytes:
        """The record as canonical JSON bytes."""
        return json.dumps(self.to_dict(), ensure_ascii=False, sort_keys=True).encode()

    @classmethod
    def from_json(cls, data: bytes, where: str) -> "Record":
        """Read and validate a record.

        Args:
            data: Bytes of the json member.
            where: Shard and key, for the error message.

        Raises:
            DataError: When the bytes are no valid record.
        """
        try:
            content = json.loads(
                data.decode(), object_pairs_hook=_pairs, parse_constant=_refuse_constant
            )
        except (ValueError, RecursionError, MemoryError) as error:
            raise _no_record(where, error) from error
        return cls.from_dict(content, where)

    @classmethod
    def from_dict(cls, content: Any, where: str) -> "Record":
        """Validate the JSON values of a record.

        Args:
            content: As written by `to_dict`.
            where: Shard and key, for the error message.

        Raises:
            DataError: When they are no valid record.
        """
        try:
            for name in content:
                if name not in ENTRIES:
                    raise TypeError(str(unknown_name("entry", str(name), ENTRIES)))
            for name in ("captions", "qa"):
                if not isinstance(content.get(name, []), list):
                    raise TypeError(f"`{name}` must be a list")
            record = cls(
                key=content["key"],
                source=content["source"],
                split=content["split"],
                license=content["license"],
                captions=tuple(content["captions"]),
                qa=tuple(
                    QuestionAnswer(q["question"], q["answer"], q["type"])
                    for q in content.get("qa", ())
                ),
                meta=content.get("meta", {}),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise _no_record(where, error) from error
        record.validate(where)
        return record

    def validate(self, where: str) -> None:  # noqa: C901 - one rule after the other
        """Check every rule of the record.

        Raises:
            DataError: Naming the place and the rule that is broken.
        """

        def fail(rule: str, value: object) -> None:
            message = f"{where}: {rule}; got {shown(value)}. Rebuild the shard."
            raise DataError(message, reason="record")

        if not isinstance(self.key, str) or not KEY_RULE.fullmatch(self.key):
            fail("`key` must be lower-case letters, digits, `-` and `_`", self.key)
        for name in ("source", "split", "license"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value:
                fail(f"`{name}` must be a text that is not empty", value)
        if not 1 <= len(self.captions) <= MAX_TEXTS:
            fail(f"`captions` must hold 1 to {MAX_TEXTS} texts", len(self.captions))
        if len(self.qa) > MAX_TEXTS:
            fail(f"`qa` must hold at most {MAX_TEXTS} questions", len(self.qa))
        for text in (*self.captions, *(p for q in self.qa for p in (q.question, q.answer, q.type))):
            if not isinstance(text, str) or not 0 < len(text) <= MAX_TEXT_CHARACTERS:
                fail(f"texts must have 1 to {MAX_TEXT_CHARACTERS} characters", text)
            elif _UNFIT.search(text):
                fail("texts must have no control characters and no halves of surrogate pairs", text)
        if not isinstance(self.meta, Mapping):
            fail("`meta` must be a mapping", self.meta)


def shown(value: object) -> str:
    """A value for a message: ASCII, short, no control characters."""
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _no_record(where: str, error: BaseException) -> DataError:
    return DataError(
        f"The record of {where} must be JSON with key, source, split, license and captions; got"
        f" {type(error).__name__}: {str(error)[:200]}. Rebuild the shard.",
        reason="record",
    )


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a name occurs twice in an object")
    return content


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


@dataclass(frozen=True)
class Sample:
    """A record and the bytes of its picture, which are decoded when first asked for.

    Args:
        record: The words and the provenance.
        image_bytes: Encoded picture; None for a text-only sample.
        where: Shard and key, for error messages.
        source: Name of the source in the manifest.
        index: Place of the sample in its source's split, 0-based.
    """

    record: Record
    image_bytes: bytes | None = None
    where: str = ""
    source: str = ""
    index: int = 0

    @property
    def key(self) -> str:
        """Key of the record."""
        return self.record.key

    @cached_property
    def image(self) -> np.ndarray:
        """The picture, uint8 (height, width, 3).

        Raises:
            DataError: When the sample has no picture or its bytes are not a permitted one.
        """
        if self.image_bytes is None:
            raise DataError(
                f"{self.where or self.key} has no picture. Give text-only sources tasks without"
                " pictures only.",
                reason="picture",
            )
        return decode_image(self.image_bytes, self.where or self.key)
