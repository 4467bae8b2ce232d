"""Commands about data: build, inspect, validate."""

from typing import TYPE_CHECKING, Any

from multimodal_dlm.commands.reporting import USER_ERROR, Report
from multimodal_dlm.errors import DataError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


def add_options(parser: "ArgumentParser", name: str) -> None:
    """Add the options of one command."""
    if name == "build":
        parser.add_argument("recipe", type=str, help="emoji, emoji_scenes, easy_vqa, ...")
        parser.add_function_arguments(run_build, skip={"recipe"}, as_group=False)
    else:
        parser.add_argument("manifest", type=str, help="YAML file")
        function = run_inspect if name == "inspect" else run_validate
        parser.add_function_arguments(function, skip={"manifest"}, as_group=False)


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
        sources: folder of the unpacked source packages; null fetches them into `<output>/sources`
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


def _describe_source(name: str, source: dict[str, Any]) -> list[str]:
    lines = [f"\n{name}  weight {source['weight']:.3f}  {source['license']}"]
    counts = ", ".join(f"{split} {count:,}" for split, count in source["samples"].items())
    lines.append(f"  samples: {counts}")
    if source["tasks"]:
        shares = ", ".join(f"{task} {share:.2f}" for task, share in source["tasks"].items())
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
