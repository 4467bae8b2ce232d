"""Batches as pure functions of the step: training examples -> rows -> canvases, or pixels.

A source of batches answers `batches(step)`: this process's micro-batches of that global batch.
Nothing is remembered, so background workers and a resume cannot change the order.
"""

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset

from multimodal_dlm.canvas import Canvas
from multimodal_dlm.datasets.mixture import EpochPlan, MixtureReader, TrainingExample
from multimodal_dlm.processing import TrainingRow, UnifiedProcessor
from multimodal_dlm.tokenizers.image import pixels_from_images
from multimodal_dlm.training.objectives.base import Batch
from multimodal_dlm.training.packing import pack_rows


class BatchSource(Protocol):
    """What the trainer needs of its data."""

    def batches(self, step: int) -> list[Batch]:
        """This process's micro-batches of global batch `step`."""
        ...

    @property
    def epoch_plan(self) -> EpochPlan:
        """What every epoch must hold."""
        ...

    def state(self, next_step: int) -> dict[str, Any]:
        """JSON record of the position before global batch `next_step`."""
        ...

    def restore(self, state: dict[str, Any]) -> int:
        """Check a record and return the next global batch."""
        ...


class _MixtureBatches:
    """Shared by canvases and pixels: the reader and its one-number state."""

    def __init__(self, reader: MixtureReader, micro_batch_size: int | None) -> None:
        self.reader = reader
        self.num_rows = reader.batch_size // reader.world_size
        self.micro_batch_size = min(micro_batch_size or self.num_rows, self.num_rows)

    @property
    def epoch_plan(self) -> EpochPlan:
        """What every epoch must hold."""
        return self.reader.epoch_plan

    def state(self, next_step: int) -> dict[str, Any]:
        """JSON record of the position before global batch `next_step`."""
        return dict(self.reader.state_at(next_step))

    def restore(self, state: dict[str, Any]) -> int:
        """Check a record and return the next global batch."""
        self.reader.load_state_dict(state)
        return self.reader.next_batch

    def _chunks(self, order: list[int], *, is_dealt: bool = False) -> Iterator[list[int]]:
        """Micro-batches: neighbours of an order, or (dealt like cards) some from everywhere."""
        starts = range(0, len(order), self.micro_batch_size)
        for number, start in enumerate(starts):
            stop = start + self.micro_batch_size
            yield order[number :: len(starts)] if is_dealt else order[start:stop]


class CanvasBatches(_MixtureBatches):
    """Canvases of a mixture; rows of like length share a micro-batch, so little is padded.

    Args:
        reader: Global order.
        row_of: The row of an example, such as `TokenizedRows`.
        processor: Lays out rows.
        micro_batch_size: Rows of one forward pass; None for all of this process's rows.
        pack_length: Tokens of a packed row; None to leave every row alone. With it a micro-batch
            gets rows of all lengths.
    """

    def __init__(
        self,
        reader: MixtureReader,
        row_of: Callable[[TrainingExample], TrainingRow],
        processor: UnifiedProcessor,
        *,
        micro_batch_size: int | None = None,
        pack_length: int | None = None,
    ) -> None:
        super().__init__(reader, micro_batch_size)
        self.row_of = row_of
        self.pack_length = pack_length
        self.processor = processor

    def batches(self, step: int) -> list[Batch]:
        """This process's micro-batches of global batch `step`."""
        examples = self.reader.batch(step)
        canvas = self.processor.training_canvas([self.row_of(example) for example in examples])
        counts = torch.tensor([example.weight > 0 for example in examples])
        canvas = canvas.replace(is_free=canvas.is_free & counts[:, None])
        first = self.reader.rank * self.num_rows
        batches = []
        for chunk in self._chunks(order_by_shape(canvas), is_dealt=self.pack_length is not None):
            part = drop_empty_columns(canvas.select_rows(torch.tensor(chunk)))
            chosen = [examples[index] for index in chunk]
            batches.append(
                Batch(
                    inputs=part,
                    keys=tuple(f"{example.source}/{example.key}" for example in chosen),
                    tasks=tuple(example.task for example in chosen),
                    rows=tuple(first + index for index in chunk),
                    draws=tuple(example.mask_draw for example in chosen),
                    packing=pack_rows(part.is_padding, self.pack_length)
                    if self.pack_length
                    else None,
                    outcomes=tuple(example.outcome for example in chosen),
                    numbers=tuple(example.row for example in chosen),
                )
            )
        return batches


class PixelBatches(_MixtureBatches):
    """Pictures of a mixture as pixels in [0, 1], for image tokenizers.

    Args:
        reader: Global order; every source must have pictures.
        micro_batch_size: Rows of one forward pass; None for all of this process's rows.
    """

    def __init__(self, reader: MixtureReader, *, micro_batch_size: int | None = None) -> None:
        super().__init__(reader, micro_batch_size)

    def batches(self, step: int) -> list[Batch]:
        """This process's micro-batches of global batch `step`."""
        examples = self.reader.batch(step)
        first = self.reader.rank * self.num_rows
        batches = []
        for chunk in self._chunks(list(range(len(examples)))):
            chosen = [examples[index] for index in chunk]
            samples = [self.reader.readers[e.source][e.index] for e in chosen]
            batches.append(
                Batch(
                    inputs=pixels_from_images([sample.image for sample in samples]),
                    keys=tuple(f"{example.source}/{example.key}" for example in chosen),
                    rows=tuple(first + index for index in chunk),
                    outcomes=tuple(example.outcome for example in chosen),
                    numbers=tuple(example.row for example in chosen),
                )
            )
        return batches


def drop_empty_columns(canvas: Canvas) -> Canvas:
    """Leave out the columns that are padding in every row."""
    kept = ~canvas.is_padding.all(dim=0)
    if bool(kept.all()):
        return canvas
    names = ("input_ids", "window_ids", "modality_ids", "position_ids", "order", "document_ids")
    tensors = {name: getattr(canvas, name)[:, kept] for name in (*names, "is_free", "is_padding")}
    return Canvas(**tensors)


def order_by_shape(canvas: Canvas) -> list[int]:
    """Rows sorted by the windows they have, then by length: neighbours need little padding."""
    lengths = (~canvas.is_padding).sum(dim=1)
    present = torch.zeros_like(lengths)
    for place, window in enumerate(canvas.windows()):
        part = canvas.window_slice(window)
        present += (~canvas.is_padding[:, part]).any(dim=1).long() << place
    return (present * (canvas.length + 1) + lengths).argsort(stable=True).tolist()


class _Steps(Dataset[list[Batch]]):
    def __init__(self, source: BatchSource, first: int, stop: int) -> None:
        self.source, self.first, self.stop = source, first, stop

    def __len__(self) -> int:
        return self.stop - self.first

    def __getitem__(self, index: int) -> list[Batch]:
        return self.source.batches(self.first + index)


def iterate_steps(
    source: BatchSource, first: int, stop: int, *, num_workers: int = 0
) -> Iterator[tuple[int, list[Batch]]]:
    """(step, micro-batches) for steps first..stop - 1, in order, from background workers if any.

    The loader seeds its workers from a generator of its own: it would take a number from the
    default one each time it starts, and a resumed run starts it once more than a straight one.
    """
    loader = DataLoader(
        _Steps(source, first, stop),
        batch_size=None,
        shuffle=False,
        num_workers=num_workers,
        generator=torch.Generator(),
    )
    yield from enumerate(loader, start=first)
