"""Reading shards: any sample by its number, through the index; explicit decoders only."""

import hashlib
import zlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate, islice

from multimodal_dlm.datasets.indexing import (
    MAX_MEMBER_BYTES,
    IndexEntry,
    build_index,
    index_path,
    read_index,
)
from multimodal_dlm.datasets.manifest import Manifest, ShardFile, Source
from multimodal_dlm.datasets.schema import Record, Sample, shown
from multimodal_dlm.datasets.storage import RangeReader, file_size, open_range
from multimodal_dlm.errors import DataError

MAX_RECORD_BYTES = 4 * 2**20
OPEN_INDEXES = 64  # Held at once: the order reads in windows of 8 shards.


class ShardReader:
    """The samples of some shards, numbered through.

    Indexes and files are opened when first needed and read by byte ranges, so a reader may be
    shared with worker processes after a fork and pickled into spawned ones. Members are compared
    with the checksums of the index where it has them.

    Args:
        shards: Shards in their order.
        source: Name of the source, noted in each sample.
        is_lenient: Give the good samples of a damaged shard; else its first fault is an error for
            all of them.
    """

    def __init__(
        self, shards: Sequence[ShardFile], *, source: str = "", is_lenient: bool = False
    ) -> None:
        self.shards = tuple(shards)
        self.source = source
        self.is_lenient = is_lenient
        self._ends = list(accumulate(shard.count for shard in self.shards))
        self._indexes: dict[int, tuple[IndexEntry, ...]] = {}
        self._ranges = RangeReader()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Sample:
        """Sample `index`; its picture is decoded when first asked for.

        Raises:
            DataError: Naming shard and key when the sample is unusable.
        """
        shard, entry, where = self._locate(index)
        extension = entry.image_extension
        return Sample(
            record=self._read_record(shard, entry, where),
            image_bytes=self._read(shard, entry, extension, where) if extension else None,
            where=where,
            source=self.source,
            index=index,
        )

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    def record(self, index: int) -> Record:
        """The record of sample `index`, its picture left alone."""
        shard, entry, where = self._locate(index)
        return self._read_record(shard, entry, where)

    def check_digest(self, number: int) -> None:
        """Compare the SHA-256 of shard `number` with the manifest's.

        Raises:
            DataError: When the shard is missing or has other bytes.
        """
        shard = self.shards[number]
        hashing = hashlib.sha256()
        with open_range(existing(shard).path) as file:
            while block := file.read(2**20):
                hashing.update(block)
        digest = hashing.hexdigest()
        if digest != shard.sha256:
            raise DataError(
                f"The SHA-256 of shard {shard.path} must be {shard.sha256}; got {digest}. Build or"
                " fetch it again.",
                reason="digest",
            )

    def check_shard(self, number: int) -> None:
        """Read the index of shard `number`, and scan the shard to see that the index is true.

        Raises:
            DataError: When the shard is no plain tar of the promised samples.
        """
        shard = self.shards[number]
        if not shard.count:
            return
        entries = self._entries(number)
        scanned = build_index(shard.path)
        if len(scanned) != shard.count:
            raise _count(shard, len(scanned))
        if entries != scanned:
            raise DataError(
                f"Index {index_path(shard.path)} must say where the samples of its shard lie; it"
                " does not. Delete it: it is rebuilt by scanning the shard.",
                reason="index",
            )

    def check(self, index: int) -> Sample:
        """Sample `index` once its record, text and picture keep every rule.

        Raises:
            DataError: Naming shard and key when one does not.
        """
        sample = self[index]
        shard, entry, where = self._locate(index)
        text = self._read(shard, entry, "txt", where)
        if text != sample.record.captions[0].encode():
            raise DataError(
                f"{where}: `.txt` must be the first caption; got {shown(text[:60])}. Rebuild it.",
                reason="text",
            )
        if sample.image_bytes is not None:
            _ = sample.image  # Decodes it, or raises.
        return sample

    def locate(self, index: int) -> tuple[int, int]:
        """Number of the shard that holds sample `index`, and the sample's place in it."""
        if not 0 <= index < len(self):
            raise IndexError(f"Sample numbers run from 0 to {len(self) - 1}; got {index}.")
        number = bisect_right(self._ends, index)
        return number, index - (self._ends[number] - self.shards[number].count)

    def _entries(self, number: int) -> tuple[IndexEntry, ...]:
        """The index of a shard; the last few are kept."""
        if number not in self._indexes:
            shard = existing(self.shards[number])
            entries = read_index(shard.path, is_lenient=self.is_lenient)
            if len(entries) != shard.count and not self.is_lenient:
                raise _count(shard, len(entries))
            while len(self._indexes) >= OPEN_INDEXES:
                del self._indexes[next(iter(self._indexes))]
            self._indexes[number] = entries
        return self._indexes[number]

    def _locate(self, index: int) -> tuple[int, IndexEntry, str]:
        number, place = self.locate(index)
        entries = self._entries(number)
        if place >= len(entries):
            raise _count(self.shards[number], len(entries))
        entry = entries[place]
        return number, entry, f"Shard {self.shards[number].path.name}, key {shown(entry.key)[1:-1]}"

    def _read_record(self, shard: int, entry: IndexEntry, where: str) -> Record:
        if entry.members.get("json", (0, 0))[1] > MAX_RECORD_BYTES:
            raise DataError(
                f"{where}: a record must have at most {MAX_RECORD_BYTES} bytes. Shorten it.",
                reason="record",
            )
        record = Record.from_json(self._read(shard, entry, "json", where), where)
        if record.key != entry.key:
            raise DataError(
                f"{where}: the record must have the key of its file; got {record.key}."
                " Rebuild the shard.",
                reason="key",
            )
        return record

    def _read(self, shard: int, entry: IndexEntry, extension: str, where: str) -> bytes:
        if extension not in entry.members:
            raise DataError(
                f"{where}: a sample needs `.json` and `.txt`; got {', '.join(entry.members)}."
                " Rebuild the shard.",
                reason="missing_member",
            )
        offset, size = entry.members[extension]
        data = b""
        if 0 <= offset and 0 <= size <= MAX_MEMBER_BYTES:
            data = self._ranges.read(self.shards[shard].path, offset, size)
        if len(data) != size:
            raise DataError(
                f"{where}: `.{extension}` is cut off. Build or fetch the shard again.",
                reason="cut_off",
            )
        expected = entry.checksums.get(extension)
        if expected is not None and zlib.crc32(data) != expected:
            raise DataError(
                f"{where}: `.{extension}` must have the checksum of the index; it was changed"
                " afterwards. Build or fetch the shard again.",
                reason="checksum",
            )
        return data


def _count(shard: ShardFile, found: int) -> DataError:
    return DataError(
        f"Shard {shard.path} must hold {shard.count} samples; got {found}. Build or fetch it"
        " again.",
        reason="count",
    )


def iterate_samples(manifest: Manifest | Source, split: str) -> Iterator[Sample]:
    """All samples of a split in stored order, source by source; each knows its source and number.

    Raises:
        DataError: When no source has the split, or a sample is unusable.
    """
    sources = [manifest] if isinstance(manifest, Source) else list(manifest.sources.values())
    if not any(source.count(split) for source in sources):
        raise missing_split(split, sources)
    for source in sources:
        yield from ShardReader(source.splits.get(split, ()), source=source.name)


def first_samples(source: Source, split: str, limit: int | None = None) -> list[Sample]:
    """The first samples of a split, all of them without a limit.

    Raises:
        DataError: When there is none.
    """
    samples = list(islice(iterate_samples(source, split), limit))
    if not samples:
        raise DataError(f"`{source.name}` has no sample in split `{split}`.")
    return samples


def missing_split(split: str, sources: Sequence[Source]) -> DataError:
    """The error for a split that no source has."""
    known = sorted({name for source in sources for name in source.splits})
    listed = ", ".join(f"`{name}`" for name in known) or "none"
    return DataError(f"No source has samples in split `{split}`. Available: {listed}.")


def existing(shard: ShardFile) -> ShardFile:
    """Refuse a shard that is missing or of another size than the manifest says."""
    if not shard.path.is_file():
        raise DataError(
            f"Shard {shard.path} does not exist. Build it with `multimodal-dlm data build`, or give"
            " the folder that holds the datasets as `data_root`.",
            reason="missing_shard",
        )
    num_bytes = file_size(shard.path)
    if num_bytes != shard.num_bytes:
        raise DataError(
            f"Shard {shard.path} must have {shard.num_bytes} bytes; got {num_bytes}. Build or fetch"
            " it again.",
            reason="shard_size",
        )
    return shard
