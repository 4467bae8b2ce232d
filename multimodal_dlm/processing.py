"""Layouts: prompts, pictures, questions and templates -> Canvas, and back to text and codes.

One canonical row serves every task:

    <boi> image codes <eoi> | instruction window | caption or answer window

The prompt of text-to-image and a generated caption are the same window; a question is the
instruction. Physical order never depends on the task; attention order does. A modality that is
absent has no tokens; a modality that is masked has mask tokens.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from multimodal_dlm.canvas import Canvas, causal_order
from multimodal_dlm.errors import CanvasError, ConfigError, unknown_name
from multimodal_dlm.layout import (
    LayoutRow,
    Text,
    TrainingRow,
    Window,
    assemble,
    check_layout,
    text_blocks,
)
from multimodal_dlm.tasks import TASKS, check_score_inputs
from multimodal_dlm.tokenizers.text import encode_text
from multimodal_dlm.vocabulary import UnifiedVocabulary

MASK_MARKER = "[MASK]"
Codes = tuple[Tensor, ...]


class TextTokenizer(Protocol):
    """What the processor needs of a text tokenizer (any Hugging Face fast tokenizer)."""

    def encode(self, text: str, **kwargs: Any) -> list[int]:
        """Text -> codes."""
        ...

    def decode(self, token_ids: list[int], **kwargs: Any) -> Any:
        """Codes -> text."""
        ...


class UnifiedProcessor:
    """Builds canvases for every task and reads them back.

    Args:
        vocabulary: Unified vocabulary; its text modality is one segment called `text`, its image
            levels are `image.0`, `image.1`, ...
        layout: `{name, max_window, unconditional_window, condition_attention}`, see
            `multimodal_dlm.layout.make_layout`.
        tokenizer: Text tokenizer whose ids are the codes of segment `text`.
        image_grids: Height and width in tokens of each image level.

    Raises:
        ConfigError: When the layout misses an entry or contradicts the image grids.
    """

    def __init__(
        self,
        *,
        vocabulary: UnifiedVocabulary,
        layout: Mapping[str, Any],
        tokenizer: TextTokenizer,
        image_grids: Sequence[tuple[int, int]] = ((8, 8),),
    ) -> None:
        self.vocabulary = vocabulary
        self.layout = check_layout(layout)
        self._is_causal = self.layout["condition_attention"] == "causal"
        self.blocks = text_blocks(self.layout)
        self.tokenizer = tokenizer
        self.image_grids = tuple((int(h), int(w)) for h, w in image_grids)
        self.image_windows = tuple(range(1, len(self.image_grids) + 1))
        self.instruction_window = len(self.image_grids) + 1
        self.answer_window = len(self.image_grids) + 2
        tokens = sum(h * w for h, w in self.image_grids)
        if tokens != self.layout["max_window"]["image"]:
            raise ConfigError(
                "`layout.max_window.image` must be the number of image tokens; got"
                f" {self.layout['max_window']['image']} and grids {self.image_grids} with {tokens}."
            )
        self._windows = (
            *(
                Window(w, "image", g)
                for w, g in zip(self.image_windows, self.image_grids, strict=True)
            ),
            Window(self.instruction_window, "text", None),
            Window(self.answer_window, "text", None),
        )
        self._text_start = vocabulary.columns("text").start
        self._eos = vocabulary.special_id("eos")
        self._fill = vocabulary.special_id("fill")

    # Canvases for inference.

    def text_to_image(self, prompts: Sequence[str]) -> Canvas:
        """Captions clean, images masked and free. One row per prompt."""
        return self._assemble([self._image_row(prompt) for prompt in prompts])

    def image_to_text(
        self, codes: Codes, *, questions: Sequence[str] | None = None, gen_length: int
    ) -> Canvas:
        """Images clean, answers of `gen_length` positions masked and free.

        Args:
            codes: Image codes, one (batch, h, w) tensor per level.
            questions: One question per row; None asks for captions.
            gen_length: Positions of the answer window, 1..`layout.max_window.text`.
        """
        pictures = self._split_codes(codes)
        asked = self._matching(questions, len(pictures), "questions")
        window = self._masked_text(gen_length)
        rows = [
            self._text_row(picture, question, window, self._block())
            for picture, question in zip(pictures, asked, strict=True)
        ]
        return self._assemble(rows)

    def joint(self, batch_size: int, *, gen_length: int) -> Canvas:
        """Captions and images masked and free, seeing each other."""
        text = self._masked_text(gen_length)
        rows = []
        for _ in range(batch_size):
            row = self._image_row(text, order=(0, 0))
            row.is_free[self.answer_window] = np.ones(gen_length, bool)
            rows.append(row)
        return self._assemble(rows)

    def text(
        self, prompts: Sequence[str | None], *, gen_length: int, block_length: int | None = None
    ) -> Canvas:
        """Text alone: prompts are instructions, answers are masked and free.

        Answers are written in blocks of `block_length`, by default the first of the layout's.
        """
        window = self._masked_text(gen_length)
        block = self._block(block_length)
        return self._assemble([self._text_row(None, p, window, block) for p in prompts])

    def inpaint(
        self, codes: Codes, is_hole: Bool[Tensor, "batch h w"], prompts: Sequence[str]
    ) -> Canvas:
        """Captions clean, images known but for the holes, which are masked and free."""
        pictures = self._split_codes(codes)
        rows = []
        for index, prompt in enumerate(self._matching(prompts, len(pictures), "prompts")):
            row = self._image_row(prompt or "")
            for level, window in enumerate(self.image_windows):
                grid = self.image_grids[level]
                if tuple(is_hole.shape[1:]) != grid:
                    raise ConfigError(
                        f"`is_hole` must have shape (batch, {grid[0]}, {grid[1]}); got"
                        f" {tuple(is_hole.shape)}."
                    )
                hole = is_hole[index].flatten().cpu().numpy()
                row.ids[window] = np.where(hole, row.ids[window], pictures[index][level])
                row.is_free[window] = hole
            rows.append(row)
        return self._assemble(rows)

    def infill(self, templates: Sequence[str], *, codes: Codes | None = None) -> Canvas:
        """Texts with `[MASK]` markers: each marker is one free token, the rest is known."""
        pictures = self._split_codes(codes) if codes is not None else [None] * len(templates)
        mask = self.vocabulary.mask_token_id("text")
        rows = []
        for template, picture in zip(templates, pictures, strict=True):
            parts: list[int] = []
            for index, piece in enumerate(template.split(MASK_MARKER)):
                parts += [mask] * (index > 0) + self._encode(piece).tolist()
            ids = self._checked(np.array([*parts, self._eos], dtype=np.int64), template)
            row = self._text_row(picture, None, ids, self._block())
            row.is_free[self.answer_window] = ids == mask
            rows.append(row)
        longest = max((row.order[self.answer_window] for row in rows), key=len)
        for row in rows:  # What pads a short text opens when what stands there in a long one does.
            row.order[self.answer_window] = longest
        return self._assemble(rows)

    def score(
        self,
        task: str,
        *,
        codes: Codes | None = None,
        texts: Sequence[str | None] | None = None,
        questions: Sequence[str | None] | None = None,
    ) -> Canvas:
        """Clean rows whose free windows are what `task` generates; nothing is masked.

        Text windows are content and `<eos>`: the likelihood is of the text given its length.

        Raises:
            ConfigError: When the task is unknown, lacks an input or has one too many.
        """
        inputs = {"codes": codes[0] if codes else None, "texts": texts, "questions": questions}
        check_score_inputs(task, inputs)
        count = len(next(part for part in inputs.values() if part is not None))
        written = self._matching(texts, count, "texts")
        asked = self._matching(questions, count, "questions")
        rows = [
            TrainingRow(
                task, tuple(level[i].cpu().numpy() for level in codes) if codes else None, q, t
            )
            for i, (q, t) in enumerate(zip(asked, written, strict=True))
        ]
        return self.training_canvas(rows)

    def unconditional(
        self, canvas: Canvas, *, negative_prompts: Sequence[str] | None = None
    ) -> Canvas:
        """The branch without the condition: its window becomes masks that nobody may write.

        In text-to-image and inpainting the caption becomes `unconditional_window.text` masks (or
        the negative prompts); in captioning and question answering the picture becomes masks and
        the question stays; for text alone the instruction becomes masks.

        Raises:
            CanvasError: When everything in the canvas is free, so that there is no condition.
        """
        free = canvas.free_windows()
        is_image_free = any(window in free for window in self.image_windows)
        has_image = any(window in canvas.windows() for window in self.image_windows)
        if is_image_free and self.answer_window not in free:
            return self._replace_text(canvas, self.answer_window, negative_prompts)
        if negative_prompts is not None:
            raise ConfigError(
                "`negative_prompt` works where the prompt is the condition (text-to-image,"
                " inpainting); this canvas has no such prompt. Leave it out."
            )
        if self.answer_window in free and has_image and not is_image_free:
            ids = canvas.input_ids.clone()
            for window in self.image_windows:
                part = canvas.window_slice(window)
                ids[:, part] = self.vocabulary.mask_token_id("image")
            pad = self.vocabulary.special_id("pad")
            return canvas.replace(input_ids=ids.masked_fill(canvas.is_padding, pad))
        if self.answer_window in free and self.instruction_window in canvas.windows():
            return self._replace_text(canvas, self.instruction_window, None)
        raise CanvasError(
            "Guidance needs a condition, and this canvas has none. Use `guidance_scale=1.0`."
        )

    # Canvases for training.

    def training_canvas(self, rows: Sequence[TrainingRow]) -> Canvas:
        """Clean rows of any mixture of tasks; `is_free` is what the task may mask and count.

        Lengths of free text windows are log-uniform, so that any `gen_length` is in distribution.
        """
        return self._assemble([self._training_row(row) for row in rows])

    def _training_row(self, row: TrainingRow) -> LayoutRow:
        if row.task not in TASKS:
            raise unknown_name("task", row.task, TASKS)
        picture = None
        if row.codes is not None:
            levels = (np.asarray(level) for level in row.codes)
            picture = [self._codes_to_ids(level, index) for index, level in enumerate(levels)]
        takes_none = row.task == "unconditional_text" and picture is None
        needs_image = row.task != "text" and not takes_none
        if needs_image != (picture is not None):
            raise ConfigError(
                f"Task `{row.task}` {'needs' if needs_image else 'has no place for'} image `codes`;"
                f" got {'none' if picture is None else 'some'}."
            )
        if row.task in ("text_to_image", "unconditional_image", "joint"):
            return self._training_image_row(row, picture or [])
        block = self.blocks[int(row.window_draw * len(self.blocks))] if self.blocks else None
        window = self._window(row.text or "", row.window_draw, block)
        built = self._text_row(picture, row.instruction, window, block)
        if row.task == "unconditional_text" and picture is not None:
            for index in self.image_windows:
                built.ids[index] = np.full_like(
                    built.ids[index], self.vocabulary.mask_token_id("image")
                )
        return built

    def _training_image_row(self, row: TrainingRow, picture: list[np.ndarray]) -> LayoutRow:
        if row.task == "text_to_image":
            built = self._image_row(row.text or "")
        elif row.task == "unconditional_image":
            masks = self._masked_text(self.layout["unconditional_window"]["text"])
            built = self._image_row(masks)
        else:
            window = self._window(row.text or "", row.window_draw)
            built = self._image_row(window, order=(0, 0))
            built.is_free[self.answer_window] = np.ones(len(window), bool)
        for index, ids in zip(self.image_windows, picture, strict=True):
            built.ids[index] = ids
        return built

    # Back to text and codes.

    def text_ids(self, canvas: Canvas, window: str = "answer") -> list[list[int]]:
        """Text codes of a window, cut at the first `<eos>`, `<fill>` and masks left out."""
        window_id = {"answer": self.answer_window, "instruction": self.instruction_window}[window]
        if window_id not in canvas.windows():
            return [[] for _ in range(canvas.batch_size)]
        part = canvas.window_slice(window_id)
        columns = self.vocabulary.columns("text")
        texts = []
        for row in canvas.input_ids[:, part].tolist():
            content = row[: row.index(self._eos)] if self._eos in row else row
            texts.append([i - columns.start for i in content if i in columns and i != self._fill])
        return texts

    def decode_text(self, canvas: Canvas, window: str = "answer") -> list[str]:
        """Text of a window of every row."""
        return self._decode(self.text_ids(canvas, window))

    def decode_sequences(self, sequences: Tensor) -> list[str]:
        """Text of rows of text codes (batch, positions), cut as `text_ids` cuts them."""
        return self._decode([self.content(row) for row in sequences])

    def content(self, sequence: Tensor) -> list[int]:
        """The codes of one row (positions,) before its first `<eos>`, `<fill>` left out."""
        eos, fill = self._eos - self._text_start, self._fill - self._text_start
        codes = sequence.tolist()
        content = codes[: codes.index(eos)] if eos in codes else codes
        return [code for code in content if code != fill]

    def _decode(self, texts: Sequence[list[int]]) -> list[str]:
        return [str(self.tokenizer.decode(codes)).strip() for codes in texts]

    def image_codes(self, canvas: Canvas) -> Codes:
        """Image codes of every row, one (batch, h, w) tensor per level."""
        levels = []
        for level, window in enumerate(self.image_windows):
            ids = canvas.input_ids[:, canvas.window_slice(window)]
            codes = self.vocabulary.to_codes(ids, f"image.{level}")
            levels.append(codes.view(-1, *self.image_grids[level]))
        return tuple(levels)

    # Parts of rows.

    def encode_text(self, text: str) -> list[int]:
        """Text codes of a user's text; special tokens typed in it are plain characters."""
        return encode_text(self.tokenizer, text)

    def _encode(self, text: Text) -> np.ndarray:
        codes = self.encode_text(text) if isinstance(text, str) else text
        return np.asarray(codes, dtype=np.int64) + self._text_start

    def _checked(self, ids: np.ndarray, text: Text) -> np.ndarray:
        limit = self.layout["max_window"]["text"]
        if len(ids) > limit:
            text = text if isinstance(text, str) else str(self.tokenizer.decode(text)).strip()
            raise ConfigError(
                f"A text window holds at most {limit} tokens (`<eos>` included); got {len(ids)} for"
                f" `{text[:40]}`. Shorten it."
            )
        return ids

    def _condition(self, text: Text) -> np.ndarray:
        """Content and `<eos>`, without fill."""
        return self._checked(np.append(self._encode(text), self._eos), text)

    def _window(self, text: Text, draw: float, block: int | None = None) -> np.ndarray:
        """Content, `<eos>` and a random run of `<fill>`, or what fills the last block.

        Its length is log-uniform on those that hold the text: nothing of the text but that it must
        fit sets the prior, so that a longer window does not ask for a longer text. A block does not
        see those behind it: the text ends with the block that has its `<eos>`.
        """
        ids = self._condition(text)
        shortest, longest = len(ids), self.layout["max_window"]["text"]
        if block is None:
            length = math.floor(shortest * ((longest + 1) / shortest) ** draw)
        else:
            length = math.ceil(shortest / block) * block
        extra = min(length, longest) - shortest
        return np.append(ids, np.full(extra, self._fill, dtype=np.int64))

    def _masked_text(self, gen_length: int) -> np.ndarray:
        limit = self.layout["max_window"]["text"]
        if not 1 <= gen_length <= limit:
            raise ConfigError(
                f"`gen_length` must lie in 1..{limit} (the model's text window); got {gen_length}."
            )
        return np.full(gen_length, self.vocabulary.mask_token_id("text"), dtype=np.int64)

    def _image_row(self, text: Text | np.ndarray, order: tuple[int, int] = (0, 1)) -> LayoutRow:
        """A row whose image is masked and free; `order` is (caption, image)."""
        ids = text if isinstance(text, np.ndarray) else self._condition(text)
        order = order if self.layout["condition_attention"] != "full" else (0, 0)
        mask = self.vocabulary.mask_token_id("image")
        row = LayoutRow(True)
        for window, (height, width) in zip(self.image_windows, self.image_grids, strict=True):
            masks = np.full(height * width, mask, dtype=np.int64)
            row.put(window, masks, is_free=True, order=order[1])
        row.put(self.answer_window, ids, is_free=False, order=order[0])
        return row

    def _text_row(
        self,
        picture: Sequence[np.ndarray] | None,
        instruction: Text | None,
        answer: np.ndarray,
        block: int | None = None,
    ) -> LayoutRow:
        """A row whose answer is free, given a picture, an instruction, both or neither."""
        is_prefix = self.layout["condition_attention"] != "full"
        row = LayoutRow(picture is not None)
        if picture is not None:
            for window, ids in zip(self.image_windows, picture, strict=True):
                row.put(window, ids, is_free=False, order=0)
        if instruction:
            ids = self._condition(instruction)
            row.put(self.instruction_window, ids, is_free=False, order=1 if is_prefix else 0)
        order = np.full(len(answer), 2 if is_prefix else 0)
        if block is not None:
            order += np.arange(len(answer)) // block
        row.put(self.answer_window, answer, is_free=True, order=order)
        return row

    def _block(self, length: int | None = None) -> int | None:
        """A block length of the layout, by default the first; None where it has none."""
        if length is None:
            return self.blocks[0] if self.blocks else None
        if length not in self.blocks:
            have = ", ".join(str(block) for block in self.blocks) or "none"
            raise ConfigError(
                f"`block_length` must be one the model was trained with ({have}); got {length}."
                " Leave it out for the default."
            )
        return length

    def _codes_to_ids(self, codes: np.ndarray, level: int) -> np.ndarray:
        if level >= len(self.image_grids) or codes.shape != self.image_grids[level]:
            raise ConfigError(
                f"`codes` of level {level} must have the grids {self.image_grids}; got shape"
                f" {codes.shape}."
            )
        flat = torch.from_numpy(codes.astype(np.int64).reshape(-1))
        return self.vocabulary.to_input_ids(flat, f"image.{level}").numpy()

    def _split_codes(self, codes: Codes) -> list[list[np.ndarray]]:
        """(batch, h, w) tensors per level -> flat unified ids per row and level."""
        if len(codes) != len(self.image_grids):
            raise ConfigError(
                f"`codes` must be a tuple of {len(self.image_grids)} levels; got {len(codes)}."
            )
        levels = [level.detach().cpu().numpy() for level in codes]
        return [
            [self._codes_to_ids(level[row], index) for index, level in enumerate(levels)]
            for row in range(len(levels[0]))
        ]

    def _matching(
        self, values: Sequence[str | None] | None, count: int, name: str
    ) -> Sequence[str | None]:
        if values is None:
            return [None] * count
        if len(values) != count:
            raise ConfigError(f"`{name}` must have one entry per row; got {len(values)}, {count}.")
        return values

    def _replace_text(self, canvas: Canvas, window: int, texts: Sequence[str] | None) -> Canvas:
        """Exchange a text window of every row, for masks or for other texts."""
        rows, masks = [], self._masked_text(self.layout["unconditional_window"]["text"])
        if texts is not None:
            self._matching(texts, canvas.batch_size, "negative_prompt")
        for index in range(canvas.batch_size):
            row = self._read_row(canvas, index)
            ids = masks if texts is None else self._condition(texts[index])
            row.ids[window], row.is_free[window] = ids, np.zeros(len(ids), bool)
            row.order[window] = int(np.min(row.order.get(window, 0)))
            rows.append(row)
        return self._assemble(rows).to(canvas.device)

    def _read_row(self, canvas: Canvas, index: int) -> LayoutRow:
        """The inverse of `_assemble` for one row."""
        has_image = int(canvas.input_ids[index, 0]) == self.vocabulary.special_id("boi")
        row = LayoutRow(has_image)
        for window in canvas.windows():
            part = canvas.window_slice(window)
            kept = ~canvas.is_padding[index, part]
            if bool(kept.any()):
                row.ids[window] = canvas.input_ids[index, part][kept].cpu().numpy()
                row.is_free[window] = canvas.is_free[index, part][kept].cpu().numpy()
                order = canvas.order[index, part][kept].cpu().numpy()
                row.order[window] = int(order.min()) if self._is_causal else order
        levels = [window for window in self.image_windows if window in row.order]
        if self._is_causal and levels:  # Of one picture, which is closed after the last.
            row.order.update(dict.fromkeys(levels, row.order[levels[0]]))
        return row

    def _assemble(self, rows: Sequence[LayoutRow]) -> Canvas:
        canvas = assemble(rows, self._windows, self.vocabulary)
        return canvas.replace(order=causal_order(canvas)) if self._is_causal else canvas
