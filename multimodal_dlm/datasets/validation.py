"""Every byte of a dataset checked: what is wrong by name, and how much around it is good."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from multimodal_dlm.datasets.manifest import Manifest, Source
from multimodal_dlm.datasets.reading import ShardReader
from multimodal_dlm.datasets.row_reading import open_reader
from multimodal_dlm.datasets.schema import shown
from multimodal_dlm.errors import DataError

WARNINGS = ("same_picture", "mixed_sizes")


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Args:
        reason: One word; those of `WARNINGS` leave the dataset valid.
        source: Dataset.
        split: Split.
        message: What is wrong where, and what to do.
    """

    reason: str
    source: str
    split: str
    message: str


@dataclass
class Validation:
    """What was found in a manifest.

    Args:
        num_good: Samples without an error.
        num_samples: Samples that the manifest promises.
        findings: Everything wrong, in stored order.
    """

    num_good: int = 0
    num_samples: int = 0
    findings: list[Finding] = field(default_factory=list)

    @property
    def is_valid(self) -> bool:
        """True when nothing but warnings was found."""
        return not any(finding.reason not in WARNINGS for finding in self.findings)

    @property
    def counts(self) -> dict[str, int]:
        """Findings by reason."""
        return dict(Counter(finding.reason for finding in self.findings))

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "is_valid": self.is_valid,
            "samples": self.num_samples,
            "good": self.num_good,
            "counts": self.counts,
            "findings": [asdict(finding) for finding in self.findings],
        }


def validate_manifest(
    manifest: Manifest, *, progress: Callable[[int, int], None] | None = None
) -> Validation:
    """Check digests, records, texts, pictures and keys, and that no held-out sample is trained on.

    Nothing stops it: every fault of a shard is a finding, its good samples are checked all the
    same. Reasons of shards: `missing_shard`, `shard_size`, `digest` (other bytes than the
    manifest's SHA-256), `damaged_tar`, `member_type`, `member_name`, `member_size`,
    `duplicate_member`, `index`, `count`, `row_group` (of a pre-tokenized shard). Of samples:
    `missing_member`, `cut_off`, `checksum`, `record`, `key`, `text`, `picture`, `duplicate_key`
    (twice in a split), `leaked_key` (in two splits), `split` and `source` (the record says another
    one). Warnings: `same_picture` (a held-out picture that is byte for byte a training picture of
    its source) and `mixed_sizes` (pictures of a source differ in size).

    Args:
        manifest: What to check.
        progress: Called with (samples done, samples) after each sample.
    """
    found = Validation(num_samples=sum(_count(source) for source in manifest.sources.values()))
    done = 0
    for source in manifest.sources.values():
        seen = _Seen(source.name)
        for split in source.splits:
            reader = open_reader(source, split, is_lenient=True)
            _check_shards(reader, found, source.name, split)
            told = {finding.message for finding in found.findings}
            for index in range(len(reader)):
                done += 1
                problem = _check_sample(reader, index, split, seen)
                if problem is None:
                    found.num_good += 1
                elif str(problem) not in told:  # Not again for each row of a damaged group.
                    found.findings.append(Finding(problem.reason, source.name, split, str(problem)))
                if progress is not None:
                    progress(done, found.num_samples)
        found.findings += _shared_pictures(source.name, seen.pictures)
        found.findings += _mixed_sizes(source.name, seen.sizes)
    return found


@dataclass
class _Seen:
    """What the samples of a source had."""

    source: str
    keys: dict[str, str] = field(default_factory=dict)
    places: set[tuple[str, str]] = field(default_factory=set)
    pictures: dict[bytes, list[tuple[str, str]]] = field(default_factory=lambda: defaultdict(list))
    sizes: dict[tuple[int, int], tuple[str, str]] = field(default_factory=dict)


def _check_shards(reader: ShardReader, found: Validation, source: str, split: str) -> None:
    """Findings of the files themselves."""
    for number in range(len(reader.shards)):
        for check in (reader.check_digest, reader.check_shard):
            try:
                check(number)
            except DataError as problem:
                finding = Finding(problem.reason, source, split, str(problem))
                if finding not in found.findings:
                    found.findings.append(finding)


def _check_sample(reader: ShardReader, index: int, split: str, seen: _Seen) -> DataError | None:
    """What is wrong with a sample; None for a good one."""
    try:
        sample = reader.check(index)
    except DataError as problem:
        return problem
    record, where = sample.record, sample.where
    elsewhere = seen.keys.setdefault(sample.key, split)
    if sample.image_bytes is not None:
        digest = hashlib.sha256(sample.image_bytes).digest()
        seen.pictures[digest].append((split, sample.key))
        height, width = sample.image.shape[:2]
        seen.sizes.setdefault((width, height), (split, sample.key))
    if elsewhere != split:
        message = f"{where}: a key must be in one split; this one is in {elsewhere} too. Rename it."
        return DataError(message, reason="leaked_key")
    if (split, sample.key) in seen.places:
        message = f"{where}: keys must be unique in a split. Rebuild it."
        return DataError(message, reason="duplicate_key")
    seen.places.add((split, sample.key))
    for name, expected in (("split", split), ("source", seen.source)):
        if getattr(record, name) != expected:
            return DataError(
                f"{where}: `{name}` of the record must be {expected}, as in the manifest; got"
                f" {shown(getattr(record, name))}. Rebuild the shard.",
                reason=name,
            )
    return None


def _shared_pictures(source: str, places: dict[bytes, list[tuple[str, str]]]) -> list[Finding]:
    """Held-out pictures that are in train too."""
    findings = []
    for entries in places.values():
        trained = next((key for split, key in entries if split == "train"), None)
        if trained is None:
            continue
        for split, key in entries:
            if split != "train":
                message = (
                    f"Sample {key} of split {split} has the same picture as training sample"
                    f" {trained}. Split by what is drawn, or leave one of them out."
                )
                findings.append(Finding("same_picture", source, split, message))
    return findings


def _mixed_sizes(source: str, sizes: dict[tuple[int, int], tuple[str, str]]) -> list[Finding]:
    """A picture of every size but the first."""
    (first, *others) = sizes.items() if sizes else [((0, 0), ("", ""))]
    return [
        Finding(
            "mixed_sizes",
            source,
            split,
            f"Sample {key} of split {split} has {width} x {height} pixels where others have"
            f" {first[0][0]} x {first[0][1]}. An image tokenizer takes one size.",
        )
        for (width, height), (split, key) in others
    ]


def _count(source: Source) -> int:
    return sum(source.count(split) for split in source.splits)
