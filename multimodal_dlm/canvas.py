"""The canvas: one row of tokens for every task, and the noise level of each token.

A *window* is one run of positions of one modality that is written together (the image, the
instruction, the answer). Padding is per window: a window occupies the same columns in every row, so
positions, logits and caches are rectangular slices. The canvas knows nothing of particular
modalities, tokenizers or tasks.
"""

from dataclasses import dataclass, fields, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from multimodal_dlm.errors import CanvasError
from multimodal_dlm.vocabulary import UnifiedVocabulary

STRUCTURE_WINDOW = 0


@dataclass(frozen=True)
class Canvas:
    """A batch of token rows and everything a backbone or a sampler may know about them.

    Args:
        input_ids: Unified ids.
        window_ids: Window of each position; 0 is structure (`<boi>`), which has no noise group.
        modality_ids: Index into `vocabulary.modalities`.
        position_ids: Rotary coordinates, one per axis (sequence, row, column).
        order: Attention order: a query sees keys of the same or a lower order.
        document_ids: Rows packed into one row do not see each other.
        is_free: The sampler may write it, the loss may count it; constant during a run.
        is_padding: Only makes the batch rectangular: never attended, masked, counted or written.
    """

    input_ids: Int[Tensor, "batch length"]
    window_ids: Int[Tensor, "batch length"]
    modality_ids: Int[Tensor, "batch length"]
    position_ids: Int[Tensor, "batch length axes"]
    order: Int[Tensor, "batch length"]
    document_ids: Int[Tensor, "batch length"]
    is_free: Bool[Tensor, "batch length"]
    is_padding: Bool[Tensor, "batch length"]

    @property
    def batch_size(self) -> int:
        """Number of rows."""
        return self.input_ids.shape[0]

    @property
    def length(self) -> int:
        """Number of columns."""
        return self.input_ids.shape[1]

    @property
    def device(self) -> torch.device:
        """Device of the tensors."""
        return self.input_ids.device

    def replace(self, **tensors: Tensor) -> "Canvas":
        """A copy with some tensors exchanged."""
        made = replace(self, **tensors)
        if made.window_ids is self.window_ids and "_runs" in self.__dict__:
            made.__dict__["_runs"] = self._runs
        return made

    def to(self, device: torch.device | str) -> "Canvas":
        """A copy on another device."""
        return Canvas(**{part.name: getattr(self, part.name).to(device) for part in fields(self)})

    def select_rows(self, index: Tensor | slice) -> "Canvas":
        """A copy holding some rows, by slice, integer index or boolean mask."""
        return Canvas(**{part.name: getattr(self, part.name)[index] for part in fields(self)})

    def select_columns(self, index: Tensor | slice) -> "Canvas":
        """A copy holding some columns, by slice, integer index or boolean mask."""
        return Canvas(**{part.name: getattr(self, part.name)[:, index] for part in fields(self)})

    @cached_property
    def _runs(self) -> dict[int, slice]:
        return _window_runs(self.window_ids)

    def windows(self) -> list[int]:
        """Ids of the windows present, structure excluded, in canvas order."""
        return list(self._runs)

    def window_slice(self, window_id: int) -> slice:
        """Columns of a window, the same in every row."""
        if window_id not in self._runs:
            raise CanvasError(f"The canvas has no window {window_id}; it has {self.windows()}.")
        return self._runs[window_id]

    def free_windows(self) -> list[int]:
        """Ids of the windows with a free position in some row, in canvas order."""
        is_free = self.is_free.any(dim=0)
        return [w for w in self.windows() if bool(is_free[self.window_slice(w)].any())]

    def window_modality(self, window_id: int) -> int:
        """Modality index of a window."""
        return int(self.modality_ids[0, self.window_slice(window_id).start])

    def validate(self, vocabulary: UnifiedVocabulary) -> "Canvas":
        """Check the invariants and return the canvas itself.

        Raises:
            CanvasError: When shapes differ, padding is free, structure is free, a window is torn
                or mixes modalities, a final id belongs to another modality, or an id is unknown.
        """
        shape = self.input_ids.shape
        for part in fields(self):
            if getattr(self, part.name).shape[:2] != shape:
                raise CanvasError(
                    f"`{part.name}` must have shape {tuple(shape)} like `input_ids`; got"
                    f" {tuple(getattr(self, part.name).shape)}."
                )
        if bool((self.is_free & self.is_padding).any()):
            raise CanvasError("A padding position may not be free; mark it one or the other.")
        if bool((self.is_free & (self.window_ids == STRUCTURE_WINDOW)).any()):
            raise CanvasError("A structure position (window 0) may not be free.")
        if bool((self.window_ids != self.window_ids[:1]).any()):
            raise CanvasError("A window must occupy the same columns in every row.")
        for window in self.windows():
            part = self.window_slice(window)
            if bool((self.window_ids[0, part] != window).any()):
                raise CanvasError(f"Window {window} must be one run of columns.")
            if bool((self.modality_ids[:, part] != self.modality_ids[:1, part.start]).any()):
                raise CanvasError(f"Window {window} must hold one modality only.")
        _check_ids(self, vocabulary)
        return self


def noise_levels(canvas: Canvas, vocabulary: UnifiedVocabulary) -> Float[Tensor, "batch length"]:
    """Noise level of each token: the realised masked share of its noise group; 0 if it is known.

    A noise group is the part of a window with one attention order (the whole window unless it is
    written in blocks), in one document. Frozen masks count; padding does not. Training and
    inference use this one rule, so the backbone never sees which mask schedule is used.

    Returns:
        float32 levels in [0, 1], shape (batch, length).
    """
    return LevelGroups.of(canvas).levels(vocabulary.is_masked(canvas.input_ids))


@dataclass(frozen=True)
class LevelGroups:
    """The noise groups of a canvas, for levels of many canvases that differ in their ids alone.

    Args:
        keys: A number for each position's row and group, (batch x length).
        totals: Tokens of each group, padding not counted; 1 for none.
        is_counted: Not padding.
    """

    keys: Int[Tensor, " tokens"]
    totals: Float[Tensor, " groups"]
    is_counted: Bool[Tensor, "batch length"]

    @classmethod
    def of(cls, canvas: Canvas) -> "LevelGroups":
        """The groups of a canvas."""
        groups = _group_keys(canvas)
        num_groups = int(groups.max()) + 1 if groups.numel() else 1
        rows = torch.arange(canvas.batch_size, device=canvas.device)[:, None] * num_groups
        keys, is_counted = (groups + rows).flatten(), ~canvas.is_padding
        zeros = torch.zeros(num_groups * canvas.batch_size, device=canvas.device)
        totals = zeros.scatter_add(0, keys, is_counted.flatten().float())
        return cls(keys, totals.clamp(min=1), is_counted)

    def levels(self, is_masked: Bool[Tensor, "batch length"]) -> Float[Tensor, "batch length"]:
        """`noise_levels` of the canvas with these tokens masked."""
        is_masked = is_masked & self.is_counted
        masked = torch.zeros_like(self.totals).scatter_add_(
            0, self.keys, is_masked.flatten().float()
        )
        return (masked / self.totals)[self.keys].view(is_masked.shape) * is_masked


def causal_order(canvas: Canvas) -> Int[Tensor, "batch length"]:
    """Rank of each token by (attention order, column): a strict order within the row."""
    columns = torch.arange(canvas.length, device=canvas.device)
    return (canvas.order * canvas.length + columns).argsort(dim=1).argsort(dim=1)


def _group_keys(canvas: Canvas) -> Int[Tensor, "batch length"]:
    """A small non-negative integer naming (document, window, order) at each position."""
    num_windows = int(canvas.window_ids.max()) + 1 if canvas.window_ids.numel() else 1
    num_orders = int(canvas.order.max()) + 1 if canvas.order.numel() else 1
    documents = canvas.document_ids * num_windows + canvas.window_ids
    return documents * num_orders + canvas.order


def _window_runs(window_ids: Int[Tensor, "batch length"]) -> dict[int, slice]:
    """Windows and the columns they span, in order, read from the first row."""
    runs: dict[int, slice] = {}
    values, counts = torch.unique_consecutive(window_ids[:1].flatten(), return_counts=True)
    column = 0
    for window, count in zip(values.tolist(), counts.tolist(), strict=True):
        if window != STRUCTURE_WINDOW:
            first = runs[window].start if window in runs else column
            runs[window] = slice(first, column + count)
        column += count
    return runs


def _check_ids(canvas: Canvas, vocabulary: UnifiedVocabulary) -> None:
    """Refuse ids that are unknown or that belong to another modality than their window."""
    ids = canvas.input_ids
    if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= vocabulary.vocab_size):
        raise CanvasError(
            f"`input_ids` must lie in 0..{vocabulary.vocab_size - 1}; got"
            f" {int(ids.min())}..{int(ids.max())}."
        )
    for window in canvas.windows():
        part = canvas.window_slice(window)
        modality = vocabulary.modalities[canvas.window_modality(window)]
        columns = vocabulary.columns(modality)
        inside = (ids[:, part] >= columns.start) & (ids[:, part] < columns.stop)
        known = inside | vocabulary.is_masked(ids[:, part]) | canvas.is_padding[:, part]
        if not bool(known.all()):
            raise CanvasError(
                f"Window {window} holds `{modality}`, ids {columns.start}..{columns.stop - 1} or a"
                f" mask; got id {int(ids[:, part][~known][0])}."
            )
