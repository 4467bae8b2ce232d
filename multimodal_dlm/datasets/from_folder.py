"""A folder of pictures with captions -> shards, manifest and data card."""

import hashlib
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from multimodal_dlm.datasets.folder_rows import FolderRow, Refusal, read_folder, require_inside
from multimodal_dlm.datasets.manifest import write_dataset_manifest
from multimodal_dlm.datasets.sampling import hash_fraction
from multimodal_dlm.datasets.schema import KEY_RULE, Record, Sample
from multimodal_dlm.datasets.writing import ShardWriter, check_replaceable
from multimodal_dlm.errors import ConfigError, DataError, unknown_name
from multimodal_dlm.intake import encode_png, over_white, read_upright

RECIPE = "from_folder"
RECIPE_VERSION = 1
UNKNOWN_LICENSE = "LicenseRef-unknown"
TASKS = {
    "text_to_image": 45,
    "caption": 30,
    "joint": 15,
    "unconditional_image": 6,
    "unconditional_text": 4,
}
VQA_SHARE = 30


@dataclass
class FolderDataset:
    """What was made of a folder.

    Args:
        manifest: Path of the dataset manifest.
        card: Path of the data card.
        splits: Samples by split.
        num_with_questions: Samples with questions.
        refused: What was left out, by name.
    """

    manifest: Path
    card: Path
    splits: Mapping[str, int]
    num_with_questions: int
    refused: list[Refusal] = field(default_factory=list)


def build_from_folder(
    folder: str | Path,
    output: str | Path,
    *,
    name: str | None = None,
    license: str = UNKNOWN_LICENSE,
    image_size: int = 64,
    fit: str = "crop",
    val: float = 0.05,
    test: float = 0.05,
    shard_size: int = 1000,
    progress: Callable[[int, int], object] | None = None,
) -> FolderDataset:
    """Write a folder of pictures as a dataset; the bytes are a function of the folder and options.

    A picture's split is decided by the hash of its pixels, so that it stays when others come or go,
    and copies of a picture share one. Pictures are turned upright, laid over white where they are
    transparent, and scaled to a square.

    Args:
        folder: Pictures with captions, see `multimodal_dlm.datasets.folder_rows`.
        output: Data root: shards go to `<output>/<name>/`, beside it manifest and card.
        name: Name of the dataset; None for the folder's own.
        license: SPDX expression of the pictures and texts.
        image_size: Side of the squares, that of the image tokenizer.
        fit: One of `FITS`: `crop` cuts the longer side at both ends, `pad` adds white, `stretch`
            ignores the proportions.
        val: Share of the pictures in split `val`.
        test: Share in split `test`.
        shard_size: Samples in a shard.
        progress: Called with (pictures done, pictures).

    Raises:
        ConfigError: When an option is wrong.
        DataError: When the folder has no usable picture, or `output` holds something else by that
            name.
    """
    source, root = Path(folder), Path(output)
    rows, refused = read_folder(source)
    name = _name(name, source)
    _check_options(license, image_size, fit, val, test)
    _check_output(source, root, name)
    staging = root / f".{name}.partial"
    if staging.exists():
        shutil.rmtree(staging)
    staging.mkdir(parents=True)
    writers = {s: ShardWriter(staging, f"{name}-{s}", shard_size) for s in ("train", "val", "test")}
    keys = _keys(rows)
    counts: Counter[str] = Counter()
    questions: Counter[str] = Counter()
    for number, row in enumerate(rows, start=1):
        try:
            pixels = _pixels(source, row.name, image_size, fit)
        except DataError as error:
            refused.append(Refusal("picture", row.name, str(error)))
        else:
            split = _split(pixels, val, test)
            try:
                record = _record(row, keys[row.name], name, split, license)
                writers[split].write(Sample(record, encode_png(pixels)))
            except DataError as error:
                refused.append(Refusal("text", row.name, str(error)))
            else:
                counts[split] += 1
                questions[split] += bool(row.qa)
        if progress is not None:
            progress(number, len(rows))
    if not counts["train"]:
        shutil.rmtree(staging)
        raise DataError(
            f"{source} must have a usable picture for the training split; got none of"
            f" {len(rows)}.{' First: ' + refused[0].message if refused else ''}"
        )
    shards = {split: writer.close() for split, writer in writers.items() if counts[split]}
    if (root / name).exists():
        shutil.rmtree(root / name)
    staging.replace(root / name)
    has_vqa = all(questions[split] == counts[split] for split in shards)
    content = {
        "name": name,
        "recipe": RECIPE,
        "recipe_version": RECIPE_VERSION,
        "folder": name,
        "license": license,
        "packages": [],
        "caption_templates": [],
        "weight": 1,
        "tasks": {**TASKS, "vqa": VQA_SHARE} if has_vqa else TASKS,
        "caption_weights": {},
    }
    path = root / f"{name}.yaml"
    command = f"multimodal-dlm data from-folder {source.name} --output DATA_ROOT"
    write_dataset_manifest(path, content, shards, f"Built by: {command}")
    splits = {split: counts[split] for split in shards}
    made = FolderDataset(path, root / f"{name}.md", splits, questions.total(), refused)
    made.card.write_text(_card(content, made, image_size, fit), encoding="utf-8")
    return made


def _crop(image: Image.Image, size: int) -> Image.Image:
    return ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)


def _pad(image: Image.Image, size: int) -> Image.Image:
    return ImageOps.pad(image, (size, size), Image.Resampling.LANCZOS, color=(255, 255, 255))


def _stretch(image: Image.Image, size: int) -> Image.Image:
    return image.resize((size, size), Image.Resampling.LANCZOS)


FITS: Mapping[str, Callable[[Image.Image, int], Image.Image]] = {
    "crop": _crop,
    "pad": _pad,
    "stretch": _stretch,
}


def _check_options(license: str, image_size: int, fit: str, val: float, test: float) -> None:
    if fit not in FITS:
        raise unknown_name("fit", fit, FITS)
    if not 8 <= image_size <= 4096 or image_size % 8:
        raise ConfigError(f"`image_size` must be a multiple of 8 up to 4096; got {image_size}.")
    if not (val >= 0 and test >= 0 and val + test < 1):
        raise ConfigError(
            f"`val` and `test` must be shares that leave some for training; got {val} and {test}."
            " Use 0.05 each."
        )
    if not license.strip():
        raise ConfigError("`license` must be an SPDX expression, such as CC-BY-4.0; got none.")


def _name(name: str | None, folder: Path) -> str:
    """The name given, or the folder's own in the letters that keys may have."""
    if name is None:
        name = _slug(folder.resolve().name)
    if not KEY_RULE.fullmatch(name):
        raise ConfigError(
            f"`name` must be lower-case letters, digits, `-` and `_`; got `{name}`. Give another."
        )
    return name


def _check_output(source: Path, root: Path, name: str) -> None:
    """Refuse to replace anything that this command has not written itself."""
    target = (root / name).resolve()
    if target.is_relative_to(source.resolve()) or source.resolve().is_relative_to(target):
        raise DataError(
            f"The shards must not be written into the folder of the pictures; got {target}. Give"
            " another `--output` or `--name`."
        )
    check_replaceable(root, name, RECIPE, "Give another `--name`.")


def _slug(text: str) -> str:
    kept = "".join(c if c.isascii() and (c.isalnum() or c in "_-") else "-" for c in text.lower())
    return kept.strip("-_")[:100]


def _keys(rows: Sequence[FolderRow]) -> dict[str, str]:
    """A key for each picture: its name, with a hash of the path where that is not enough."""
    slugs = {row.name: _slug(str(Path(row.name).with_suffix(""))) for row in rows}
    uses = Counter(slugs.values())
    return {
        name: slug
        if slug and uses[slug] == 1
        else f"{slug or 'picture'}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"
        for name, slug in slugs.items()
    }


def _pixels(folder: Path, name: str, size: int, fit: str) -> np.ndarray:
    """The picture as (size, size, 3) bytes."""
    path = folder / name
    require_inside(folder, path)
    return np.asarray(FITS[fit](over_white(read_upright(path, where=name)), size))


def _split(pixels: np.ndarray, val: float, test: float) -> str:
    place = hash_fraction("from_folder", hashlib.sha256(pixels.tobytes()).hexdigest())
    if place < test:
        return "test"
    return "val" if place < test + val else "train"


def _record(row: FolderRow, key: str, source: str, split: str, license: str) -> Record:
    return Record(
        key=key,
        source=source,
        split=split,
        license=license,
        captions=tuple(row.captions),
        qa=tuple(row.qa),
        meta={"file_name": row.name},
    )


def _card(content: Mapping[str, Any], made: FolderDataset, size: int, fit: str) -> str:
    """The data card, to be completed by whoever knows the pictures."""
    rows = "\n".join(f"| {split} | {count:,} |" for split, count in made.splits.items())
    refused = Counter(refusal.reason for refusal in made.refused)
    left_out = ", ".join(f"{count} ({reason})" for reason, count in refused.items()) or "none"
    return f"""# {content["name"]}

Pictures with captions, written from a folder by `multimodal-dlm data from-folder`
(recipe version {RECIPE_VERSION}).

- Licence: {content["license"]}
- Pictures: {size} x {size}, fitted by `{fit}`; transparent ones over white
- With questions: {made.num_with_questions:,}
- Left out: {left_out}

| split | samples |
| --- | --- |
{rows}

A picture's split is decided by the SHA-256 of its pixels. Each record names the file it came from.

## To be written by its owner

- Where the pictures and texts come from, who made them, and who consented to what.
- What they show and what they do not; known errors and biases.
- What the dataset is for, and what it should not be used for.
"""
