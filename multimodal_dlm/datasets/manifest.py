"""Manifests: which sources there are, with what weights, tasks and shards.

A *dataset manifest* lists the shards of one recipe by split, where they came from, and the weight
and task shares meant for it. A *mixture manifest* names dataset manifests and may change weights
and shares. Both are YAML, and both open as a `Manifest`.

A dataset manifest with `tokenized` lists pre-tokenized shards instead of raw ones, the same numbers
of samples in the same order. Each names the raw shard it was made from, and that one counts as its
identity: a run draws the same examples from either, and may be continued with the other.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from multimodal_dlm.datasets.filters import Filter
from multimodal_dlm.datasets.manifest_entries import (
    check_names,
    check_share,
    check_size,
    check_tasks,
)
from multimodal_dlm.datasets.row_groups import TEXT_KINDS, Codebooks
from multimodal_dlm.datasets.storage import AnyPath, as_path
from multimodal_dlm.datasets.templates import check_templates
from multimodal_dlm.datasets.writing import ShardInfo
from multimodal_dlm.errors import DataError, nearest_match, unknown_name

DATASET_ENTRIES = (
    "name",
    "recipe",
    "recipe_version",
    "folder",
    "license",
    "packages",
    "caption_templates",
    "weight",
    "tasks",
    "caption_weights",
    "splits",
)
# Entries that only a mixture's member has.
MEMBER_CHANGES = ("balance_answers", "question_weights", "filter", "templates", "passes")
MIXTURE_OPTIONS = ("temperature", "licenses")
_MIXTURE_ENTRIES = ("name", "mixture")
_MEMBER_ENTRIES = (
    "manifest",
    "name",
    "weight",
    "tasks",
    "caption_weights",
    *MEMBER_CHANGES,
)
_OPTIONAL_ENTRIES = ("tokenized",)
_SHARD_ENTRIES = ("name", "count", "num_bytes", "sha256")
_ORIGIN_ENTRIES = ("num_bytes", "sha256")
_SAMPLE_BYTES = 512  # A sample of a raw shard has at least one header of a tar member.


@dataclass(frozen=True)
class ShardOrigin:
    """The raw shard that a pre-tokenized one was made from.

    Args:
        num_bytes: Size of the file.
        sha256: Hex digest of the file.
    """

    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class ShardFile:
    """One shard of a manifest.

    Args:
        path: Where it lies.
        count: Number of samples.
        num_bytes: Size of the file.
        sha256: Hex digest of the file.
        origin: Raw shard it was made from; None for a raw shard.
        longest: Codes of the longest text of a pre-tokenized shard, of `captions` and `questions`
            (answers included).
    """

    path: AnyPath
    count: int
    num_bytes: int
    sha256: str
    origin: ShardOrigin | None = None
    longest: Mapping[str, int] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Source:
    """One dataset of a mixture.

    Args:
        name: Name of the dataset.
        weight: Its slots in a block of the mixture, a positive integer.
        tasks: Slots of each task in a block of the source, integers.
        caption_weights: Weights of a record's captions by task; a task not named draws evenly.
        splits: Shards by split.
        details: The other entries of the manifest: recipe, licence, packages, templates.
    """

    name: str
    weight: int
    tasks: Mapping[str, int]
    caption_weights: Mapping[str, Sequence[int]]
    splits: Mapping[str, tuple[ShardFile, ...]]
    details: Mapping[str, Any]

    @property
    def license(self) -> str:
        """SPDX expression that covers its samples."""
        return str(self.details["license"])

    @property
    def balance_answers(self) -> bool:
        """Whether every answer to a question is asked about as often as any other."""
        return bool(self.details.get("balance_answers", False))

    @property
    def question_weights(self) -> Mapping[str, int]:
        """Weight of each question type, 1 where none is given."""
        return dict(self.details.get("question_weights", {}))

    @property
    def filter(self) -> Filter | None:
        """Which samples are drawn; None for all."""
        content = self.details.get("filter")
        return None if content is None else Filter.from_dict(content, f"`{self.name}`")

    @property
    def templates(self) -> tuple[str, ...]:
        """Templates that make the captions; empty for those of the records."""
        return tuple(self.details.get("templates", ()))

    @property
    def passes(self) -> float | None:
        """Passes over its samples in an epoch; None where weights decide."""
        return self.details.get("passes")

    @property
    def codebooks(self) -> Codebooks | None:
        """What the codes of a pre-tokenized source mean; None for raw shards."""
        return self.details.get("tokenized")

    def count(self, split: str) -> int:
        """Number of samples of a split, 0 when there is none of that name."""
        return sum(shard.count for shard in self.splits.get(split, ()))


@dataclass(frozen=True)
class Manifest:
    """A mixture of sources.

    Args:
        name: Name of the mixture.
        sources: Its datasets by name.
        temperature: Sources are drawn in proportion to size^(1 / temperature); None where weights
            or passes decide.
        licenses: Licences that a source may have; None for any.
    """

    name: str
    sources: Mapping[str, Source]
    temperature: float | None = None
    licenses: tuple[str, ...] | None = None

    @property
    def splits(self) -> tuple[str, ...]:
        """All splits that any source has."""
        return tuple(dict.fromkeys(s for source in self.sources.values() for s in source.splits))

    def to_dict(self) -> dict[str, Any]:
        """Everything but where the files lie, as JSON values: the record of a run.

        Pre-tokenized shards count as the raw ones they were made from.
        """
        heat = {} if self.temperature is None else {"temperature": self.temperature}
        return {
            "name": self.name,
            **heat,
            "sources": {
                name: {
                    **{k: v for k, v in source.details.items() if k not in _OPTIONAL_ENTRIES},
                    "weight": source.weight,
                    "tasks": dict(source.tasks),
                    "caption_weights": {t: list(w) for t, w in source.caption_weights.items()},
                    "splits": {
                        split: [_identity(shard) for shard in shards]
                        for split, shards in source.splits.items()
                    },
                }
                for name, source in self.sources.items()
            },
        }

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything that decides which examples are drawn."""
        text = json.dumps(self.to_dict(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def open_manifest(path: str | AnyPath, data_root: str | AnyPath | None = None) -> Manifest:
    """Open a dataset manifest or a mixture manifest.

    Args:
        path: YAML file, or its address (`http://...`, `s3://...`).
        data_root: Folder or address that holds the datasets' folders; None for the folder each
            dataset manifest lies in.

    Raises:
        DataError: When a file or an entry is missing or wrong.
    """
    path = as_path(path)
    root = as_path(data_root) if data_root is not None else None
    content = _read_yaml(path)
    if "mixture" not in content:
        source = _open_dataset(path, root, {})
        return Manifest(source.name, {source.name: source})
    known = (*_MIXTURE_ENTRIES, *MIXTURE_OPTIONS)
    _check_entries(content, known, str(path), required=_MIXTURE_ENTRIES)
    members = content["mixture"]
    if not isinstance(members, list) or not all(isinstance(m, Mapping) for m in members):
        raise DataError(f"{path}: `mixture` must be a list of members; got {members!r}.")
    sources: dict[str, Source] = {}
    for member in members:
        changes = dict(member)
        _check_entries(changes, _MEMBER_ENTRIES, f"{path}: a member", required=("manifest",))
        inner = path.parent / _member_name(path, changes.pop("manifest"))
        source = _open_dataset(inner, root, changes)
        if source.name in sources:
            raise DataError(
                f"{path}: each source must be named once; got `{source.name}` twice."
                " Give one of the members another `name`."
            )
        sources[source.name] = source
    if not sources:
        raise DataError(f"{path}: `mixture` must name at least one manifest; got none.")
    temperature = _check_weighting(path, content.get("temperature"), members)
    licenses = _check_licenses(path, content.get("licenses"), sources)
    return Manifest(content["name"], sources, temperature, licenses)


def manifest_files(path: str | AnyPath) -> tuple[AnyPath, ...]:
    """The file of a manifest that opens, then those of a mixture's members."""
    path = as_path(path)
    members = _read_yaml(path).get("mixture", ())
    return path, *(path.parent / member["manifest"] for member in members)


def _member_name(path: AnyPath, name: object) -> str:
    if not isinstance(name, str):
        raise DataError(f"{path}: `manifest` of a member must be a file name; got {name!r}.")
    return name


def _check_weighting(path: AnyPath, temperature: Any, members: Sequence[Any]) -> float | None:
    """One way of weighting in a mixture: weights, a temperature, or the passes of every member."""
    stated = [member for member in members if "passes" in member]
    if stated and len(stated) < len(members):
        raise DataError(f"{path}: `passes` must be given for every member or for none.")
    if stated and temperature is not None:
        raise DataError(f"{path}: give `temperature` or `passes`, not both.")
    if (stated or temperature is not None) and any("weight" in member for member in members):
        raise DataError(
            f"{path}: `weight` must not be given with `temperature` or `passes`, which set it."
        )
    if temperature is None:
        return None
    if isinstance(temperature, bool) or not isinstance(temperature, int | float) or temperature < 1:
        raise DataError(f"{path}: `temperature` must be at least 1; got {temperature!r}. Use 2.")
    return float(temperature)


def _check_licenses(
    path: AnyPath, licenses: Any, sources: Mapping[str, Source]
) -> tuple[str, ...] | None:
    """Refuse a source whose licence is not among those the mixture allows."""
    if licenses is None:
        return None
    if not isinstance(licenses, list) or not all(isinstance(name, str) for name in licenses):
        raise DataError(f"{path}: `licenses` must be a list of SPDX expressions; got {licenses!r}.")
    for name, source in sources.items():
        if source.license not in licenses:
            raise DataError(
                f"{path}: source `{name}` must have one of the `licenses` {', '.join(licenses)};"
                f" it has {source.license}.{nearest_match(source.license, licenses)} Leave the"
                " source out, or allow its licence."
            )
    return tuple(licenses)


def write_dataset_manifest(
    path: Path,
    content: Mapping[str, Any],
    splits: Mapping[str, Sequence[ShardInfo | ShardFile]],
    comment: str,
) -> dict[str, Any]:
    """Write a dataset manifest and return its content with `manifest`, its path.

    Args:
        path: YAML file to write.
        content: Every entry but `splits`.
        splits: Shards by split.
        comment: First line, how it was made.
    """
    rows = {split: [_shard_row(shard) for shard in shards] for split, shards in splits.items()}
    whole = {**content, "splits": rows}
    text = yaml.safe_dump(whole, sort_keys=False, width=1000, default_flow_style=None)
    path.write_text(f"# {comment}\n{text}")
    return {**whole, "manifest": str(path)}


def _identity(shard: ShardFile) -> dict[str, Any]:
    raw = shard.origin or ShardOrigin(shard.num_bytes, shard.sha256)
    return {"name": shard.path.name, "count": shard.count, **asdict(raw)}


def _shard_row(shard: ShardInfo | ShardFile) -> dict[str, Any]:
    row = {name: getattr(shard, name) for name in ("count", "num_bytes", "sha256")}
    if isinstance(shard, ShardInfo):
        return {"name": shard.name, **row}
    if shard.origin is not None:
        row |= {"longest": dict(shard.longest), "origin": asdict(shard.origin)}
    return {"name": shard.path.name, **row}


def _open_dataset(path: AnyPath, root: AnyPath | None, changes: Mapping[str, Any]) -> Source:
    content = _read_yaml(path)
    known_entries = (*DATASET_ENTRIES, *_OPTIONAL_ENTRIES)
    _check_entries(content, known_entries, str(path), required=DATASET_ENTRIES)
    content.update(changes)
    check_names(path, content)
    check_tasks(path, content)
    _check_member(path, content, changes)
    if "tokenized" in content:
        content["tokenized"] = Codebooks.from_dict(content["tokenized"], str(path))
    if not isinstance(content.get("balance_answers", False), bool):
        raise DataError(
            f"{path}: `balance_answers` must be true or false; got {content['balance_answers']!r}."
        )
    weights = content.get("question_weights", {})
    if not isinstance(weights, dict):
        raise DataError(f"{path}: `question_weights` must map types to weights; got {weights!r}.")
    for kind, weight in weights.items():
        check_share(path, f"question_weights.{kind}", weight)
    name = content["folder"]
    if not isinstance(name, str) or Path(name).is_absolute() or ".." in Path(name).parts:
        raise DataError(
            f"{path}: `folder` must lie inside the data root; got `{name}`. Give another root as"
            " `data_root`."
        )
    folder = (root if root is not None else path.parent) / name
    is_raw = "tokenized" not in content
    splits = {
        split: tuple(_open_shard(path, folder, row, is_raw=is_raw) for row in rows)
        for split, rows in content["splits"].items()
    }
    known = {"name", "weight", "tasks", "caption_weights", "splits", "folder"}
    return Source(
        name=content["name"],
        weight=check_share(path, "weight", content["weight"], at_least=1),
        tasks={
            task: check_share(path, f"tasks.{task}", share)
            for task, share in content["tasks"].items()
        },
        caption_weights=content["caption_weights"],
        splits=splits,
        details={name: value for name, value in content.items() if name not in known},
    )


def _check_member(path: AnyPath, content: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Entries of a mixture's member that a dataset manifest cannot have."""
    where = f"{path} in a mixture"
    if "filter" in content:
        Filter.from_dict(content["filter"], where)
    if "templates" in content:
        check_templates(content["templates"], where)
        if "caption_weights" not in changes:  # Those of the dataset weigh its own captions.
            content["caption_weights"] = {}
    passes = content.get("passes", 1)
    if isinstance(passes, bool) or not isinstance(passes, int | float) or not 0 < passes < 1e6:
        raise DataError(f"{where}: `passes` must be a number above 0; got {passes!r}. Use 1.")


def _open_shard(
    path: AnyPath, folder: AnyPath, row: Mapping[str, Any], *, is_raw: bool
) -> ShardFile:
    entries = _SHARD_ENTRIES if is_raw else (*_SHARD_ENTRIES, "longest", "origin")
    _check_entries(row, entries, f"{path}: a shard")
    name = row["name"]
    if not isinstance(name, str) or Path(name).name != name or ":" in name or name[:1] == ".":
        raise DataError(
            f"{path}: a shard must be a plain file name inside `folder`, never a path, an address"
            f" or a command (`pipe:`); got {name!r}."
        )
    origin, longest = None, {}
    if not is_raw:
        _check_entries(row["origin"], _ORIGIN_ENTRIES, f"{path}: `origin` of {name}")
        _check_entries(row["longest"], TEXT_KINDS, f"{path}: `longest` of {name}")
        raw_bytes = check_size(path, f"{name}: origin.num_bytes", row["origin"]["num_bytes"])
        origin = ShardOrigin(raw_bytes, str(row["origin"]["sha256"]))
        longest = {
            kind: check_size(path, f"{name}: longest.{kind}", row["longest"][kind])
            for kind in TEXT_KINDS
        }
    num_bytes = check_size(path, f"{name}: num_bytes", row["num_bytes"])
    most = num_bytes // _SAMPLE_BYTES
    if origin is not None:  # Rows of a group have no headers, but no less than a byte.
        most = min(num_bytes, origin.num_bytes // _SAMPLE_BYTES)
    count = check_size(path, f"{name}: count", row["count"], most)
    return ShardFile(folder / name, count, num_bytes, str(row["sha256"]), origin, longest)


def _read_yaml(path: AnyPath) -> dict[str, Any]:
    if not path.is_file():
        raise DataError(
            f"Manifest {path} does not exist. Build a dataset with `multimodal-dlm data build`, or"
            " use one of those in `datasets/`."
        )
    try:
        content = yaml.safe_load(path.read_bytes().decode())
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise DataError(f"Manifest {path} must be YAML; got {error}.") from error
    if not isinstance(content, dict):
        raise DataError(f"Manifest {path} must be a mapping; got {type(content).__name__}.")
    return content


def _check_entries(
    content: Mapping[str, Any],
    known: Sequence[str],
    where: str,
    required: Sequence[str] | None = None,
) -> None:
    if not isinstance(content, Mapping):
        raise DataError(f"{where} must be a mapping; got {type(content).__name__}.")
    for name in content:
        if name not in known:
            raise DataError(f"{where}: {unknown_name('entry', str(name), known)}")
    missing = [name for name in (required or known) if name not in content]
    if missing:
        raise DataError(f"{where} must have the entries {', '.join(missing)}; they are missing.")
