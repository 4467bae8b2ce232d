"""Pre-tokenizing sources and mixtures, on several workers.

Every engine calls the same `tokenize_shard` and decides only where: in processes of this machine or
on the workers of a Ray cluster. The work may be cut off anywhere and started again; the bytes are
the same.
"""

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from multimodal_dlm.datasets.manifest import (
    MEMBER_CHANGES,
    MIXTURE_OPTIONS,
    ShardFile,
    Source,
    manifest_files,
    open_manifest,
    write_dataset_manifest,
)
from multimodal_dlm.datasets.row_groups import MAX_GROUP_ROWS, MIN_GROUP_ROWS
from multimodal_dlm.datasets.storage import AnyPath
from multimodal_dlm.datasets.tokenizing import (
    ShardTask,
    TokenizerFolders,
    TokenizerPair,
    tokenize_shard,
)
from multimodal_dlm.errors import ConfigError, DataError, unknown_name


def tokenize_source(
    source: Source,
    folder: Path,
    tokenizers: TokenizerFolders | TokenizerPair,
    *,
    splits: Sequence[str] | None = None,
    engine: str = "local",
    workers: int = 1,
    group_rows: int = MAX_GROUP_ROWS,
    may_skip: bool = False,
    progress: Callable[[int], object] | None = None,
) -> Source:
    """Pre-tokenize splits of a source; run it again to go on where it was cut off.

    Args:
        source: Raw source.
        folder: Created when missing.
        tokenizers: Folders, or for one local worker the tokenizers themselves.
        splits: Splits; None for all. The others are left as they are.
        engine: One of `ENGINES`: `local` (processes of this machine) or `ray`.
        workers: Shards that are tokenized at once.
        group_rows: Rows of a group at most, 256..4096.
        may_skip: Write marked rows for unusable samples instead of stopping, see `ShardTask`.
        progress: Called with the number of samples of each finished shard.

    Returns:
        The source with the pre-tokenized shards in the place of the raw ones.

    Raises:
        ConfigError: When the engine, a split or a number is wrong.
        DataError: When a raw shard or one of its pictures cannot be used, or a new shard would
            take the place of a raw one.
    """
    if engine not in ENGINES:
        raise unknown_name("engine", engine, ENGINES)
    if not MIN_GROUP_ROWS <= group_rows <= MAX_GROUP_ROWS:
        raise ConfigError(
            f"`group_rows` must lie in {MIN_GROUP_ROWS}..{MAX_GROUP_ROWS}; got {group_rows}."
        )
    if workers < 1:
        raise ConfigError(f"`workers` must be at least 1; got {workers}. Use the number of cores.")
    _check_apart({folder: source}, ())
    for split in splits or ():
        if split not in source.splits:
            raise unknown_name("split", split, source.splits)
    folder.mkdir(parents=True, exist_ok=True)
    chosen = [split for split in source.splits if splits is None or split in splits]
    tasks = [
        ShardTask(shard, source.name, folder, group_rows, may_skip)
        for split in chosen
        for shard in source.splits[split]
    ]
    loaded = tokenizers if isinstance(tokenizers, TokenizerPair) else tokenizers.load()
    done = {}
    for place, shard in ENGINES[engine](tasks, tokenizers, workers):
        done[tasks[place].shard] = shard
        if progress is not None:
            progress(shard.count)
    made = {split: tuple(done[shard] for shard in source.splits[split]) for split in chosen}
    return replace(
        source,
        splits={**source.splits, **made},
        details={**source.details, "tokenized": loaded.codebooks},
    )


def tokenize_manifest(
    manifest: str | Path,
    output: str | Path,
    tokenizers: TokenizerFolders,
    *,
    data_root: str | Path | None = None,
    progress: Callable[[str, int, int], object] | None = None,
    **options: Any,
) -> Path:
    """Pre-tokenize every source of a manifest and write the manifests of the result.

    Shards go to `<output>/<source>/`, a dataset manifest to `<output>/<source>.yaml`, and for a
    mixture one of the same weights and shares to `<output>/<file name of the manifest>`. Manifests
    are written when all shards are.

    Args:
        manifest: Dataset or mixture manifest of raw sources.
        output: Folder, created when missing; several mixtures may share it.
        tokenizers: Folders of both tokenizers.
        data_root: Folder of the raw datasets, see `open_manifest`.
        progress: Called with (source, samples of a finished shard, samples in all).
        options: Of `tokenize_source`: `splits`, `engine`, `workers`, `group_rows`.

    Returns:
        The path of the new manifest.

    Raises:
        ConfigError: When an option is wrong.
        DataError: When a raw shard or one of its pictures cannot be used, or a file would take the
            place of a raw one.
    """
    path, output = Path(manifest), Path(output)
    opened = open_manifest(manifest, data_root)
    is_mixture = list(opened.sources) != [opened.name] or path.stem != opened.name
    if is_mixture and path.stem in opened.sources:
        raise DataError(
            f"The file of a mixture must not be called like one of its sources; got {path}. Rename"
            " it."
        )
    manifests = [output / path.name, *(output / f"{name}.yaml" for name in opened.sources)]
    _check_apart(
        {output / name: source for name, source in opened.sources.items()},
        manifests if is_mixture else manifests[1:],
        manifest_files(manifest),
    )
    wanted = options.get("splits")
    for split in wanted or ():
        if split not in opened.splits:
            raise unknown_name("split", split, opened.splits)
    total = sum(
        source.count(split)
        for source in opened.sources.values()
        for split in source.splits
        if wanted is None or split in wanted
    )
    made: dict[str, Source] = {}
    for name, source in opened.sources.items():
        report = None if progress is None else _named(progress, name, total)
        own = {**options, "splits": wanted and [s for s in wanted if s in source.splits]}
        made[name] = tokenize_source(source, output / name, tokenizers, progress=report, **own)
        for left in (output / name).glob("*.partial"):  # Of a run that was killed while it wrote.
            left.unlink()
    members = [_write_manifest(output, source, wanted) for source in made.values()]
    if opened.temperature is not None or any("passes" in member for member in members):
        members = [{k: v for k, v in member.items() if k != "weight"} for member in members]
    if not is_mixture:
        return output / f"{opened.name}.yaml"
    chosen = {name: getattr(opened, name) for name in MIXTURE_OPTIONS}
    given = {n: list(v) if isinstance(v, tuple) else v for n, v in chosen.items() if v is not None}
    content = {"name": opened.name, **given, "mixture": members}
    text = yaml.safe_dump(content, sort_keys=False, width=1000)
    (output / path.name).write_text(f"# {_COMMENT}\n{text}")
    return output / path.name


def _named(
    progress: Callable[[str, int, int], object], name: str, total: int
) -> Callable[[int], object]:
    return lambda count: progress(name, count, total)


def _check_apart(
    sources: Mapping[Path, Source], manifests: Sequence[Path], inputs: Sequence[AnyPath] = ()
) -> None:
    """Refuse sources that are not raw, and to write over what is read, also through links.

    Args:
        sources: Raw source by the folder of its new shards.
        manifests: Manifests that will be written.
        inputs: Manifests that were read.

    Raises:
        DataError: Naming the source or the file.
    """
    shards: dict[Path, list[AnyPath]] = {}
    for folder, source in sources.items():
        if source.codebooks is not None:
            raise DataError(
                f"Source `{source.name}` is pre-tokenized already. Give its raw manifest."
            )
        shards[folder] = [shard.path for part in source.splits.values() for shard in part]
    read = [*inputs, *(path for paths in shards.values() for path in paths)]
    own = {Path(str(path).removeprefix("file://")).resolve() for path in read}
    made = [folder / path.name for folder, paths in shards.items() for path in paths]
    for target in (*manifests, *made):
        if target.resolve() in own:
            raise DataError(
                f"The output must lie apart from the raw files; {target} would be written over."
                " Give another `output`, such as `data/tokenized`."
            )


def _write_manifest(output: Path, source: Source, splits: Sequence[str] | None) -> dict[str, Any]:
    """Write the dataset manifest of a pre-tokenized source; return its entry in a mixture."""
    assert source.codebooks is not None
    changes = {
        "weight": source.weight,
        "tasks": dict(source.tasks),
        "caption_weights": {
            task: list(weights) for task, weights in source.caption_weights.items()
        },
    }
    content = {"name": source.name, "folder": source.name, **source.details, **changes}
    content["tokenized"] = source.codebooks.to_dict()
    extra = {name: content.pop(name) for name in MEMBER_CHANGES if name in source.details}
    kept = {s: shards for s, shards in source.splits.items() if splits is None or s in splits}
    write_dataset_manifest(output / f"{source.name}.yaml", content, kept, _COMMENT)
    return {"manifest": f"{source.name}.yaml", **changes, **extra}


_COMMENT = "Written by: multimodal-dlm data tokenize"


# Engines: tasks -> (place of the task, its shard) as they are finished, in any order.

Engine = Callable[
    [Sequence[ShardTask], TokenizerFolders | TokenizerPair, int], Iterable[tuple[int, ShardFile]]
]


def _run_local(
    tasks: Sequence[ShardTask], tokenizers: TokenizerFolders | TokenizerPair, workers: int
) -> Iterator[tuple[int, ShardFile]]:
    """In this process for one worker, else in spawned ones, which end when this one does."""
    workers = min(workers, len(tasks))
    if workers <= 1 or isinstance(tokenizers, TokenizerPair):
        loaded = tokenizers if isinstance(tokenizers, TokenizerPair) else tokenizers.load()
        yield from ((place, tokenize_shard(task, loaded)) for place, task in enumerate(tasks))
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with_parent) as pool:
        places = {pool.submit(_in_worker, task, tokenizers): p for p, task in enumerate(tasks)}
        try:
            for future in as_completed(places):
                yield places[future], future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _run_ray(
    tasks: Sequence[ShardTask], tokenizers: TokenizerFolders | TokenizerPair, workers: int
) -> Iterator[tuple[int, ShardFile]]:
    """As Ray tasks: on the cluster of `RAY_ADDRESS`, or on a local one made for this call."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # No telemetry.
    try:
        import ray
        from ray.exceptions import RayTaskError
    except ModuleNotFoundError as error:
        raise DataError(
            "`engine` ray needs the package `ray`, which is not installed. Run: pip install"
            " 'multimodal-dlm[ray]'"
        ) from error
    is_ours = not ray.is_initialized()
    if is_ours and "RAY_ADDRESS" in os.environ:
        ray.init(log_to_driver=False)
    elif is_ours:
        ray.init(
            num_cpus=workers,
            include_dashboard=False,
            log_to_driver=False,
            _node_ip_address="127.0.0.1",
        )
    try:
        remote: Any = ray.remote(num_cpus=1)(_in_worker)
        places = {remote.remote(task, tokenizers): place for place, task in enumerate(tasks)}
        waiting = list(places)
        while waiting:
            finished, waiting = ray.wait(waiting)
            for reference in finished:
                try:
                    yield places[reference], ray.get(reference)
                except RayTaskError as error:
                    raise error.cause from error
    finally:
        if is_ours:
            ray.shutdown()


ENGINES: Mapping[str, Engine] = {"local": _run_local, "ray": _run_ray}


def _in_worker(task: ShardTask, folders: TokenizerFolders) -> ShardFile:
    return tokenize_shard(task, folders.load())


def _end_with_parent() -> None:
    """End this worker as soon as the process that started it is gone, however it ended."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
