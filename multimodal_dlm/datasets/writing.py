"""Writing WebDataset shards whose bytes depend on the samples alone."""

import hashlib
import io
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from multimodal_dlm.datasets.indexing import build_index, write_index
from multimodal_dlm.datasets.schema import Sample
from multimodal_dlm.errors import DataError


@dataclass(frozen=True)
class ShardInfo:
    """What a manifest knows of a shard.

    Args:
        name: File name.
        count: Number of samples.
        num_bytes: Size of the file.
        sha256: Hex digest of the file.
    """

    name: str
    count: int
    num_bytes: int
    sha256: str


class ShardWriter:
    """Writes `<prefix>-000000.tar`, ... with their indexes, each at most `shard_size` samples.

    Args:
        folder: Existing folder.
        prefix: Start of the file names, usually the split.
        shard_size: Samples in a shard, at least 1.
    """

    def __init__(self, folder: Path, prefix: str, shard_size: int = 1000) -> None:
        if shard_size < 1:
            raise DataError(f"`shard_size` must be at least 1; got {shard_size}. Use 1000.")
        self.folder = folder
        self.prefix = prefix
        self.shard_size = shard_size
        self.shards: list[ShardInfo] = []
        self._tar: tarfile.TarFile | None = None
        self._count = 0

    def write(self, sample: Sample) -> None:
        """Append a sample: picture, record, first caption.

        Raises:
            DataError: When the record breaks a rule of the schema.
        """
        sample.record.validate(f"{self.prefix}, key {sample.key}")
        if self._tar is None:
            self._tar = tarfile.open(self._path(partial=True), "w", format=tarfile.USTAR_FORMAT)
        if sample.image_bytes is not None:
            self._add(f"{sample.key}.{image_extension(sample.image_bytes)}", sample.image_bytes)
        self._add(f"{sample.key}.json", sample.record.to_json())
        self._add(f"{sample.key}.txt", sample.record.captions[0].encode())
        self._count += 1
        if self._count == self.shard_size:
            self._finish()

    def close(self) -> list[ShardInfo]:
        """Finish the last shard and return all of them."""
        if self._tar is not None:
            self._finish()
        return self.shards

    def _path(self, *, partial: bool = False) -> Path:
        name = f"{self.prefix}-{len(self.shards):06d}.tar"
        return self.folder / (name + ".partial" if partial else name)

    def _add(self, name: str, data: bytes) -> None:
        assert self._tar is not None
        member = tarfile.TarInfo(name)  # mtime 0, uid 0, mode 0644: nothing of this machine.
        member.size = len(data)
        self._tar.addfile(member, io.BytesIO(data))

    def _finish(self) -> None:
        assert self._tar is not None
        self._tar.close()
        path = self._path()
        self._path(partial=True).replace(path)
        write_index(path, build_index(path))
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        self.shards.append(ShardInfo(path.name, self._count, path.stat().st_size, digest))
        self._tar, self._count = None, 0


def write_shards(
    samples: Iterable[Sample], folder: Path, prefix: str, shard_size: int = 1000
) -> list[ShardInfo]:
    """Write samples in their order and return the shards."""
    writer = ShardWriter(folder, prefix, shard_size)
    for sample in samples:
        writer.write(sample)
    return writer.close()


def check_replaceable(root: Path, name: str, recipe: str, remedy: str) -> None:
    """Refuse to replace a dataset that was not written by this recipe.

    Args:
        root: Data root: shards in `<root>/<name>/`, the manifest in `<root>/<name>.yaml`.
        name: Name of the dataset.
        recipe: What the manifest must say that the shards are of.
        remedy: Last sentence of the message.

    Raises:
        DataError: When there is anything by that name that does not.
    """
    manifest = root / f"{name}.yaml"
    if not ((root / name).exists() or manifest.exists()):
        return
    try:
        content = yaml.safe_load(manifest.read_text())
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        content = {}
    is_raw = isinstance(content, Mapping) and "tokenized" not in content
    if not is_raw or content.get("recipe") != recipe:
        raise DataError(
            f"{root} has another dataset called `{name}`, which is not replaced: {manifest} must"
            f" be a manifest of raw shards of the recipe `{recipe}`. {remedy}"
        )


def image_extension(data: bytes) -> str:
    """File extension of an encoded picture by its first bytes.

    Raises:
        DataError: When it is none of PNG, JPEG and WebP.
    """
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if data.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    raise DataError(f"A picture must be PNG, JPEG or WebP; got bytes that start {data[:8]!r}.")
