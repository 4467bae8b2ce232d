"""Streamers: tokens arrive once, in order, and add up to the text."""

import threading

import pytest
import torch
from transformers import TextIteratorStreamer, TextStreamer

from multimodal_dlm.errors import ConfigError
from multimodal_dlm.pipelines import UnifiedImageToTextPipeline, UnifiedTextGenerationPipeline
from multimodal_dlm.processing import MASK_MARKER
from multimodal_dlm.schedulers import ConfidenceScheduler
from tests.pipelines.registry import picture
from tests.pipelines.tiny import MAX_TEXT, seeded

NOISY = {"text": {"temperature": 1.0, "choice_temperature": 2.0, "eos_column": 0, "fill_column": 1}}


class Recorder:
    """Keeps everything it is given."""

    def __init__(self):
        self.drafts, self.codes, self.num_puts, self.num_ends = [], [], 0, 0

    def put_draft(self, text):
        assert self.num_ends == 0
        self.drafts.append(text)

    def put(self, value):
        assert self.num_ends == 0
        assert value.dim() == 1
        assert value.numel() > 0
        self.codes += value.tolist()
        self.num_puts += 1

    def end(self):
        self.num_ends += 1


@pytest.fixture
def pipe(make):
    return make(UnifiedTextGenerationPipeline, scheduler=ConfidenceScheduler(modalities=NOISY))


@pytest.mark.parametrize("seed", range(6))
def test_tokens_add_up_to_the_text(pipe, seed):
    streamer = Recorder()
    output = pipe("what?", gen_length=MAX_TEXT, generator=seeded(seed), streamer=streamer)
    row = output.sequences[0].tolist()
    content = row[: row.index(0)] if 0 in row else row
    assert streamer.codes == content
    assert streamer.num_ends == 1
    assert streamer.drafts[-1].strip() == output.texts[0]
    assert len(streamer.drafts) == pipe.num_forwards + 1
    masked = [draft.count(MASK_MARKER) for draft in streamer.drafts]
    assert masked == sorted(masked, reverse=True)
    assert masked[-1] == 0


def test_streaming_changes_nothing(pipe):
    plain = pipe("what?", gen_length=MAX_TEXT, generator=seeded(0))
    streamed = pipe("what?", gen_length=MAX_TEXT, generator=seeded(0), streamer=Recorder())
    assert torch.equal(plain.sequences, streamed.sequences)


def test_some_tokens_arrive_before_the_end(pipe):
    recorders = [Recorder() for _ in range(6)]
    for seed, streamer in enumerate(recorders):
        pipe("what?", gen_length=MAX_TEXT, generator=seeded(seed), streamer=streamer)
    assert max(streamer.num_puts for streamer in recorders) > 1


def test_streamers_of_transformers_work(make, capsys):
    pipe = make(UnifiedImageToTextPipeline, scheduler=ConfidenceScheduler(modalities=NOISY))
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(picture(0), generator=seeded(1)).texts[0]
    capsys.readouterr()
    pipe(picture(0), generator=seeded(1), streamer=TextStreamer(pipe.tokenizer))
    assert capsys.readouterr().out == expected + "\n"
    streamer = TextIteratorStreamer(pipe.tokenizer, timeout=20)
    options = {"generator": seeded(1), "streamer": streamer}
    thread = threading.Thread(target=pipe, args=(picture(0),), kwargs=options)
    thread.start()
    assert "".join(streamer) == expected
    thread.join()


@pytest.mark.parametrize("gen_length", [1, 2, 5, 12])
def test_a_short_limit_streams_what_it_returns(pipe, gen_length):
    streamer = Recorder()
    output = pipe("what?", gen_length=gen_length, generator=seeded(0), streamer=streamer)
    row = output.sequences[0].tolist()
    assert streamer.codes == row[: row.index(0)]
    assert streamer.num_ends == 1
    assert streamer.drafts[-1].strip() == output.texts[0]


@pytest.mark.parametrize("gen_length", [3, MAX_TEXT])
def test_a_failure_ends_the_stream(pipe, gen_length):
    def fail(*_):
        raise ValueError("stop")

    streamer = Recorder()
    with pytest.raises(ValueError, match="stop"):
        pipe(
            "what?",
            gen_length=gen_length,
            generator=seeded(0),
            streamer=streamer,
            callback_on_step_end=fail,
        )
    assert streamer.num_ends == 1


@pytest.mark.parametrize("gen_length", [8, MAX_TEXT])
def test_an_interrupted_run_streams_what_it_returns(pipe, gen_length):
    def stop(pipe, step, timestep, tensors):
        pipe._interrupt = step == 1
        return {}

    streamer = Recorder()
    output = pipe(
        "what?",
        gen_length=gen_length,
        generator=seeded(0),
        streamer=streamer,
        callback_on_step_end=stop,
    )
    row = output.sequences[0].tolist()
    assert streamer.codes == [c for c in (row[: row.index(0)] if 0 in row else row) if c != 1]
    assert streamer.num_ends == 1


def test_refusals(pipe):
    with pytest.raises(ConfigError, match="`streamer` follows one text; got 2 rows"):
        pipe(["a", "b"], streamer=Recorder(), generator=seeded(0, 1))
    with pytest.raises(ConfigError, match="`streamer` must have `put` and `end`; object has no"):
        pipe("a", streamer=object(), generator=seeded(0))
