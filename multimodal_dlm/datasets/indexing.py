"""The index of a shard: where each member lies, so that any sample is one seek away.

An index is kept beside its shard as `<shard>.index.json` and rebuilt by scanning where it is
absent. Scanning refuses what a shard of ours never holds: links, devices, folders that climb.
"""

import json
import logging
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from multimodal_dlm.datasets.row_groups import IDS
from multimodal_dlm.datasets.schema import IMAGE_EXTENSIONS, KEY_RULE
from multimodal_dlm.errors import DataError

logger = logging.getLogger(__name__)

MAX_MEMBERS = 4_000_000
MAX_MEMBER_BYTES = 256 * 2**20
RAW, TOKENIZED = frozenset({"json", "txt"}), frozenset({"json", IDS})
EXTENSIONS = (*IMAGE_EXTENSIONS, "json", "txt", IDS)
_FORMAT = "multimodal_dlm.shard_index/1"


@dataclass(frozen=True)
class IndexEntry:
    """One sample of a shard.

    Args:
        key: Key of the sample.
        members: Offset and size in bytes of each member's content, by extension.
    """

    key: str
    members: Mapping[str, tuple[int, int]]

    @property
    def image_extension(self) -> str | None:
        """Extension of the picture, None for a text-only sample."""
        return next((e for e in IMAGE_EXTENSIONS if e in self.members), None)


def build_index(shard: Path, needs: frozenset[str] = RAW) -> tuple[IndexEntry, ...]:
    """Scan a tar file.

    Args:
        shard: The file.
        needs: Extensions that every entry must have: `RAW` samples or `TOKENIZED` row groups.

    Raises:
        DataError: When the file is no plain tar of samples.
    """
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for number, member in enumerate(tar):
                key, extension = _check_member(shard, member, number)
                members = samples.setdefault(key, {})
                if extension in members:
                    raise DataError(
                        f"Shard {shard}, key {key}: `.{extension}` occurs twice. Rebuild the shard."
                    )
                members[extension] = (member.offset_data, member.size)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(
            f"Shard {shard} must be a readable, uncompressed tar file; got"
            f" {type(error).__name__}: {error}. Build or fetch it again."
        ) from error
    index = tuple(IndexEntry(key, members) for key, members in samples.items())
    _check_index(shard, index, needs)
    return index


def _check_member(shard: Path, member: tarfile.TarInfo, number: int) -> tuple[str, str]:
    """Refuse members a shard never holds; return key and extension."""
    if number >= MAX_MEMBERS:
        raise DataError(f"Shard {shard} must have at most {MAX_MEMBERS} members. Split it.")
    if not member.isreg():
        raise DataError(
            f"Shard {shard}: members must be regular files; got `{member.name}`, a link, folder or"
            " device. Do not use this shard."
        )
    key, _, extension = member.name.partition(".")
    if not KEY_RULE.fullmatch(key):
        raise DataError(
            f"Shard {shard}: member names must be `key.extension` without folders; got"
            f" `{member.name}`. Do not use this shard."
        )
    if extension not in EXTENSIONS:
        raise DataError(
            f"Shard {shard}, key {key}: the extension must be one of {', '.join(EXTENSIONS)}; got"
            f" `{extension}`. Rebuild the shard."
        )
    if member.size > MAX_MEMBER_BYTES:
        raise DataError(
            f"Shard {shard}, key {key}: a member must have at most {MAX_MEMBER_BYTES} bytes; got"
            f" {member.size}."
        )
    return key, extension


def _check_index(shard: Path, index: tuple[IndexEntry, ...], needs: frozenset[str] = RAW) -> None:
    """Every sample has a record and its text, or a row group its ids, and lies inside the file."""
    num_bytes = shard.stat().st_size
    for entry in index:
        if (needs == RAW) == (IDS in entry.members):
            raise DataError(
                f"Shard {shard} must hold {'samples' if needs == RAW else 'row groups'}; got"
                f" {'a pre-tokenized one, without pictures' if needs == RAW else 'a raw one'}."
                " Give the manifest that was written with the shards of the other kind."
            )
        if not needs <= set(entry.members):
            raise DataError(
                f"Shard {shard}, key {entry.key}: a sample needs `.json` and `.txt`; got"
                f" {', '.join(entry.members)}. Rebuild the shard."
            )
        for offset, size in entry.members.values():
            if offset < 0 or size < 0 or offset + size > num_bytes:
                raise DataError(
                    f"Shard {shard}, key {entry.key}: a member must lie inside the file of"
                    f" {num_bytes} bytes; got offset {offset}, size {size}. Delete the index file."
                )


def index_path(shard: Path) -> Path:
    """Where the index of a shard is kept."""
    return shard.with_name(shard.name + ".index.json")


def write_index(shard: Path, index: tuple[IndexEntry, ...]) -> Path:
    """Write the index beside its shard."""
    content = {
        "format": _FORMAT,
        "shard": shard.name,
        "num_bytes": shard.stat().st_size,
        "samples": [[e.key, {x: list(place) for x, place in e.members.items()}] for e in index],
    }
    path = index_path(shard)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, separators=(",", ":")) + "\n")
    partial.replace(path)
    return path


def read_index(shard: Path) -> tuple[IndexEntry, ...]:
    """Read the index beside a shard, or scan the shard when there is none that fits.

    Raises:
        DataError: When the shard is missing or unusable.
    """
    if not shard.is_file():
        raise DataError(
            f"Shard {shard} does not exist. Build it with `multimodal-dlm data build` or give the"
            " folder that holds it as `data_root`."
        )
    path = index_path(shard)
    if not path.is_file():
        return build_index(shard)
    try:
        content = json.loads(path.read_bytes())
        if content["format"] != _FORMAT or content["num_bytes"] != shard.stat().st_size:
            logger.warning("%s is out of date; scanning %s instead", path.name, shard)
            return build_index(shard)
        index = tuple(
            IndexEntry(key, {x: (int(o), int(n)) for x, (o, n) in members.items()})
            for key, members in content["samples"]
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"Index {path} must be written by this library; got {type(error).__name__}: {error}."
            " Delete it: it is rebuilt by scanning the shard."
        ) from error
    _check_index(shard, index)
    return index
