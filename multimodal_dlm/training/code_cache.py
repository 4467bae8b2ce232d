"""Codes of every picture of a source, computed once for each image tokenizer and set of shards.

Files are safetensors plus a JSON record beside each; the name holds the tokenizer's fingerprint and
a hash of the shards, so another tokenizer or other shards never meet old codes.
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from safetensors.numpy import load_file, save_file
from tqdm.auto import tqdm

from multimodal_dlm.datasets.manifest import Source
from multimodal_dlm.datasets.reading import ShardReader
from multimodal_dlm.errors import CheckpointError, DataError
from multimodal_dlm.tokenizers.image import ImageTokenizer

logger = logging.getLogger(__name__)

ENCODE_BATCH = 64
Levels = tuple[np.ndarray, ...]


class CodeCache:
    """Codes by source and sample index.

    Args:
        codes: Source -> one integer array (samples, h, w) per level; empty for text alone.
    """

    def __init__(self, codes: dict[str, Levels]) -> None:
        self._codes = codes

    def lookup(self, source: str, index: int) -> Levels | None:
        """Codes of a sample, one (h, w) array per level; None when the source has no pictures."""
        levels = self._codes[source]
        return tuple(level[index] for level in levels) if levels else None

    @property
    def num_pictures(self) -> int:
        """Pictures held."""
        return sum(len(levels[0]) for levels in self._codes.values() if levels)


def open_code_cache(
    sources: Iterable[Source],
    split: str,
    image_tokenizer: ImageTokenizer,
    folder: str | Path,
    *,
    batch_size: int = ENCODE_BATCH,
) -> CodeCache:
    """Load the codes of a split, encoding first what has not been encoded yet.

    Args:
        sources: Sources of a manifest that have the split.
        split: Split to encode.
        image_tokenizer: Used in its own dtype (float32 unless cast).
        folder: Created when missing.
        batch_size: Pictures encoded at once.

    Raises:
        DataError: When a source has both samples with and without pictures.
        CheckpointError: When a cached file was changed.
    """
    fingerprint = image_tokenizer.fingerprint
    codes: dict[str, Levels] = {}
    for source in sources:
        path = Path(folder) / f"{_cache_name(source, split, fingerprint)}.safetensors"
        if not path.is_file() or not path.with_suffix(".json").is_file():
            _write(path, _encode(source, split, image_tokenizer, batch_size), source, fingerprint)
        codes[source.name] = _read(path)
    return CodeCache(codes)


def has_pictures(source: Source, split: str) -> bool:
    """True when the first sample of a split has a picture."""
    return ShardReader(source.splits[split], source=source.name)[0].image_bytes is not None


def pixels_from_images(images: Sequence[UInt8[np.ndarray, "height width 3"]]) -> torch.Tensor:
    """RGB bytes -> float pixels in [0, 1], (batch, 3, height, width)."""
    stacked = torch.from_numpy(np.stack(images))
    return stacked.permute(0, 3, 1, 2).float() / 255


def _cache_name(source: Source, split: str, fingerprint: str) -> str:
    shards = json.dumps([shard.sha256 for shard in source.splits[split]])
    digest = hashlib.sha256(shards.encode()).hexdigest()
    return f"{source.name}-{split}-{fingerprint[:16]}-{digest[:16]}"


@torch.no_grad()
def _encode(source: Source, split: str, image_tokenizer: ImageTokenizer, batch_size: int) -> Levels:
    """Codes of all samples of a split in stored order."""
    if not has_pictures(source, split):
        return ()
    reader = ShardReader(source.splits[split], source=source.name)
    sizes = image_tokenizer.codebook_sizes
    kinds = [np.uint16 if size <= 2**16 else np.int32 for size in sizes]
    parts: list[list[np.ndarray]] = [[] for _ in sizes]
    device = next(image_tokenizer.parameters()).device
    starts = range(0, len(reader), batch_size)
    for start in tqdm(starts, desc=f"encode {source.name}/{split}", unit="batch", mininterval=2):
        images = []
        for index in range(start, min(start + batch_size, len(reader))):
            sample = reader[index]
            if sample.image_bytes is None:
                raise DataError(
                    f"Source `{source.name}` must have a picture in every sample or in none;"
                    f" `{sample.record.key}` has none. Split it into two sources."
                )
            images.append(sample.image)
        codes = image_tokenizer.encode(pixels_from_images(images).to(device))
        for level, values in enumerate(codes):
            parts[level].append(values.cpu().numpy().astype(kinds[level]))
    return tuple(np.concatenate(part) for part in parts)


def _write(path: Path, levels: Levels, source: Source, fingerprint: str) -> None:
    """Both files aside, then renamed; the record last."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".part")
    save_file({f"level.{number}": level for number, level in enumerate(levels)}, aside)
    record = {
        "source": source.name,
        "image_tokenizer": fingerprint,
        "num_levels": len(levels),
        "num_pictures": len(levels[0]) if levels else 0,
        "sha256": hashlib.sha256(aside.read_bytes()).hexdigest(),
    }
    aside.replace(path)
    aside.write_text(json.dumps(record, indent=2))
    aside.replace(path.with_suffix(".json"))
    logger.info("Encoded %d pictures of %s.", record["num_pictures"], source.name)


def _read(path: Path) -> Levels:
    record = json.loads(path.with_suffix(".json").read_text())
    if hashlib.sha256(path.read_bytes()).hexdigest() != record["sha256"]:
        raise CheckpointError(
            f"The code cache `{path.name}` changed since it was written. Delete it; it is computed"
            " again."
        )
    arrays = load_file(path)
    return tuple(arrays[f"level.{number}"] for number in range(record["num_levels"]))
