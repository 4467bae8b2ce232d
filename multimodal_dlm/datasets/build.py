"""Building datasets from recipes, and looking into what was built."""

import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from multimodal_dlm.datasets.fetching import SourceFolder
from multimodal_dlm.datasets.manifest import open_manifest, write_dataset_manifest
from multimodal_dlm.datasets.recipes import Recipe, get_recipe
from multimodal_dlm.datasets.row_reading import open_reader
from multimodal_dlm.datasets.schema import Sample
from multimodal_dlm.datasets.writing import check_replaceable, write_shards
from multimodal_dlm.errors import DataError

INSPECTED_RECORDS = 500
Limit = int | Mapping[str, int] | None


def build(
    recipe: str,
    output: str | Path,
    *,
    sources_dir: str | Path | None = None,
    limit: Limit = None,
    shard_size: int = 1000,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Build the shards of a recipe and the manifest beside them.

    The bytes are a pure function of the recipe, its packages, `limit` and `shard_size`. Shards are
    written aside and take the place of older ones of the recipe when all are complete.

    Args:
        recipe: Name of a recipe, such as `emoji`.
        output: Data root: shards go to `<output>/<recipe>/`, the manifest to
            `<output>/<recipe>.yaml`.
        sources_dir: Folder of source archives; None fetches them into `<output>/sources`.
        limit: At most this many samples of every split, or of each split named; a split that is
            not named is left out.
        shard_size: Samples in a shard.
        show_progress: Show progress bars.

    Returns:
        The manifest's content, and `manifest`, its path.

    Raises:
        ConfigError: When there is no such recipe.
        DataError: When a source cannot be fetched or read, `limit` names no split, or `output`
            holds something else by the recipe's name.
    """
    kind = get_recipe(recipe)
    root = Path(output)
    remedy = f"Give another `output`, or move {root / recipe} and its manifest away."
    check_replaceable(root, recipe, recipe, remedy)
    sources = SourceFolder(Path(sources_dir) if sources_dir is not None else root / "sources")
    sources.fetch(kind.packages)
    made = kind(sources)
    limits = _limits(made, limit)
    staging = root / f".{recipe}.partial"
    if staging.exists():
        shutil.rmtree(staging)
    staging.mkdir(parents=True)
    licenses: set[str] = set()
    splits = {}
    for split, count in limits.items():
        samples = _noted(made, split, count, licenses, show_progress)
        splits[split] = write_shards(samples, staging, f"{recipe}-{split}", shard_size)
    if (root / recipe).exists():
        shutil.rmtree(root / recipe)
    staging.replace(root / recipe)
    content = {
        "name": recipe,
        "recipe": recipe,
        "recipe_version": kind.version,
        "folder": recipe,
        "license": " AND ".join(sorted(licenses)),
        "packages": [package.to_dict() for package in kind.packages],
        "caption_templates": list(kind.caption_templates),
        "weight": kind.weight,
        "tasks": dict(kind.tasks),
        "caption_weights": {task: list(w) for task, w in kind.caption_weights.items()},
    }
    path = root / f"{recipe}.yaml"
    command = f"Built by: multimodal-dlm data build {recipe} --output DATA_ROOT"
    return write_dataset_manifest(path, content, splits, command)


def _limits(made: Recipe, limit: Limit) -> dict[str, int]:
    """Number of samples to build of each split."""
    if isinstance(limit, Mapping):
        unknown = sorted(set(limit) - set(made.splits))
        if unknown:
            raise DataError(
                f"`limit` must name splits of `{made.name}`: {', '.join(made.splits)}; got"
                f" {', '.join(unknown)}."
            )
        wanted = {split: limit[split] for split in made.splits if split in limit}
    elif limit is not None:
        wanted = dict.fromkeys(made.splits, limit)
    else:
        return {split: made.count(split) for split in made.splits}
    for split, most in wanted.items():
        if most < 1:
            raise DataError(f"`limit` must be at least 1; got {most} for split `{split}`.")
    return {split: min(most, made.count(split)) for split, most in wanted.items()}


def _noted(
    made: Recipe, split: str, count: int, licenses: set[str], show_progress: bool
) -> Iterator[Sample]:
    """The first `count` samples of a split, their licences collected, with a progress bar."""
    samples = islice(made.samples(split), count)
    name = f"{made.name} {split}"
    for sample in tqdm(
        samples, desc=name, total=count, unit=" samples", disable=not show_progress, mininterval=1
    ):
        licenses.add(sample.record.license)
        yield sample


def inspect(manifest: str | Path, data_root: str | Path | None = None) -> dict[str, Any]:
    """What a manifest holds.

    Args:
        manifest: YAML file.
        data_root: Folder of the datasets, see `open_manifest`.

    Returns:
        JSON values: per source counts, bytes, weight, tasks, licence, packages, question types and
        an example.

    Raises:
        DataError: When a file is missing or wrong.
    """
    opened = open_manifest(manifest, data_root)
    sources: dict[str, Any] = {}
    for name, source in opened.sources.items():
        readers = {split: open_reader(source, split) for split in source.splits}
        first = next((reader for reader in readers.values() if len(reader)), None)
        most = min(len(first), INSPECTED_RECORDS) if first is not None else 0
        seen = [first.record(index) for index in range(most)] if first is not None else []
        types = Counter(asked.type for record in seen for asked in record.qa)
        sources[name] = {
            "weight": source.weight,
            "tasks": dict(source.tasks),
            "samples": {split: len(reader) for split, reader in readers.items()},
            "num_shards": sum(len(shards) for shards in source.splits.values()),
            "num_bytes": sum(f.num_bytes for shards in source.splits.values() for f in shards),
            "is_tokenized": source.codebooks is not None,
            "license": source.license,
            "packages": [f"{p['name']}@{p['version']}" for p in source.details["packages"]],
            "question_types": dict(types.most_common()),
        }
        if seen:
            sources[name]["example"] = {
                "key": seen[0].key,
                "captions": list(seen[0].captions),
                "qa": [{"question": q.question, "answer": q.answer} for q in seen[0].qa],
            }
    return {"name": opened.name, "fingerprint": opened.fingerprint, "sources": sources}
