"""The index of a shard: where each member lies, so that any sample is one seek away.

An index is kept beside its shard as `<shard>.index.json` and rebuilt by scanning where it is
absent. It also holds the CRC-32 of each member, so that a changed byte is found when it is read.
Scanning refuses what a shard of ours never holds: links, devices, folders that climb.
"""

import json
import logging
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from multimodal_dlm.datasets.row_groups import IDS
from multimodal_dlm.datasets.schema import IMAGE_EXTENSIONS, KEY_RULE, shown
from multimodal_dlm.datasets.storage import AnyPath, file_size, open_range
from multimodal_dlm.errors import DataError

logger = logging.getLogger(__name__)

MAX_MEMBERS = 4_000_000
MAX_MEMBER_BYTES = 256 * 2**20
MAX_INDEX_BYTES = 512 * 2**20
RAW, TOKENIZED = frozenset({"json", "txt"}), frozenset({"json", IDS})
EXTENSIONS = (*IMAGE_EXTENSIONS, "json", "txt", IDS)
_FORMAT = "multimodal_dlm.shard_index/1"
# What tarfile raises over bytes that are no tar file, or a damaged or hostile one.
_DAMAGED = (
    tarfile.TarError, ArithmeticError, EOFError, LookupError, MemoryError, OSError,
    RecursionError, ValueError,
)  # fmt: skip


@dataclass(frozen=True)
class IndexEntry:
    """One sample of a shard.

    Args:
        key: Key of the sample.
        members: Offset and size in bytes of each member's content, by extension.
        checksums: CRC-32 of each member's content; empty where an old index has none.
    """

    key: str
    members: Mapping[str, tuple[int, int]]
    checksums: Mapping[str, int] = field(default_factory=dict, compare=False)

    @property
    def image_extension(self) -> str | None:
        """Extension of the picture, None for a text-only sample."""
        return next((e for e in IMAGE_EXTENSIONS if e in self.members), None)


def build_index(shard: AnyPath, needs: frozenset[str] = RAW) -> tuple[IndexEntry, ...]:
    """Scan a tar file.

    Args:
        shard: The file.
        needs: Extensions that every entry must have: `RAW` samples or `TOKENIZED` row groups.

    Raises:
        DataError: When the file is no plain tar of samples.
    """
    index, problems = scan_shard(shard)
    if problems:
        raise problems[0]
    _check_index(shard, index, needs)
    return index


def scan_shard(shard: AnyPath) -> tuple[tuple[IndexEntry, ...], list[DataError]]:
    """What can be read of a tar file, and everything that is wrong with it.

    Nothing is extracted. A member that a shard never holds is left out; where the file itself is
    damaged the scan ends.
    """
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    checksums: dict[str, dict[str, int]] = {}
    problems: list[DataError] = []
    with open_range(shard) as file:
        for member in _members(shard, file, problems):
            try:
                key, extension = _check_member(shard, member)
                members = samples.setdefault(key, {})
                if extension in members:
                    raise DataError(
                        f"Shard {shard}, key {key}: `.{extension}` occurs twice. Rebuild the"
                        " shard.",
                        reason="duplicate_member",
                    )
            except DataError as problem:
                problems.append(problem)
                continue
            file.seek(member.offset_data)
            content = file.read(member.size)
            if len(content) != member.size:
                problems.append(_cut_off(shard, f"key {key} is cut off"))
                break
            members[extension] = (member.offset_data, member.size)
            checksums.setdefault(key, {})[extension] = zlib.crc32(content)
    index = tuple(IndexEntry(k, m, checksums.get(k, {})) for k, m in samples.items() if m)
    return index, problems


def _members(
    shard: AnyPath, file: BinaryIO, problems: list[DataError]
) -> Iterator[tarfile.TarInfo]:
    """Members in order; what is wrong with the file itself goes to `problems`."""
    try:
        with tarfile.open(fileobj=file, mode="r:", errorlevel=2) as tar:
            archive: Any = tar
            last = -1
            for number, member in enumerate(tar):
                archive.members = []  # Or a long archive fills the memory.
                if number >= MAX_MEMBERS:
                    raise ValueError(f"more than {MAX_MEMBERS} members")
                if member.offset_data <= last:  # Sizes below 0 lead back, for ever.
                    raise ValueError("a member that begins before the one in front of it")
                last = member.offset_data
                yield member
            end = tar.offset
    except _DAMAGED as error:
        problems.append(_cut_off(shard, f"{type(error).__name__}: {str(error)[:120]}"))
        return
    file.seek(end)
    block = file.read(2**20)
    is_whole = len(block) >= tarfile.BLOCKSIZE
    while is_whole and block:
        is_whole = not block.strip(b"\0")
        block = file.read(2**20)
    if not is_whole:
        problems.append(_cut_off(shard, "no end, or bytes behind its end"))


def _cut_off(shard: AnyPath, found: str) -> DataError:
    return DataError(
        f"Shard {shard} must be a readable, uncompressed tar file; got {found}. Build or fetch it"
        " again.",
        reason="damaged_tar",
    )


def _check_member(shard: AnyPath, member: tarfile.TarInfo) -> tuple[str, str]:
    """Refuse members a shard never holds; return key and extension."""
    if not member.isreg() or member.issparse():
        raise DataError(
            f"Shard {shard}: members must be regular files; got {shown(member.name)}, a link,"
            " folder or device. Do not use this shard.",
            reason="member_type",
        )
    key, _, extension = member.name.partition(".")
    if not KEY_RULE.fullmatch(key):
        raise DataError(
            f"Shard {shard}: member names must be `key.extension` without folders; got"
            f" {shown(member.name)}. Do not use this shard.",
            reason="member_name",
        )
    if extension not in EXTENSIONS:
        raise DataError(
            f"Shard {shard}, key {key}: the extension must be one of {', '.join(EXTENSIONS)}; got"
            f" {shown(extension)}. Rebuild the shard.",
            reason="member_name",
        )
    if not 0 < member.size <= MAX_MEMBER_BYTES:
        raise DataError(
            f"Shard {shard}, key {key}: a member must have 1 to {MAX_MEMBER_BYTES} bytes; got"
            f" {member.size}. Rebuild the shard.",
            reason="member_size",
        )
    return key, extension


def _check_index(shard: AnyPath, index: tuple[IndexEntry, ...], needs: frozenset[str]) -> None:
    """Every sample has a record and its text, or a row group its ids, and lies inside the file."""
    num_bytes = file_size(shard)
    for entry in index:
        if (needs == RAW) == (IDS in entry.members):
            raise DataError(
                f"Shard {shard} must hold {'samples' if needs == RAW else 'row groups'}; got"
                f" {'a pre-tokenized one, without pictures' if needs == RAW else 'a raw one'}."
                " Give the manifest that was written with the shards of the other kind.",
                reason="missing_member",
            )
        if not needs <= set(entry.members):
            raise DataError(
                f"Shard {shard}, key {entry.key}: a sample needs `.json` and `.txt`; got"
                f" {', '.join(entry.members)}. Rebuild the shard.",
                reason="missing_member",
            )
        for offset, size in entry.members.values():
            if offset < 0 or size < 0 or offset + size > num_bytes:
                raise DataError(
                    f"Shard {shard}, key {entry.key}: a member must lie inside the file of"
                    f" {num_bytes} bytes; got offset {offset}, size {size}. Delete the index file.",
                    reason="index",
                )


def index_path(shard: AnyPath) -> AnyPath:
    """Where the index of a shard is kept."""
    return shard.with_name(shard.name + ".index.json")


def write_index(shard: Path, index: tuple[IndexEntry, ...]) -> Path:
    """Write the index beside its shard."""
    rows = [
        [e.key, {x: [*e.members[x], e.checksums[x]] for x in e.members} if e.checksums
         else {x: list(place) for x, place in e.members.items()}]
        for e in index
    ]  # fmt: skip
    content = {
        "format": _FORMAT,
        "shard": shard.name,
        "num_bytes": shard.stat().st_size,
        "samples": rows,
    }
    path = shard.with_name(shard.name + ".index.json")
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, separators=(",", ":")) + "\n")
    partial.replace(path)
    return path


def read_index(shard: AnyPath, *, is_lenient: bool = False) -> tuple[IndexEntry, ...]:
    """Read the index beside a shard, or scan the shard when there is none that fits.

    Args:
        shard: The file.
        is_lenient: Where the index or the shard is damaged, give what can be read of it.

    Raises:
        DataError: When the shard is missing or, unless lenient, anything is wrong with it.
    """
    try:
        found = _read_index(shard)
        if found is None:
            return scan_shard(shard)[0] if is_lenient else build_index(shard)
        if not is_lenient:
            _check_index(shard, found, RAW)
        return found
    except DataError:
        if not is_lenient or not shard.is_file():
            raise
        return scan_shard(shard)[0]


def _read_index(shard: AnyPath) -> tuple[IndexEntry, ...] | None:
    """The index beside a shard; None when there is none, or one of another file."""
    if not shard.is_file():
        raise DataError(
            f"Shard {shard} does not exist. Build it with `multimodal-dlm data build` or give the"
            " folder that holds it as `data_root`.",
            reason="missing_shard",
        )
    path = index_path(shard)
    if not path.is_file():
        return None
    try:
        if file_size(path) > MAX_INDEX_BYTES:
            raise ValueError(f"more than {MAX_INDEX_BYTES} bytes")
        content = json.loads(path.read_bytes())
        if content["format"] != _FORMAT or content["num_bytes"] != file_size(shard):
            logger.warning("%s is out of date; scanning %s instead", path.name, shard)
            return None
        return tuple(
            IndexEntry(
                str(key),
                {x: (int(place[0]), int(place[1])) for x, place in members.items()},
                {x: int(place[2]) for x, place in members.items() if len(place) > 2},
            )
            for key, members in content["samples"]
        )
    except (
        ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError,
    ) as error:  # fmt: skip
        raise DataError(
            f"Index {path} must be written by this library; got {type(error).__name__}:"
            f" {str(error)[:120]}. Delete it: it is rebuilt by scanning the shard.",
            reason="index",
        ) from error
