"""Every byte of a dataset checked: what is wrong by name, and how much around it is good."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from multimodal_dlm.datasets.manifest import Manifest, Source
from multimodal_dlm.datasets.reading import ShardReader
from multimodal_dlm.datasets.row_reading import open_reader
from multimodal_dlm.errors import DataError

ERRORS = ("shard", "digest", "sample", "duplicate_key")
WARNINGS = ("same_picture",)


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Args:
        reason: One of `ERRORS` or `WARNINGS`.
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
        return not any(finding.reason in ERRORS for finding in self.findings)

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
    """Check digests, records, texts, pictures and keys, and that no held-out picture is trained on.

    Nothing stops it: a shard that cannot be read is one finding and its samples are not good; a
    broken sample is one finding. Reasons: `shard` (missing, cut, no plain tar of samples), `digest`
    (other bytes than the manifest's SHA-256), `sample` (record, text or picture breaks a rule),
    `duplicate_key` (twice in a split), and as a warning `same_picture` (a held-out picture that is
    byte for byte a training picture of its source).

    Args:
        manifest: What to check.
        progress: Called with (samples done, samples) after each sample.
    """
    found = Validation(num_samples=sum(_count(source) for source in manifest.sources.values()))
    done = 0
    for name, source in manifest.sources.items():
        places: dict[bytes, list[tuple[str, str]]] = defaultdict(list)
        for split in source.splits:
            reader = open_reader(source, split)
            keys: set[str] = set()
            for index, error in _samples(reader, found, name, split):
                done += 1
                if error is None:
                    try:
                        sample = reader.check(index)
                        if sample.key in keys:
                            message = f"{sample.where}: keys must be unique in a split. Rebuild it."
                            found.findings.append(Finding("duplicate_key", name, split, message))
                        else:
                            found.num_good += 1
                            keys.add(sample.key)
                        if sample.image_bytes is not None:
                            digest = hashlib.sha256(sample.image_bytes).digest()
                            places[digest].append((split, sample.key))
                    except DataError as problem:
                        found.findings.append(Finding("sample", name, split, str(problem)))
                if progress is not None:
                    progress(done, found.num_samples)
        found.findings += _shared_pictures(name, places)
    return found


def _samples(
    reader: ShardReader, found: Validation, source: str, split: str
) -> Iterator[tuple[int, DataError | None]]:
    """Number of each sample, with the error of its shard where the shard cannot be read."""
    first = 0
    for number, shard in enumerate(reader.shards):
        error = None
        for reason, check in (("digest", reader.check_digest), ("shard", reader.check_shard)):
            try:
                check(number)
            except DataError as problem:
                found.findings.append(Finding(reason, source, split, str(problem)))
                error = problem if reason == "shard" else error
        for index in range(first, first + shard.count):
            yield index, error
        first += shard.count


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


def _count(source: Source) -> int:
    return sum(source.count(split) for split in source.splits)
