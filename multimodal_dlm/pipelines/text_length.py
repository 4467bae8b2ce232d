"""A limit on a text's length that leaves a text within it unchanged.

A backbone reads how many positions are masked, so a window as long as the limit would make the
limit part of the question. Texts are therefore written in a window of the task's usual length; only
those beyond the limit are written again, in a window that tells the backbone how short to be. A
text that fits is the same under every limit.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from multimodal_dlm.canvas import Canvas
from multimodal_dlm.pipelines.inputs import check_count
from multimodal_dlm.pipelines.pipeline_base import UnifiedPipeline
from multimodal_dlm.pipelines.streaming import Streamer, check_streamer, stream_whole
from multimodal_dlm.processing import UnifiedProcessor

# Window, rows of the call and a streamer -> their finished canvas.
WriteTexts = Callable[[int, Sequence[int], Streamer | None], Canvas]


@dataclass(frozen=True)
class TextLength:
    """How long a text may be, and the window it is written in first.

    Args:
        limit: Longest text in tokens, `<eos>` included.
        window: Positions of the first window, at least `limit`.
    """

    limit: int
    window: int

    @classmethod
    def resolve(
        cls, gen_length: int | None, usual: int, processor: UnifiedProcessor
    ) -> "TextLength":
        """The limit an argument asks for, in a window of the task's usual length or longer.

        Args:
            gen_length: The user's limit; None for the usual length.
            usual: Window of the task, cut to the model's longest text.
            processor: Knows the model's longest text.

        Raises:
            ConfigError: When the limit is no integer from 1 to the model's longest text.
        """
        longest = processor.layout["max_window"]["text"]
        usual = min(usual, longest)
        limit = usual if gen_length is None else gen_length
        check_count("gen_length", limit, maximum=longest)
        return cls(limit, max(limit, usual))


def write_within(
    pipe: UnifiedPipeline,
    length: TextLength,
    num_texts: int,
    write: WriteTexts,
    streamer: Streamer | None = None,
) -> Tensor:
    """Text codes (num_texts, limit): rows beyond the limit are written a second time.

    A streamer sees the run that its text comes from; a text that fitted at once arrives whole. A
    run that a callback stops is only cut. `pipe.num_forwards` counts both runs.

    Args:
        pipe: Its loop writes.
        length: Limit and first window.
        num_texts: Rows of the call.
        write: Writes some of the rows in a window of a given length.
        streamer: Follows a single text.
    """
    if length.window == length.limit:
        return pipe.sequences(write(length.window, range(num_texts), streamer))
    if streamer is not None:
        check_streamer(streamer, num_texts)
    try:
        canvas = write(length.window, range(num_texts), None)
    except BaseException:
        if streamer is not None:  # A reader in another thread waits for the end, come what may.
            streamer.end()
        raise
    sequences = pipe.sequences(canvas)
    fill = pipe.processor.vocabulary.to_codes(
        canvas.input_ids.new_tensor([pipe.processor.vocabulary.special_id("fill")]), "text"
    )
    is_long = (sequences[:, length.limit :] != fill.cpu()).any(dim=1)
    rows = [] if pipe.interrupt else is_long.nonzero().flatten().tolist()
    sequences = sequences[:, : length.limit].clone()
    if rows:
        num_forwards = pipe.num_forwards
        sequences[rows] = pipe.sequences(write(length.limit, rows, streamer))
        pipe.num_forwards += num_forwards
    elif streamer is not None:
        stream_whole(pipe.processor, streamer, sequences[0])
    return sequences
