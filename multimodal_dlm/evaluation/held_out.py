"""The rows a measure looks at, and how it goes through them: the same in any batch size."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from multimodal_dlm.datasets.manifest import Source
from multimodal_dlm.datasets.reading import ShardReader, first_samples
from multimodal_dlm.datasets.schema import Sample
from multimodal_dlm.errors import DataError


@dataclass(frozen=True)
class HeldOut:
    """Rows of a split, and the seed of everything drawn for them.

    Args:
        source: Dataset.
        split: Split to measure.
        limit: Rows at most; None for all.
        batch_size: Rows at once; no number depends on it.
        seed: Of all draws, the bootstrap included; row i is drawn with seed + i.
    """

    source: Source
    split: str
    limit: int | None = None
    batch_size: int = 64
    seed: int = 0

    def samples(self) -> list[Sample]:
        """The first samples of the split.

        Raises:
            DataError: When there is none.
        """
        return first_samples(self.source, self.split, self.limit)

    def reader(self, split: str) -> ShardReader:
        """A whole split of the same dataset, such as `train` for a baseline."""
        return ShardReader(self.source.splits.get(split, ()), source=self.source.name)

    def training(self) -> ShardReader:
        """The training split, for what cannot be measured without one.

        Raises:
            DataError: When the dataset has none.
        """
        reader = self.reader("train")
        if not len(reader):
            raise DataError(
                f"`{self.source.name}` must have samples in split `train`, which this measure"
                f" compares with; it has none. Add that split to its manifest, or leave the"
                " measurement out."
            )
        return reader

    def batches(self, count: int) -> Iterator[slice]:
        """Slices of `count` rows, in order."""
        for first in range(0, count, self.batch_size):
            yield slice(first, min(first + self.batch_size, count))

    def generators(self, rows: slice) -> list[torch.Generator]:
        """One generator a row: row i is drawn the same in every batch."""
        seeds = range(self.seed + rows.start, self.seed + rows.stop)
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    def texts(
        self,
        pipeline: Any,
        images: Sequence[Image.Image],
        questions: Sequence[str] | None = None,
        **options: Any,
    ) -> list[str]:
        """Captions of pictures, or answers to one question each, by an image-to-text pipeline."""
        found: list[str] = []
        for rows in self.batches(len(images)):
            asked = () if questions is None else (list(questions[rows]),)
            found += pipeline(list(images[rows]), *asked, **options).texts
        return found
