"""Pre-tokenizing one shard: a raw shard and two tokenizers -> one shard of row groups.

`tokenize_shard` is a pure function and does nothing where its result already lies. Pictures are
encoded on one thread, so that codes do not depend on the number of cores.
"""

import hashlib
import io
import logging
import os
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from multimodal_dlm.datasets.manifest import ShardFile, ShardOrigin
from multimodal_dlm.datasets.reading import ShardReader
from multimodal_dlm.datasets.row_groups import (
    IDS,
    MAX_GROUP_ROWS,
    TEXT_KINDS,
    Codebooks,
    Levels,
    RowGroup,
    pack_group,
    record_texts,
)
from multimodal_dlm.datasets.row_reading import SKIPPED, read_groups, skipped_sample
from multimodal_dlm.datasets.schema import Sample
from multimodal_dlm.datasets.selection import unusable_samples
from multimodal_dlm.errors import ConfigError, DataError
from multimodal_dlm.tokenizers.image import ImageTokenizer, pixels_from_images
from multimodal_dlm.tokenizers.text import encode_text, load_text_tokenizer, text_fingerprint

logger = logging.getLogger(__name__)

ENCODE_BATCH = 64
SAVED_AS = {"text": "tokenizer", "image": "image_tokenizer"}  # Folders of a saved pipeline.


@dataclass(frozen=True)
class TokenizerPair:
    """A text and an image tokenizer that are loaded.

    Args:
        text: Text tokenizer.
        image: Image tokenizer, on the device where it encodes.
        codebooks: What their codes mean.
    """

    text: Any
    image: ImageTokenizer
    codebooks: Codebooks

    @classmethod
    def of(cls, text: Any, image: ImageTokenizer) -> "TokenizerPair":
        """Both with their fingerprints and sizes."""
        height, width = image.grid_size
        return cls(
            text,
            image,
            Codebooks(
                text=text_fingerprint(text),
                text_size=len(text),
                image=image.fingerprint,
                image_sizes=tuple(image.codebook_sizes),
                grid=(height, width),
            ),
        )


@dataclass(frozen=True)
class TokenizerFolders:
    """Where a worker loads its tokenizers.

    Args:
        text: Folder of the text tokenizer.
        image: Folder of the image tokenizer.
        device: Where pictures are encoded.
    """

    text: str
    image: str
    device: str = "cpu"

    @classmethod
    def find(
        cls,
        text: str | None = None,
        image: str | None = None,
        *,
        pipeline: str | None = None,
        device: str = "cpu",
    ) -> "TokenizerFolders":
        """The folders given, else those of a saved pipeline, else those of the working directory.

        Args:
            text: Folder of the text tokenizer.
            image: Folder of the image tokenizer.
            pipeline: Folder that may hold `tokenizer` and `image_tokenizer`.
            device: Where pictures are encoded.

        Raises:
            ConfigError: When a folder does not exist.
        """
        found = {}
        for kind, given, inner in (
            ("text", text, "tokenizer"),
            ("image", image, "image_tokenizer"),
        ):
            saved = Path(pipeline or "") / inner
            default = saved if pipeline and saved.is_dir() else Path("tokenizers") / kind
            folder = Path(given) if given is not None else default
            if not folder.is_dir():
                raise ConfigError(
                    f"The {kind} tokenizer must be a folder; there is no `{folder}`. Give its path,"
                    " or a pipeline that holds it."
                )
            found[kind] = str(folder)
        return cls(**found, device=device)

    def load(self) -> TokenizerPair:
        """Both tokenizers, loaded once in a process."""
        return _load_tokenizers(self)


@lru_cache(maxsize=1)
def _load_tokenizers(folders: TokenizerFolders) -> TokenizerPair:
    image: Any = ImageTokenizer.from_pretrained(folders.image).eval().requires_grad_(False)
    return TokenizerPair.of(load_text_tokenizer(folders.text), image.to(folders.device))


@dataclass(frozen=True)
class ShardTask:
    """One raw shard to tokenize.

    Args:
        shard: Raw shard.
        source: Name of its source.
        folder: Where the pre-tokenized shard goes, under the same file name.
        group_rows: Rows of a group at most, 256..4096.
        may_skip: Write a marked row for an unusable sample, which its reader refuses by the
            sample's own reason, instead of stopping.
    """

    shard: ShardFile
    source: str
    folder: Path
    group_rows: int = MAX_GROUP_ROWS
    may_skip: bool = False


def tokenize_shard(task: ShardTask, tokenizers: TokenizerPair) -> ShardFile:
    """Write the pre-tokenized shard of a raw one, unless it is there already.

    The file is complete or absent, whenever the process ends.

    Raises:
        DataError: When the raw shard is damaged, or a picture has not the tokenizer's size.
    """
    path = task.folder / task.shard.path.name
    groups = _finished(path, task, tokenizers.codebooks)
    if groups is None:
        _write_whole(path, _tokenized(task, tokenizers))
        groups = list(read_groups(path))
    data = path.read_bytes()
    return ShardFile(
        path,
        task.shard.count,
        len(data),
        hashlib.sha256(data).hexdigest(),
        ShardOrigin(task.shard.num_bytes, task.shard.sha256),
        {kind: max(group.longest[kind] for group in groups) for kind in TEXT_KINDS},
    )


def _finished(path: Path, task: ShardTask, codebooks: Codebooks) -> list[RowGroup] | None:
    """The groups of the file if it holds what this task would write."""
    if not path.is_file():
        return None
    try:
        groups = list(read_groups(path))
    except DataError as error:
        logger.warning("%s Writing it again.", error)
        return None
    is_ours = all(g.made_from == task.shard.sha256 and g.codebooks == codebooks for g in groups)
    if not is_ours or [len(g) for g in groups] != _group_sizes(task):
        return None
    return groups if _is_still_marked(groups, task) else None


def _is_still_marked(groups: Sequence[RowGroup], task: ShardTask) -> bool:
    """False when samples that rows stand for were mended, or may not be skipped any more."""
    rows = [record for group in groups for record in group.records]
    marked = {n: str(row.meta[SKIPPED]) for n, row in enumerate(rows) if SKIPPED in row.meta}
    if not marked:
        return True
    reader = ShardReader([task.shard], source=task.source, is_lenient=True)
    return task.may_skip and unusable_samples(reader) == marked


def _group_sizes(task: ShardTask) -> list[int]:
    starts = range(0, task.shard.count, task.group_rows)
    return [min(task.group_rows, task.shard.count - start) for start in starts]


def _tokenized(task: ShardTask, tokenizers: TokenizerPair) -> bytes:
    """The pre-tokenized shard."""
    reader = ShardReader([task.shard], source=task.source, is_lenient=task.may_skip)
    unusable = unusable_samples(reader) if task.may_skip else {}
    if not unusable:
        reader.check_digest(0)
    buffer = io.BytesIO()
    start = 0
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for size in _group_sizes(task):
            samples = [
                skipped_sample(index, task.source, unusable[index])
                if index in unusable
                else reader[index]
                for index in range(start, start + size)
            ]
            members = pack_group(
                [sample.record for sample in samples],
                _encode_usable(samples, tokenizers),
                [
                    [encode_text(tokenizers.text, text) for text in record_texts(sample.record)]
                    for sample in samples
                ],
                tokenizers.codebooks,
                task.shard.sha256,
            )
            for extension in (IDS, "json"):
                member = tarfile.TarInfo(f"rows-{start:07d}.{extension}")
                member.size = len(members[extension])
                tar.addfile(member, io.BytesIO(members[extension]))
            start += size
    return buffer.getvalue()


def _encode_usable(samples: Sequence[Sample], tokenizers: TokenizerPair) -> list[Levels | None]:
    """Codes of the pictures; None for each sample that is skipped or has none."""
    codes: list[Levels | None] = [None] * len(samples)
    usable = [place for place, s in enumerate(samples) if SKIPPED not in s.record.meta]
    encoded = _encode_pictures([samples[place] for place in usable], tokenizers)
    for place, levels in zip(usable, encoded, strict=True):
        codes[place] = levels
    return codes


def _encode_pictures(
    samples: Sequence[Sample], tokenizers: TokenizerPair
) -> list[Levels] | list[None]:
    """Codes of the picture of every sample, or None for each where none has one."""
    with_picture = [sample for sample in samples if sample.image_bytes is not None]
    if not with_picture:
        return [None] * len(samples)
    if len(with_picture) < len(samples):
        missing = next(sample for sample in samples if sample.image_bytes is None)
        raise DataError(
            f"{missing.where}: a source must have a picture in every sample or in none; this one"
            " has none. Split it into two sources."
        )
    device = next(tokenizers.image.parameters()).device
    dtype = tokenizers.codebooks.dtype
    size = int(tokenizers.image.config["image_size"])
    codes: list[Levels] = []
    with _one_thread():
        for start in range(0, len(samples), ENCODE_BATCH):
            batch = samples[start : start + ENCODE_BATCH]
            for sample in batch:
                _check_size(sample, size)
            pixels = pixels_from_images([sample.image for sample in batch]).to(device)
            levels = [
                level.cpu().numpy().astype(dtype) for level in tokenizers.image.encode(pixels)
            ]
            codes += [tuple(level[row] for level in levels) for row in range(len(batch))]
    return codes


def _check_size(sample: Sample, size: int) -> None:
    if sample.image.shape != (size, size, 3):
        height, width = sample.image.shape[:2]
        raise DataError(
            f"{sample.where}: pictures must have the size of the image tokenizer, {size} x {size};"
            f" got {width} x {height}. Write the dataset in that size (`multimodal-dlm data"
            f" from-folder --image_size {size}`)."
        )


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _write_whole(path: Path, data: bytes) -> None:
    """Write aside under a name of this process, flush to the disk, then rename."""
    aside = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with aside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
