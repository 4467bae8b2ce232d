"""Text while it is being written: drafts of the whole window, then the confirmed part of it.

A streamer is any object with the `put(ids)` and `end()` of transformers' streamers, so
`TextStreamer` and `TextIteratorStreamer` work as they are; one with `put_draft(text)` also sees the
whole window after every step, tokens that are still masked shown as `[MASK]`.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import Any, Protocol

import torch
from jaxtyping import Int
from torch import Tensor

from multimodal_dlm.canvas import Canvas
from multimodal_dlm.errors import ConfigError
from multimodal_dlm.processing import MASK_MARKER, UnifiedProcessor


class Streamer(Protocol):
    """What a streamer must have; `put_draft(text: str)` is optional."""

    def put(self, value: Tensor) -> Any:
        """Codes of the text tokenizer that will not change any more, in reading order, (n,)."""
        ...

    def end(self) -> Any:
        """Nothing follows."""
        ...


def check_streamer(streamer: Streamer, num_texts: int) -> None:
    """Refuse a streamer for several texts, or one without its methods.

    Raises:
        ConfigError: In both cases.
    """
    if num_texts != 1:
        raise ConfigError(
            f"`streamer` follows one text; got {num_texts} rows. Call the pipeline once per text,"
            " or leave the streamer out."
        )
    for name in ("put", "end"):
        if not callable(getattr(streamer, name, None)):
            raise ConfigError(
                f"`streamer` must have `put` and `end`; {type(streamer).__name__} has no"
                f" `{name}`. Use `transformers.TextStreamer(pipe.tokenizer)`."
            )


def stream_whole(processor: UnifiedProcessor, streamer: Streamer, sequence: Tensor) -> None:
    """Put a text that is finished at once, and end.

    Args:
        processor: Decodes the draft.
        streamer: Receives it.
        sequence: Text codes (positions,), `<eos>` and `<fill>` among them.
    """
    try:
        codes = processor.content(sequence)
        put_draft = getattr(streamer, "put_draft", None)
        if put_draft is not None:
            put_draft(str(processor.tokenizer.decode(codes)))
        if codes:
            streamer.put(torch.tensor(codes, dtype=torch.long))
    finally:
        streamer.end()


class TextStream:
    """Feeds a streamer from the canvases of one run.

    Tokens are confirmed from the left: a committed token is put once every token before it is
    committed too. `<eos>` and what follows it are not put.

    Args:
        processor: Knows the answer window.
        streamer: Receives drafts and tokens.
        canvas: The run's canvas, one row.

    Raises:
        ConfigError: When the canvas has several rows, or the streamer lacks `put` or `end`.
    """

    def __init__(self, processor: UnifiedProcessor, streamer: Streamer, canvas: Canvas) -> None:
        check_streamer(streamer, canvas.batch_size)
        self.processor = processor
        self.streamer = streamer
        self._num_put = 0

    def update(self, canvas: Canvas) -> None:
        """Show the draft and put the tokens that have been confirmed since the last call."""
        codes = self._codes(canvas)
        put_draft = getattr(self.streamer, "put_draft", None)
        if put_draft is not None:
            put_draft(self._draft(codes))
        confirmed = codes.index(None) if None in codes else len(codes)
        if confirmed > self._num_put:
            new = [code for code in codes[self._num_put : confirmed] if code is not None]
            self.streamer.put(torch.tensor(new, dtype=torch.long))
            self._num_put = confirmed

    def end(self, canvas: Canvas | None) -> None:
        """Put what is left and close the streamer; None closes it after a failure."""
        try:
            if canvas is not None:
                self.update(canvas)
        finally:
            self.streamer.end()

    def _codes(self, canvas: Canvas) -> list[int | None]:
        window = canvas.window_slice(self.processor.answer_window)
        return content_codes(self.processor, canvas.input_ids[0, window])

    def _draft(self, codes: list[int | None]) -> str:
        return draft_text(self.processor, codes)


def content_codes(processor: UnifiedProcessor, ids: Int[Tensor, " positions"]) -> list[int | None]:
    """Codes of a window of text up to the first `<eos>`, None where masked, `<fill>` left out."""
    vocabulary = processor.vocabulary
    columns = vocabulary.columns("text")
    eos, fill = vocabulary.special_id("eos"), vocabulary.special_id("fill")
    codes: list[int | None] = []
    for token in ids.tolist():
        if token == eos:
            break
        if token != fill:
            codes.append(token - columns.start if token in columns else None)
    return codes


def draft_text(processor: UnifiedProcessor, codes: Sequence[int | None]) -> str:
    """A text of which some tokens may still be masked, those as `[MASK]`."""
    parts = []
    for is_masked, run in groupby(codes, key=lambda code: code is None):
        known = list(run)
        parts.append(
            MASK_MARKER * len(known)
            if is_masked
            else str(processor.tokenizer.decode([c for c in known if c is not None]))
        )
    return "".join(parts)
