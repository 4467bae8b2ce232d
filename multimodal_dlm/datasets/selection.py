"""What of a source is drawn: what a filter leaves, less the samples that may be skipped.

What a filter leaves out is never drawn. A skipped sample keeps its place in the order as a row of
weight 0, so that skipping it moves no other sample.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from multimodal_dlm.datasets.filters import RECORD_FIELDS, Filter, record_value
from multimodal_dlm.datasets.reading import ShardReader
from multimodal_dlm.errors import DataError, nearest_match

YIELDED, FILLED = "yielded", "filled"
_SHOWN_VALUES = 20


@dataclass(frozen=True)
class Selection:
    """What is drawn of a split, and what is not.

    Args:
        num_samples: Samples that the manifest promises.
        counts: Samples of each shard that have a place in the order.
        numbers: Their numbers; None when that is all of them.
        skipped: Reason of each sample that only keeps its place, by number.
        filtered: Samples without a place, by reason.
    """

    num_samples: int
    counts: tuple[int, ...]
    numbers: np.ndarray | None = None
    skipped: Mapping[int, str] = field(default_factory=dict)
    filtered: Mapping[str, int] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Samples that have a place in the order."""
        return sum(self.counts)

    def number(self, place: int) -> int:
        """Number of the sample at a place of the order."""
        return place if self.numbers is None else int(self.numbers[place])

    def good_numbers(self) -> list[int]:
        """Numbers of the samples that are drawn and not skipped."""
        numbers = range(self.num_samples) if self.numbers is None else self.numbers.tolist()
        return [number for number in numbers if number not in self.skipped]

    def stand_in(self, place: int) -> int:
        """Number of the next good sample after a skipped one: the content of its row."""
        for step in range(1, self.size):
            number = self.number((place + step) % self.size)
            if number not in self.skipped:
                return number
        raise DataError("A source must have a good sample; all of them are skipped.")


def select(
    reader: ShardReader, chosen: Filter | None, skipped: Mapping[int, str], where: str
) -> Selection:
    """Read every record that a filter has to judge.

    Args:
        reader: Samples of the split.
        chosen: Filter, or None for every sample.
        skipped: Reasons of samples that cannot be read, by number; they keep their places.
        where: Source and split, for messages.

    Raises:
        DataError: When nothing is left, or the filter names a field that no record has.
    """
    counts = tuple(shard.count for shard in reader.shards)
    if chosen is None:
        return Selection(len(reader), counts, skipped=skipped)
    kept: list[int] = []
    kept_counts = [0] * len(counts)
    filtered: Counter[str] = Counter()
    seen: dict[str, set[str]] = defaultdict(set)
    meta: set[str] = set()
    for index in range(len(reader)):
        reason = None
        if index not in skipped:
            record = reader.record(index)
            reason = chosen.reason(record)
            meta.update(record.meta)
            for name in chosen.fields:
                value = record_value(record, name)
                if value is not None and len(seen[name]) < _SHOWN_VALUES:
                    seen[name].add(repr(value))
        if reason is None:
            kept.append(index)
            kept_counts[reader.locate(index)[0]] += 1
        else:
            filtered[reason] += 1
    for name in chosen.fields:
        if name not in seen:
            known = sorted((*RECORD_FIELDS, *(f"meta.{entry}" for entry in meta)))
            raise DataError(
                f"{where}: no record has the field `{name}` of `filter`."
                f"{nearest_match(name, known)} Available: {', '.join(known)}."
            )
    if not set(kept) - set(skipped):
        values = "; ".join(f"`{name}`: {', '.join(sorted(found))}" for name, found in seen.items())
        raise DataError(
            f"{where}: `filter` must leave a sample; it left none of {len(reader)}"
            f" ({_counts(filtered)}). Values that occur: {values or 'none were asked for'}."
        )
    numbers = np.asarray(kept, dtype=np.int64)
    return Selection(len(reader), tuple(kept_counts), numbers, skipped, dict(filtered))


def selection_digest(selections: Mapping[str, Selection]) -> str | None:
    """SHA-256 of what filters left of each source; None without filters.

    A sample that no filter could judge because it was damaged keeps its place. Repaired it may lose
    it, and all later ones move: the order is then another one.
    """
    chosen = {name: s.numbers for name, s in selections.items() if s.numbers is not None}
    if not chosen:
        return None
    digest = hashlib.sha256()
    for name, numbers in sorted(chosen.items()):
        digest.update(f"{name} {len(numbers)} ".encode())
        digest.update(numbers.astype("<i8").tobytes())
    return digest.hexdigest()


def unusable_samples(reader: ShardReader) -> dict[int, str]:
    """Reason of every sample that breaks a rule, by number: every byte of the split is read.

    A shard that is missing or has other bytes than its manifest says loses all its samples, any
    other damaged one those that cannot be told by a lenient reader.
    """
    reasons: dict[int, str] = {}
    first = 0
    for number, shard in enumerate(reader.shards):
        samples = range(first, first + shard.count)
        first += shard.count
        try:
            reader.check_digest(number)
        except DataError as error:
            _raise_unreachable(error)
            reasons |= dict.fromkeys(samples, error.reason)
            continue
        for index in samples:
            try:
                reader.check(index)
            except DataError as error:
                _raise_unreachable(error)
                reasons[index] = error.reason
    return reasons


def _raise_unreachable(error: DataError) -> None:
    """A server that does not answer says nothing about the samples: nothing is skipped for it."""
    if error.reason == "unreachable":
        raise error


def check_budget(skipped: Mapping[int, str], total: int, budget: float, where: str) -> None:
    """Refuse to skip more than was allowed.

    Args:
        skipped: Reasons by number.
        total: Samples of the split.
        budget: Below 1 a share of the samples, else a number of samples.
        where: Source and split.

    Raises:
        DataError: With the counts by reason.
    """
    allowed = budget if budget >= 1 else budget * total
    if len(skipped) > allowed:
        raise DataError(
            f"{where}: at most {int(allowed)} of {total} samples may be skipped"
            f" (`max_skipped: {budget:g}`); {len(skipped)} are unusable"
            f" ({_counts(Counter(skipped.values()))}). `multimodal-dlm data validate` names them."
        )


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in sorted(counts.items())) or "none"
