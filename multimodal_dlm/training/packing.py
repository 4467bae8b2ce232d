"""Sequence packing: short rows share a row of the forward pass and do not see each other.

Rows are corrupted, weighted and scored one by one as ever; only the backbone sees them packed. Its
attention plan keeps documents apart by `document_ids`, positions and noise levels travel with their
tokens, and the states come back to the rows they belong to: losses and gradients are those of the
unpacked rows, with less padding.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from multimodal_dlm.canvas import Canvas
from multimodal_dlm.training.dual_stream import Streams


@dataclass(frozen=True)
class Packing:
    """Where each token of a batch lies in the packed rows.

    Args:
        source: Flat index into (batch, length) of the token at each packed place, -1 for padding.
        target: Flat index into (packed rows, packed length) of each token, -1 for padding.
        pack_length: Tokens that a packed row may hold.
    """

    source: Int[Tensor, "rows packed_length"]
    target: Int[Tensor, "batch length"]
    pack_length: int

    @property
    def num_slots(self) -> int:
        """Packed places, padding included."""
        return self.source.numel()

    def to(self, device: torch.device) -> "Packing":
        """A copy on another device."""
        return replace(self, source=self.source.to(device), target=self.target.to(device))

    def pack(self, values: Tensor) -> Tensor:
        """(batch, length, ...) -> (rows, packed length, ...); padding repeats the first token."""
        return values.flatten(0, 1)[self.source.clamp(min=0)]

    def unpack(self, values: Tensor) -> Tensor:
        """(rows, packed length, ...) -> (batch, length, ...); 0 where the batch has padding."""
        is_token = (self.target >= 0).view(*self.target.shape, *[1] * (values.dim() - 2))
        return values.flatten(0, 1)[self.target.clamp(min=0)] * is_token

    def pack_canvas(self, canvas: Canvas) -> Canvas:
        """The packed rows; every row of the batch is a document of its own.

        It is for the backbone alone: a window no longer spans the same columns in every row.
        """
        packed = {part.name: self.pack(getattr(canvas, part.name)) for part in fields(canvas)}
        row = torch.arange(canvas.batch_size, device=canvas.device)[:, None]
        documents = canvas.document_ids * canvas.batch_size + row
        is_padding = self.source < 0
        packed |= {
            "document_ids": self.pack(documents),
            "is_padding": is_padding,
            "is_free": packed["is_free"] & ~is_padding,
        }
        return Canvas(**packed)


def pack_rows(is_padding: Bool[Tensor, "batch length"], pack_length: int) -> Packing:
    """Pack the rows of a batch, longest first, each into the first packed row that has room.

    Args:
        is_padding: Padding of the unpacked rows.
        pack_length: Tokens of a packed row; a longer row stays alone.
    """
    lengths = (~is_padding).sum(dim=1).tolist()
    bins = first_fit(lengths, pack_length)
    width = max(sum(lengths[row] for row in members) for members in bins)
    source = torch.full((len(bins), width), -1, dtype=torch.long)
    target = torch.full(is_padding.shape, -1, dtype=torch.long)
    for place, members in enumerate(bins):
        start = 0
        for row in members:
            columns = (~is_padding[row]).nonzero().flatten()
            stop = start + len(columns)
            source[place, start:stop] = row * is_padding.shape[1] + columns
            target[row, columns] = place * width + torch.arange(start, stop)
            start = stop
    return Packing(source, target, pack_length)


def first_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """First-fit-decreasing bin packing: at most 11/9 of the fewest bins, plus one.

    Returns:
        Members of each bin.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for item in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        place = next((p for p, left in enumerate(room) if lengths[item] <= left), None)
        if place is None:
            bins.append([])
            room.append(capacity)
            place = len(bins) - 1
        bins[place].append(item)
        room[place] -= lengths[item]
    return bins


def canvas_states(
    model: Any,
    canvas: Canvas,
    levels: Float[Tensor, "batch length"],
    packing: Packing | None = None,
    clean: Canvas | None = None,
) -> Any:
    """The backbone's output for a canvas, packed for the forward pass if asked for.

    Blocks see the clean tokens of those before them: where a later block follows, these go along as
    a second stream, which leaves no trace in the output.

    Args:
        model: Backbone.
        canvas: Rows, with the attention orders to use.
        levels: Noise level of each token.
        packing: Of these rows; None runs them as they are.
        clean: The same rows without noise; None where no block follows another.
    """
    streams = Streams.of(canvas, levels, clean)
    rows, length = streams.canvas, canvas.length
    if packing is not None and rows.length > length:
        packing = pack_rows(rows.is_padding, packing.pack_length).to(canvas.device)
    if packing is not None:
        streams = streams.map(packing.pack, packing.pack_canvas(rows))
        rows = streams.canvas
    output = model(
        rows.input_ids,
        noise_levels=streams.levels,
        modality_ids=rows.modality_ids,
        position_ids=rows.position_ids,
        attention_plan=streams.plan(),
    )
    if packing is not None:
        output.hidden_states = packing.unpack(output.hidden_states)
    output.hidden_states = output.hidden_states[:, :length]
    return output
