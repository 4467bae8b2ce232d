"""Reading pre-tokenized shards, and choosing the reader of a source by what its manifest says."""

from collections.abc import Iterator

from multimodal_dlm.datasets.indexing import TOKENIZED, build_index
from multimodal_dlm.datasets.manifest import Source
from multimodal_dlm.datasets.reading import ShardReader, existing
from multimodal_dlm.datasets.row_groups import Row, RowGroup, unpack_group
from multimodal_dlm.datasets.schema import Record, Sample
from multimodal_dlm.datasets.storage import AnyPath, RangeReader
from multimodal_dlm.errors import DataError

OPEN_SHARDS = 16  # Held at once: the order reads in windows of 8.
SKIPPED = "__skipped__"  # In `meta` of a row that stands for an unusable sample: the reason.
_REMEDY = "Run `multimodal-dlm data tokenize` again."


class RowReader(ShardReader):
    """The rows of some pre-tokenized shards, numbered through like the samples they were made from.

    A shard is read and checked as a whole when one of its rows is first asked for; rows are views
    of it. The last `OPEN_SHARDS` shards are kept.

    Args:
        source: Pre-tokenized source.
        split: Split to read.
    """

    def __init__(self, source: Source, split: str) -> None:
        super().__init__(source.splits.get(split, ()), source=source.name)
        self.codebooks = source.codebooks
        self._rows: dict[int, tuple[Row, ...]] = {}
        self._damaged: dict[int, DataError] = {}

    def __getitem__(self, index: int) -> Sample:
        """Sample `index`, without its picture."""
        row, where = self._find(index)
        return Sample(record=row.record, where=where, source=self.source, index=index)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_rows": {}}

    def record(self, index: int) -> Record:
        """The record of row `index`."""
        return self._find(index)[0].record

    def row(self, index: int) -> Row:
        """Row `index` as codes.

        Raises:
            DataError: Naming the shard when it is unusable.
        """
        return self._find(index)[0]

    def check_shard(self, number: int) -> None:
        """Read shard `number` and check every group of it.

        Raises:
            DataError: When it is no plain tar of the promised rows.
        """
        self._open(number)

    def check(self, index: int) -> Sample:
        """Sample `index` once the record and codes of its whole shard keep every rule."""
        return self[index]

    def _find(self, index: int) -> tuple[Row, str]:
        number, place = self.locate(index)
        row = self._open(number)[place]
        where = f"Shard {self.shards[number].path.name}, key {row.record.key}"
        if SKIPPED in row.record.meta:
            reason = str(row.record.meta[SKIPPED])
            raise DataError(
                f"{where}: the raw sample was unusable (`{reason}`) and was skipped by `data"
                " tokenize`. Allow some with `data.max_skipped`, or mend it and tokenize again.",
                reason=reason,
            )
        return row, where

    def _open(self, number: int) -> tuple[Row, ...]:
        if number in self._damaged:
            raise self._damaged[number]
        if number not in self._rows:
            while len(self._rows) >= OPEN_SHARDS:
                del self._rows[next(iter(self._rows))]
            try:
                self._rows[number] = self._read_rows(number)
            except DataError as error:
                self._damaged[number] = error
                raise
        return self._rows[number]

    def _read_rows(self, number: int) -> tuple[Row, ...]:
        shard = existing(self.shards[number])
        rows: list[Row] = []
        for group in read_groups(shard.path):
            if shard.origin is None or group.made_from != shard.origin.sha256:
                raise DataError(
                    f"Shard {shard.path} must be made from the raw shard that the manifest names;"
                    f" it was made from one with SHA-256 {group.made_from}. {_REMEDY}",
                    reason="row_group",
                )
            if group.codebooks != self.codebooks:
                raise DataError(
                    f"Shard {shard.path} must be made with the tokenizers that the manifest names;"
                    f" it was made with others. {_REMEDY}",
                    reason="row_group",
                )
            rows += group.rows()
        if len(rows) != shard.count:
            raise DataError(
                f"Shard {shard.path} must hold {shard.count} rows; got {len(rows)}. {_REMEDY}",
                reason="row_group",
            )
        return tuple(rows)


def skipped_sample(index: int, source: str, reason: str) -> Sample:
    """What is written for an unusable sample, so that all others keep their numbers."""
    key = f"skipped-{index:07d}"
    return Sample(
        Record(key, source, "none", "none", ("-",), meta={SKIPPED: reason}), source=source
    )


def read_groups(path: AnyPath) -> Iterator[RowGroup]:
    """The groups of a pre-tokenized shard, each checked.

    Raises:
        DataError: When the file is no plain tar of row groups, or a group is damaged.
    """
    ranges = RangeReader()
    for entry in build_index(path, TOKENIZED):
        members = {
            name: ranges.read(path, offset, size) for name, (offset, size) in entry.members.items()
        }
        yield unpack_group(members, f"Shard {path.name}, key {entry.key}")


def open_reader(source: Source, split: str, *, is_lenient: bool = False) -> ShardReader:
    """The reader of a split, raw or pre-tokenized as the manifest says."""
    if source.codebooks is not None:
        return RowReader(source, split)
    shards = source.splits.get(split, ())
    return ShardReader(shards, source=source.name, is_lenient=is_lenient)
