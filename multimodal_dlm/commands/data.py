"""Commands about data: build, from-folder, inspect, validate, tokenize."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal

from multimodal_dlm.commands.reporting import USER_ERROR, Report
from multimodal_dlm.errors import DataError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


def add_options(parser: "ArgumentParser", name: str) -> None:
    """Add the options of one command."""
    if name == "from-folder":
        parser.add_argument("folder", type=str, help="pictures with captions")
        parser.add_function_arguments(run_from_folder, skip={"folder"}, as_group=False)
    elif name == "build":
        parser.add_argument("recipe", type=str, help="emoji, emoji_scenes, easy_vqa, ...")
        parser.add_function_arguments(run_build, skip={"recipe"}, as_group=False)
    else:
        parser.add_argument("manifest", type=str, help="YAML file")
        functions = {"inspect": run_inspect, "validate": run_validate, "tokenize": run_tokenize}
        parser.add_function_arguments(functions[name], skip={"manifest"}, as_group=False)


def run_build(
    recipe: str,
    *,
    output: str = "data",
    sources: str | None = None,
    limit: int | None = None,
) -> Report:
    """Build the shards and the manifest of a dataset.

    Args:
        recipe: Name of the recipe.
        output: data root; shards go into `<output>/<recipe>/`
        sources: folder of the source archives `<name>-<version>.tgz`, as `npm pack` writes them;
            null fetches them into `<output>/sources`
        limit: samples per split at most; null for all
    """
    try:
        from multimodal_dlm.datasets.build import build
    except ModuleNotFoundError as error:
        raise _missing_extra(error) from error
    try:
        manifest = build(recipe, output, sources_dir=sources, limit=limit)
    except ModuleNotFoundError as error:
        raise _missing_extra(error) from error
    splits = {
        split: sum(shard["count"] for shard in shards)
        for split, shards in manifest["splits"].items()
    }
    lines = [f"{recipe}: {manifest['license']}"]
    lines += [f"  {split:<24}{count:>9,} samples" for split, count in splits.items()]
    lines.append(f"manifest: {output}/{recipe}.yaml")
    values = {
        "recipe": recipe,
        "manifest": f"{output}/{recipe}.yaml",
        "license": manifest["license"],
        "splits": splits,
    }
    return Report(values, "\n".join(lines))


def run_from_folder(
    folder: str,
    *,
    output: str = "data",
    name: str | None = None,
    license: str = "LicenseRef-unknown",
    image_size: int = 64,
    fit: Literal["crop", "pad", "stretch"] = "crop",
    val: float = 0.05,
    test: float = 0.05,
    shard_size: int = 1000,
    show: int = 20,
) -> Report:
    """Write a folder of pictures with captions as shards, manifest and data card.

    Captions come from metadata.jsonl, metadata.csv, captions.csv or captions.json (`file_name`,
    `text`, and where there are any `question` and `answer`), else from a .txt beside each picture.

    Args:
        folder: Pictures with captions.
        output: data root; shards go into `<output>/<name>/`
        name: name of the dataset; null for that of the folder
        license: SPDX expression of pictures and texts, such as CC-BY-4.0
        image_size: side of the squares that are written: that of the image tokenizer
        fit: how a picture becomes a square: cut, with white added, or stretched
        val: share of the pictures in split `val`
        test: share of the pictures in split `test`
        shard_size: samples in a shard
        show: refused files printed at most; `--format json` has all of them
    """
    from tqdm.auto import tqdm

    from multimodal_dlm.datasets.from_folder import UNKNOWN_LICENSE, build_from_folder

    with tqdm(desc=f"read {folder}", unit=" pictures") as bar:

        def advance(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        made = build_from_folder(
            folder,
            output,
            name=name,
            license=license,
            image_size=image_size,
            fit=fit,
            val=val,
            test=test,
            shard_size=shard_size,
            progress=advance,
        )
    total = sum(made.splits.values())
    lines = [f"{made.manifest.stem}: {total:,} pictures, {license}"]
    lines += [f"  {split:<8}{count:>9,} samples" for split, count in made.splits.items()]
    if 0 < made.num_with_questions < total:
        lines.append(
            f"  {made.num_with_questions:,} have questions: task `vqa` is left out, since it needs"
            " them in every picture. Give those a folder of their own."
        )
    if license == UNKNOWN_LICENSE:
        lines.append("  no licence: name one with --license before you share anything made of it")
    if made.refused:
        lines.append(f"refused: {len(made.refused):,}")
    lines += [f"  {refusal.name}: {refusal.message}" for refusal in made.refused[:show]]
    if len(made.refused) > show:
        lines.append(f"  ... and {len(made.refused) - show:,} more (--show, or --format json)")
    lines.append(f"manifest: {made.manifest}")
    values = {
        "manifest": str(made.manifest),
        "card": str(made.card),
        "license": license,
        "splits": dict(made.splits),
        "with_questions": made.num_with_questions,
        "refused": [asdict(refusal) for refusal in made.refused],
    }
    return Report(values, "\n".join(lines))


def run_inspect(manifest: str, *, data_root: str | None = None) -> Report:
    """Show counts, licences and examples of a manifest.

    Args:
        manifest: YAML file.
        data_root: folder that holds the datasets' folders; null for the manifest's own folder
    """
    from multimodal_dlm.datasets.build import inspect

    values = inspect(manifest, data_root)
    lines = [f"{values['name']}  {values['fingerprint'][:16]}"]
    for name, source in values["sources"].items():
        lines += _describe_source(name, source)
    return Report(values, "\n".join(lines))


def run_validate(manifest: str, *, data_root: str | None = None, show: int = 20) -> Report:
    """Check every byte of every shard; exit status 2 when anything is wrong.

    Args:
        manifest: YAML file.
        data_root: folder that holds the datasets' folders; null for the manifest's own folder
        show: findings printed at most; `--format json` has all of them
    """
    from tqdm.auto import tqdm

    from multimodal_dlm.datasets.manifest import open_manifest
    from multimodal_dlm.datasets.validation import validate_manifest

    opened = open_manifest(manifest, data_root)
    with tqdm(desc=f"validate {opened.name}", unit=" samples") as bar:

        def advance(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        found = validate_manifest(opened, progress=advance)
    lines = [f"{opened.name}: {found.num_good:,} of {found.num_samples:,} samples are good"]
    lines += [f"  {reason:<16}{count:>7,}" for reason, count in found.counts.items()]
    lines += [f"{f.reason}: {f.source}/{f.split}: {f.message}" for f in found.findings[:show]]
    if len(found.findings) > show:
        lines.append(f"... and {len(found.findings) - show:,} more (--show, or --format json)")
    return Report(found.to_dict(), "\n".join(lines), 0 if found.is_valid else USER_ERROR)


def run_tokenize(
    manifest: str,
    *,
    output: str = "data/tokenized",
    data_root: str | None = None,
    pipeline: str | None = None,
    text_tokenizer: str | None = None,
    image_tokenizer: str | None = None,
    splits: list[str] | None = None,
    engine: Literal["local", "ray"] = "local",
    workers: int | None = None,
    device: str = "cpu",
    group_rows: int = 4096,
) -> Report:
    """Write pictures and texts as token ids, once; run it again to go on where it was cut off.

    Args:
        manifest: YAML file of raw shards.
        output: folder of the new shards and manifests
        data_root: folder that holds the datasets' folders; null for the manifest's own folder
        pipeline: folder of a saved pipeline whose tokenizers are used
        text_tokenizer: its folder; null for that of the pipeline, else `tokenizers/text`
        image_tokenizer: its folder; null for that of the pipeline, else `tokenizers/image`
        splits: splits to tokenize, such as '[train, val]'; null for all
        engine: `local`, or `ray`: the cluster that RAY_ADDRESS names, else one on this machine
        workers: shards tokenized at once; null for one a core, or one on a GPU
        device: where pictures are encoded
        group_rows: rows of one row group at most, 256 to 4096
    """
    import torch
    from tqdm.auto import tqdm

    from multimodal_dlm.datasets.manifest import open_manifest
    from multimodal_dlm.datasets.tokenize_engines import tokenize_manifest
    from multimodal_dlm.datasets.tokenizing import TokenizerFolders

    tokenizers = TokenizerFolders.find(
        text_tokenizer, image_tokenizer, pipeline=pipeline, device=device
    )
    if workers is None:
        workers = torch.get_num_threads() if device == "cpu" else 1
    with tqdm(unit=" samples") as bar:

        def advance(source: str, count: int, total: int) -> None:
            bar.total = total
            bar.set_description(f"tokenize {source}", refresh=False)
            bar.update(count)

        path = tokenize_manifest(
            manifest,
            output,
            tokenizers,
            data_root=data_root,
            splits=splits,
            engine=engine,
            workers=workers,
            group_rows=group_rows,
            progress=advance,
        )
        seconds = round(bar.format_dict["elapsed"], 1)
    made = open_manifest(path)
    sources = {
        name: {split: source.count(split) for split in source.splits}
        for name, source in made.sources.items()
    }
    total = sum(count for counts in sources.values() for count in counts.values())
    lines = [f"{made.name}: {total:,} samples in {seconds} s"]
    for name, counts in sources.items():
        listed = ", ".join(f"{split} {count:,}" for split, count in counts.items())
        lines.append(f"  {name:<16}{listed}")
    lines.append(f"manifest: {path}")
    values = {"manifest": str(path), "fingerprint": made.fingerprint, "sources": sources}
    return Report({**values, "seconds": seconds}, "\n".join(lines))


def _describe_source(name: str, source: dict[str, Any]) -> list[str]:
    kind = "pre-tokenized" if source["is_tokenized"] else f"{source['num_bytes'] / 2**20:.1f} MiB"
    lines = [f"\n{name}  weight {source['weight']}  {source['license']}  {kind}"]
    counts = ", ".join(f"{split} {count:,}" for split, count in source["samples"].items())
    lines.append(f"  samples: {counts}")
    if source["tasks"]:
        shares = ", ".join(f"{task} {share}" for task, share in source["tasks"].items())
        lines.append(f"  tasks: {shares}")
    example = source.get("example")
    if example:
        lines += [f"  example {example['key']}:"]
        lines += [f"    {caption}" for caption in example["captions"][:3]]
        lines += [f"    {pair['question']} {pair['answer']}" for pair in example["qa"][:3]]
    return lines


def _missing_extra(error: ModuleNotFoundError) -> DataError:
    return DataError(
        f"Building this dataset needs the package `{error.name}`, which is not installed. Run:"
        " pip install 'multimodal-dlm[data]'"
    )
