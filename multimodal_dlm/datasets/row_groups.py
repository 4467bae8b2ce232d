"""Row groups: hundreds of samples as token ids in one array, so that reading decodes nothing.

A pre-tokenized shard holds groups of up to 4,096 rows, one sample a row, in the order of the raw
shard it was made from. A group is two members: `<key>.ids.npy`, one flat array of codes (uint16, or
uint32 where a codebook is larger), and `<key>.json`, which holds each row's record and the lengths
of its parts: the picture's codes level by level, if it has one, then the codes of its captions,
then question, answer, question, answer, ... Codes are those of the tokenizers themselves, without
offset and without `<eos>`, so they fit every layout and text window. Nothing is pickled.
"""

import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from multimodal_dlm.datasets.schema import Record
from multimodal_dlm.errors import DataError

MIN_GROUP_ROWS, MAX_GROUP_ROWS = 256, 4096
MAX_IDS_BYTES = 256 * 2**20
IDS = "ids.npy"
TEXT_KINDS = ("captions", "questions")
# What numpy and json raise on bytes that only look right.
_BROKEN = (
    ArithmeticError, EOFError, KeyError, MemoryError, RecursionError, TypeError, ValueError,
)  # fmt: skip
_FORMAT = "multimodal_dlm.row_group/1"
Levels = tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Codebooks:
    """What the codes of a pre-tokenized source mean.

    Args:
        text: Fingerprint of the text tokenizer.
        text_size: Entries of the text tokenizer.
        image: Fingerprint of the image tokenizer.
        image_sizes: Codes of each level of the image tokenizer.
        grid: Height and width of the code grid of each level.
    """

    text: str
    text_size: int
    image: str
    image_sizes: tuple[int, ...]
    grid: tuple[int, int]

    @property
    def dtype(self) -> np.dtype:
        """Of the ids: uint16 where every code fits in it, else uint32."""
        return np.dtype(np.uint16 if max(self.text_size, *self.image_sizes) <= 2**16 else "uint32")

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self) | {"image_sizes": list(self.image_sizes), "grid": list(self.grid)}

    @classmethod
    def from_dict(cls, content: Any, where: str) -> "Codebooks":
        """Read what `to_dict` wrote.

        Raises:
            DataError: When it is something else.
        """
        try:
            height, width = (int(side) for side in content["grid"])
            return cls(
                text=str(content["text"]),
                text_size=int(content["text_size"]),
                image=str(content["image"]),
                image_sizes=tuple(int(size) for size in content["image_sizes"]),
                grid=(height, width),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{where}: `tokenized` must name fingerprints and sizes of both tokenizers; got"
                f" {type(error).__name__}: {error}. Run `multimodal-dlm data tokenize` again."
            ) from error


@dataclass(frozen=True)
class Row:
    """One sample as codes.

    Args:
        record: The words and the provenance.
        codes: One (h, w) array per level of the image tokenizer; None for text alone.
        texts: Codes of every caption, question and answer, by the text itself.
    """

    record: Record
    codes: Levels | None
    texts: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class RowGroup:
    """Some rows of a shard.

    Args:
        records: Record of each row.
        lengths: Lengths of each row's parts.
        ids: Codes of all parts of all rows, one after the other.
        codebooks: What the codes mean.
        made_from: SHA-256 of the raw shard.
    """

    records: Sequence[Record]
    lengths: Sequence[Sequence[int]]
    ids: np.ndarray
    codebooks: Codebooks
    made_from: str

    def __len__(self) -> int:
        return len(self.records)

    def rows(self) -> Iterator[Row]:
        """Its rows in order; arrays are views."""
        place = 0
        for record, lengths in zip(self.records, self.lengths, strict=True):
            parts = []
            for length in lengths:
                parts.append(self.ids[place : place + length])
                place += length
            texts = record_texts(record)
            pictures, words = parts[: -len(texts)], parts[-len(texts) :]
            codes = tuple(part.reshape(self.codebooks.grid) for part in pictures) or None
            yield Row(record, codes, dict(zip(texts, words, strict=True)))

    @property
    def longest(self) -> dict[str, int]:
        """Codes of the longest text of each of `TEXT_KINDS`, 0 where there is none."""
        longest: dict[str, int] = dict.fromkeys(TEXT_KINDS, 0)
        for record, lengths in zip(self.records, self.lengths, strict=True):
            texts = lengths[-len(record_texts(record)) :]
            spoken = len(record.captions)
            longest["captions"] = max(longest["captions"], *texts[:spoken])
            longest["questions"] = max([longest["questions"], *texts[spoken:]])
        return longest


def record_texts(record: Record) -> list[str]:
    """The texts of a record in the order of their codes: captions, then question, answer, ..."""
    return [
        *record.captions,
        *(text for pair in record.qa for text in (pair.question, pair.answer)),
    ]


def pack_group(
    records: Sequence[Record],
    pictures: Sequence[Levels | None],
    texts: Sequence[Sequence[Sequence[int]]],
    codebooks: Codebooks,
    made_from: str,
) -> dict[str, bytes]:
    """The members of a group by their extension.

    Args:
        records: Record of each row.
        pictures: Codes of each row's picture, level by level.
        texts: Codes of each row's texts, in the order of `record_texts`.
        codebooks: What the codes mean.
        made_from: SHA-256 of the raw shard.
    """
    parts: list[np.ndarray] = []
    rows = []
    for record, picture, words in zip(records, pictures, texts, strict=True):
        own = [np.asarray(level).reshape(-1) for level in picture or ()]
        own += [np.asarray(codes, dtype=codebooks.dtype) for codes in words]
        parts += own
        rows.append({"lengths": [len(part) for part in own], "record": record.to_dict()})
    ids = np.concatenate(parts).astype(codebooks.dtype)
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, ids, version=(1, 0), allow_pickle=False)
    header = {
        "format": _FORMAT,
        "codebooks": codebooks.to_dict(),
        "made_from": made_from,
        "ids_sha256": hashlib.sha256(ids.tobytes()).hexdigest(),
        "rows": rows,
    }
    text = json.dumps(header, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return {IDS: buffer.getvalue(), "json": text.encode()}


def unpack_group(members: Mapping[str, bytes], where: str) -> RowGroup:
    """Read the members of a group and check every rule.

    Args:
        members: Bytes of `ids.npy` and `json`.
        where: Shard and key, for error messages.

    Raises:
        DataError: When a member is damaged, or lengths and codes do not fit records and codebooks.
    """
    try:
        content = json.loads(members["json"])
        if content["format"] != _FORMAT:
            raise ValueError(f"format {content['format']!r}")
        ids = np.lib.format.read_array(io.BytesIO(members[IDS]), allow_pickle=False)
        rows = content["rows"]
        lengths = [[int(length) for length in row["lengths"]] for row in rows]
        records = [Record.from_dict(row["record"], where) for row in rows]
        codebooks = Codebooks.from_dict(content["codebooks"], where)
        digest, made_from = str(content["ids_sha256"]), str(content["made_from"])
    except _BROKEN as error:
        raise DataError(
            f"{where} must be a group of rows written by `multimodal-dlm data tokenize`; got"
            f" {type(error).__name__}: {error}. Tokenize again.",
            reason="row_group",
        ) from error
    group = RowGroup(records, lengths, ids, codebooks, made_from)
    _check_group(group, digest, where)
    return group


def _check_group(group: RowGroup, digest: str, where: str) -> None:
    def fail(rule: str, value: object) -> None:
        raise DataError(f"{where}: {rule}; got {value}. Tokenize again.", reason="row_group")

    books, ids = group.codebooks, group.ids
    if not 1 <= len(group) <= MAX_GROUP_ROWS:
        fail(f"a group must have 1 to {MAX_GROUP_ROWS} rows", len(group))
    if ids.ndim != 1 or ids.dtype != books.dtype:
        fail(f"the ids must be one flat {books.dtype} array", f"{ids.dtype} {ids.shape}")
    if hashlib.sha256(ids.tobytes()).hexdigest() != digest:
        fail(f"the SHA-256 of the ids must be {digest}", "another")
    picture = [books.grid[0] * books.grid[1]] * len(books.image_sizes)
    limits: list[int] = []
    for record, lengths in zip(group.records, group.lengths, strict=True):
        num_texts = len(record_texts(record))
        levels = lengths[: len(lengths) - num_texts]
        is_sound = len(lengths) >= num_texts and all(0 <= n <= len(ids) for n in lengths)
        if not is_sound or levels not in ([], picture):
            fail(f"row {record.key} must have {picture} picture codes or none, then texts", lengths)
        limits += [*books.image_sizes[: len(levels)], *[books.text_size] * num_texts]
    flat = np.asarray([length for row in group.lengths for length in row], dtype=np.int64)
    if int(flat.sum()) != len(ids):
        fail("the lengths must add up to the ids", f"{int(flat.sum())} and {len(ids)}")
    over = ids >= np.repeat(np.asarray(limits, dtype=np.int64), flat)
    if bool(over.any()):
        fail("each code must be in its codebook", int(ids[over][0]))
