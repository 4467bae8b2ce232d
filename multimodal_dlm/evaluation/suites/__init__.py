"""Suites: which measure is taken of which source and split, by name; one YAML file each."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from multimodal_dlm.datasets.manifest import Manifest
from multimodal_dlm.datasets.reading import ShardReader
from multimodal_dlm.errors import DataError, unknown_name

HELD_OUT_SPLITS = ("test", "val", "train")
_ENTRIES = ("measure", "source", "split")
_NAME = re.compile(r"[a-z0-9_]+(\.[a-z0-9_]+)*")  # Also the name of a file.


@dataclass(frozen=True)
class SuiteEntry:
    """One line of a suite.

    Args:
        name: Dotted name that goes before the names of its metrics.
        measure: Name of the measure.
        source: Dataset of the manifest.
        split: Split of the dataset.
        options: Further arguments of the measure.
    """

    name: str
    measure: str
    source: str
    split: str
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Suite:
    """Measurements by name.

    Args:
        name: Name of the suite.
        entries: What it measures.
    """

    name: str
    entries: tuple[SuiteEntry, ...]

    def only(self, prefixes: list[str] | None) -> "Suite":
        """The entries whose names begin with one of `prefixes`, whole words; all when None.

        Raises:
            ConfigError: When a prefix fits nothing.
        """
        if prefixes is None:
            return self
        for prefix in prefixes:
            if not any(_begins(entry.name, prefix) for entry in self.entries):
                raise unknown_name("measurement", prefix, [entry.name for entry in self.entries])
        kept = [e for e in self.entries if any(_begins(e.name, prefix) for prefix in prefixes)]
        return Suite(self.name, tuple(kept))

    def at_most(self, limit: int | None) -> "Suite":
        """The same with no more than `limit` rows in each measurement; unchanged when None."""
        if limit is None:
            return self
        entries = []
        for entry in self.entries:
            own = entry.options.get("limit")
            kept = limit if own is None else min(own, limit)
            entries.append(replace(entry, options={**entry.options, "limit": kept}))
        return Suite(self.name, tuple(entries))


def open_suite(suite: str) -> Suite:
    """A suite of this package by name, or any YAML file.

    Raises:
        ConfigError: When there is no suite of that name.
        DataError: When a file or an entry is missing or wrong.
    """
    here = Path(__file__).parent
    names = sorted(path.stem for path in here.glob("*.yaml"))
    path = Path(suite) if suite.endswith((".yaml", ".yml")) else here / f"{suite}.yaml"
    if not path.is_file():
        if path.parent == here:
            raise unknown_name("suite", suite, [*names, "data"])
        raise DataError(f"`suite` must be a name or a YAML file; there is no file `{suite}`.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        is_suite = set(content) == {"name", "measurements"} and content["measurements"].items()
    except (yaml.YAMLError, UnicodeDecodeError, TypeError, AttributeError):
        is_suite = False
    if not is_suite:
        raise DataError(f"{path} must be YAML with `name` and `measurements`, nothing else.")
    entries = []
    for name, line in content["measurements"].items():
        if not isinstance(name, str) or not _NAME.fullmatch(name) or not isinstance(line, dict):
            raise DataError(
                f"{path}: measurements must be named by words of a-z, 0-9 and _ with dots between"
                f" them, each with its entries; got {name!r}: {line!r}."
            )
        missing = [entry for entry in _ENTRIES if entry not in line]
        if missing:
            raise DataError(f"{path}: `{name}` must have {', '.join(missing)}; it has not.")
        options = {key: value for key, value in line.items() if key not in _ENTRIES}
        measure, source, split = (str(line[key]) for key in _ENTRIES)
        entries.append(SuiteEntry(name, measure, source, split, options))
    return Suite(str(content["name"]), tuple(entries))


def suite_of_data(manifest: Manifest) -> Suite:
    """What any dataset allows: captions, answers where it has questions, likelihood, tokenizer.

    The split is `test`, else `val`, else `train`. Likelihood and inpainting look at 100 rows.

    Args:
        manifest: Datasets in our WebDataset form.
    """
    entries = []
    for name, source in manifest.sources.items():
        split = next((split for split in HELD_OUT_SPLITS if source.count(split)), None)
        if split is None:
            continue
        reader = ShardReader(source.splits[split], source=name)
        first = reader[0]
        measures = {}
        if first.image_bytes is not None:
            measures = {"caption": "captions", "likelihood": "likelihood"}
            measures |= {"inpainting": "inpainting", "tokenizer": "reconstruction"}
            if any(reader.record(index).qa for index in range(len(reader))):
                measures["vqa"] = "answers"
        for group, measure in measures.items():
            options = {"limit": 100} if measure in ("likelihood", "inpainting") else {}
            entries.append(SuiteEntry(f"{group}.{name}", measure, name, split, options))
    if not entries:
        raise DataError(f"`{manifest.name}` must have a split with pictures to be measured.")
    return Suite("data", tuple(entries))


def _begins(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")
