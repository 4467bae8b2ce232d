"""The canonical row: which windows it has, where they stand, and their rotary coordinates.

    <boi> image codes <eoi> | instruction window | caption or answer window

A row without a picture starts with `<bos>` instead. Text is numbered 1, 2, ... through instruction
and answer, padding skipped, whatever the picture's size; image tokens carry (0, row, column);
structure tokens stand at the origin. This file turns rows of windows into a rectangular canvas.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from multimodal_dlm.canvas import STRUCTURE_WINDOW, Canvas
from multimodal_dlm.errors import ConfigError, unknown_name
from multimodal_dlm.vocabulary import UnifiedVocabulary

LAYOUT_NAME = "unified_v1"
CONDITION_ATTENTIONS = ("prefix", "full", "causal")
Text = str | list[int]  # A text, or its codes.
_REQUIRED = ("name", "max_window", "unconditional_window", "condition_attention")
_ENTRIES = (*_REQUIRED, "block_lengths")


@dataclass(frozen=True)
class TrainingRow:
    """One training example before it is laid out.

    Args:
        task: One of `processing.TASKS`: what is free and what is the condition.
        codes: Image codes, one integer array (h, w) per level; None when the row has no image.
        instruction: Question or command, or its text codes; None or empty for none.
        text: Caption or answer, or its text codes.
        window_draw: A uniform number in [0, 1) that sets the length of a free text window, or the
            length of the blocks it is written in.
    """

    task: str
    codes: tuple[Any, ...] | None = None
    instruction: Text | None = None
    text: Text | None = None
    window_draw: float = 0.0


@dataclass
class LayoutRow:
    """One row before padding: the ids, the free flags and the attention order of each window.

    Args:
        has_image: Starts with `<boi>` and closes its picture with `<eoi>`; else with `<bos>`.
        ids: Unified ids by window; absent windows are empty.
        is_free: Free flags by window, as long as its ids.
        order: Attention order by window, of the whole window or of each of its positions.
    """

    has_image: bool
    ids: dict[int, np.ndarray] = field(default_factory=dict)
    is_free: dict[int, np.ndarray] = field(default_factory=dict)
    order: dict[int, int | np.ndarray] = field(default_factory=dict)

    def put(
        self,
        window: int,
        ids: np.ndarray,
        *,
        is_free: bool | np.ndarray,
        order: int | np.ndarray,
    ) -> None:
        """Set a window."""
        self.ids[window] = ids
        self.is_free[window] = np.broadcast_to(np.asarray(is_free, bool), ids.shape)
        self.order[window] = order


@dataclass(frozen=True)
class Window:
    """A window of the canonical row.

    Args:
        id: Positive integer, `window_ids` on the canvas.
        modality: Name of its modality.
        grid: Height and width in tokens for a picture, None for a sequence.
    """

    id: int
    modality: str
    grid: tuple[int, int] | None


def make_layout(
    *,
    max_text: int,
    num_image_tokens: int,
    unconditional_text: int = 8,
    condition_attention: str = "prefix",
    block_lengths: Sequence[int] = (),
) -> dict[str, Any]:
    """The `layout` entry of `transformer/config.json`.

    Args:
        max_text: Longest text window, `<eos>` included.
        num_image_tokens: Tokens of a picture, all levels.
        unconditional_text: Masks that stand for "no caption" in the unconditional branch.
        condition_attention: `prefix` (the condition never sees what is generated), `full`, or
            `causal` (a token sees what comes before it in the order of the windows).
        block_lengths: Lengths of the blocks that answers are written in, one after the other, each
            seeing those before it; training draws among them, the first is the default of
            generation. None writes an answer in one piece.
    """
    layout: dict[str, Any] = {
        "name": LAYOUT_NAME,
        "max_window": {"text": max_text, "image": num_image_tokens},
        "unconditional_window": {"text": unconditional_text, "image": num_image_tokens},
        "condition_attention": condition_attention,
    }
    if block_lengths:
        layout["block_lengths"] = {"text": list(block_lengths)}
    return check_layout(layout)


def check_layout(layout: Mapping[str, Any]) -> dict[str, Any]:
    """Return the layout as a plain dict.

    Raises:
        ConfigError: When an entry is missing or unknown, a window has no length, or blocks go with
            attention that has no use for them.
    """
    for name in layout:
        if name not in _ENTRIES:
            raise unknown_name("layout entry", name, _ENTRIES)
    missing = [name for name in _REQUIRED if name not in layout]
    if missing:
        raise ConfigError(f"`layout` must have the entries {_REQUIRED}; missing {missing}.")
    if layout["name"] != LAYOUT_NAME:
        raise unknown_name("layout", str(layout["name"]), [LAYOUT_NAME])
    if layout["condition_attention"] not in CONDITION_ATTENTIONS:
        raise unknown_name(
            "condition_attention", str(layout["condition_attention"]), CONDITION_ATTENTIONS
        )
    windows: dict[str, dict[str, int]] = {}
    for name in ("max_window", "unconditional_window"):
        windows[name] = {key: int(value) for key, value in layout[name].items()}
        for modality, length in windows[name].items():
            if length < 1:
                raise ConfigError(f"`layout.{name}.{modality}` must be at least 1; got {length}.")
    if windows["unconditional_window"]["text"] > windows["max_window"]["text"]:
        raise ConfigError(
            "`layout.unconditional_window.text` must not exceed `max_window.text`; got"
            f" {windows['unconditional_window']['text']} and {windows['max_window']['text']}."
        )
    _check_blocks(layout)
    return {**layout, **windows}


def _check_blocks(layout: Mapping[str, Any]) -> None:
    lengths = layout.get("block_lengths", {}).get("text", [])
    if any(not isinstance(length, int) or length < 1 for length in lengths):
        raise ConfigError(
            f"`layout.block_lengths.text` must be whole numbers, 1 or more; got {lengths}. Use"
            " [16]."
        )
    if lengths and layout["condition_attention"] != "prefix":
        raise ConfigError(
            "`layout.block_lengths` needs `condition_attention: prefix`; got"
            f" `{layout['condition_attention']}`. Leave one of them out: a causal answer is written"
            " token by token, and under full attention the condition sees the answer."
        )


def text_blocks(layout: Mapping[str, Any]) -> tuple[int, ...]:
    """Lengths of the blocks of an answer, the default first; none when it is written in one piece.

    A causal row is written in blocks of one token.
    """
    if layout["condition_attention"] == "causal":
        return (1,)
    return tuple(layout.get("block_lengths", {}).get("text", ()))


def assemble(
    rows: Sequence[LayoutRow], windows: Sequence[Window], vocabulary: UnifiedVocabulary
) -> Canvas:
    """Rows -> a rectangular canvas; every window is padded to its widest row.

    Args:
        rows: At least one row.
        windows: The windows of the canonical row in canvas order, pictures first.
        vocabulary: Gives special ids and modality indexes.

    Returns:
        A canvas of shape (rows, length) with three position axes.
    """
    if not rows:
        raise ConfigError("A canvas needs at least one row; got none.")
    has_images = any(row.has_image for row in rows)
    used = [window for window in windows if window.grid is None or has_images]
    widths = {w.id: max(len(row.ids.get(w.id, ())) for row in rows) for w in used}
    length = 1 + has_images + sum(widths.values())
    shape = (len(rows), length)
    arrays = {
        "input_ids": np.full(shape, vocabulary.special_id("pad"), dtype=np.int64),
        "window_ids": np.full(shape, STRUCTURE_WINDOW, dtype=np.int64),
        "modality_ids": np.zeros(shape, dtype=np.int64),
        "position_ids": np.zeros((*shape, 3), dtype=np.int64),
        "order": np.zeros(shape, dtype=np.int64),
        "document_ids": np.zeros(shape, dtype=np.int64),
        "is_free": np.zeros(shape, dtype=bool),
        "is_padding": np.ones(shape, dtype=bool),
    }
    column = _put_structure(arrays, rows, 0, vocabulary, windows[0], closing=False)
    is_open = has_images
    for window in used:
        if is_open and window.grid is None:
            column = _put_structure(arrays, rows, column, vocabulary, windows[0], closing=True)
            is_open = False
        _put_window(arrays, rows, column, widths[window.id], window, vocabulary)
        column += widths[window.id]
    if is_open:
        _put_structure(arrays, rows, column, vocabulary, windows[0], closing=True)
    _number_text(arrays, [window.id for window in used if window.grid is None])
    return Canvas(**{name: torch.from_numpy(array) for name, array in arrays.items()})


def _put_structure(
    arrays: dict[str, np.ndarray],
    rows: Sequence[LayoutRow],
    column: int,
    vocabulary: UnifiedVocabulary,
    picture: Window,
    *,
    closing: bool,
) -> int:
    """Write `<boi>`/`<bos>` or `<eoi>` and return the next column."""
    has_image = np.array([row.has_image for row in rows])
    opening = np.where(has_image, vocabulary.special_id("boi"), vocabulary.special_id("bos"))
    present = has_image if closing else np.ones(len(rows), bool)
    ids = np.full(len(rows), vocabulary.special_id("eoi")) if closing else opening
    arrays["input_ids"][present, column] = ids[present]
    arrays["is_padding"][present, column] = False
    arrays["modality_ids"][has_image, column] = vocabulary.modality_id(picture.modality)
    arrays["order"][:, column] = [int(np.min(row.order.get(picture.id, 0))) for row in rows]
    return column + 1


def _put_window(
    arrays: dict[str, np.ndarray],
    rows: Sequence[LayoutRow],
    column: int,
    width: int,
    window: Window,
    vocabulary: UnifiedVocabulary,
) -> None:
    """Write one window of every row into its columns."""
    part = slice(column, column + width)
    arrays["window_ids"][:, part] = window.id
    arrays["modality_ids"][:, part] = vocabulary.modality_id(window.modality)
    for index, row in enumerate(rows):
        ids = row.ids.get(window.id, ())
        kept = slice(column, column + len(ids))
        order = np.asarray(row.order.get(window.id, 0))
        if order.ndim:  # What pads the window goes on with its last block.
            order = np.pad(order, (0, width - len(order)), mode="edge")
        arrays["order"][index, part] = order
        if len(ids):
            arrays["input_ids"][index, kept] = ids
            arrays["is_free"][index, kept] = row.is_free[window.id]
            arrays["is_padding"][index, kept] = False
    if window.grid is not None and width:
        height, width_tokens = window.grid
        axes = np.indices((height, width_tokens)).reshape(2, -1)
        arrays["position_ids"][:, part, 1] = axes[0]
        arrays["position_ids"][:, part, 2] = axes[1]


def _number_text(arrays: dict[str, np.ndarray], text_windows: Sequence[int]) -> None:
    """Number the text of each row 1, 2, ... through all its text windows, padding skipped."""
    counted = np.isin(arrays["window_ids"], text_windows) & ~arrays["is_padding"]
    arrays["position_ids"][..., 0] = np.cumsum(counted, axis=1) * counted
