"""A limit on a text's length leaves a text within it unchanged, and holds for the others."""

import pytest
import torch

from multimodal_dlm.errors import ConfigError
from multimodal_dlm.pipelines import (
    UnifiedImageToTextPipeline,
    UnifiedTextGenerationPipeline,
)
from multimodal_dlm.pipelines.text_length import TextLength, write_within
from multimodal_dlm.schedulers import ConfidenceScheduler
from tests.pipelines.registry import picture
from tests.pipelines.tiny import MAX_TEXT, seeded

EOS, FILL = 0, 1
BONUS = 2.0
ROWS = 24
LIMITS = (1, 3, 6, 10, MAX_TEXT)


def scheduler(temperature: float) -> ConfidenceScheduler:
    text = {"eos_column": EOS, "fill_column": FILL, "temperature": temperature}
    return ConfidenceScheduler(modalities={"text": text, "image": {}})


@pytest.fixture
def prefer_ends(monkeypatch):
    """Raise the odds of `<eos>`, so that random weights write texts of all lengths."""

    def lean(pipe, bonus: float):
        head = pipe.transformer.compute_logits

        def leaning(states, modality):
            logits = head(states, modality).clone()
            if modality == "text":
                logits[..., EOS] += bonus
            return logits

        # The model is that of other tests: it must forget this at the end of this one.
        monkeypatch.setitem(vars(pipe.transformer), "compute_logits", leaning)
        return pipe

    return lean


@pytest.fixture
def captions(make, prefer_ends):
    images = [picture(seed) for seed in range(ROWS)]
    prefer_ends(make(UnifiedImageToTextPipeline), BONUS)

    def write(temperature: float, **options):
        pipe = make(UnifiedImageToTextPipeline, scheduler=scheduler(temperature))
        return pipe(images, generator=seeded(*range(ROWS)), output_type="seq", **options).sequences

    return write


def lengths(sequences: torch.Tensor) -> list[int]:
    return [row.index(EOS) + 1 for row in sequences.tolist()]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("limit", LIMITS)
def test_texts_that_fit_do_not_depend_on_the_limit(captions, temperature, limit):
    usual = captions(temperature)
    limited = captions(temperature, gen_length=limit)
    assert limited.shape == (ROWS, limit)
    fits = [length <= limit for length in lengths(usual)]
    assert torch.equal(limited[fits], usual[fits][:, :limit])


def test_only_the_rows_beyond_the_limit_are_written_again(make):
    pipe = make(UnifiedImageToTextPipeline)
    codes = pipe.image_tokenizer.encode(torch.stack([picture(seed) for seed in range(4)]))
    sizes, asked = [3, 7, 8, 2], []

    def write(window, rows, streamer):
        asked.append((window, list(rows), streamer))
        chosen = tuple(level[list(rows)] for level in codes)
        canvas = pipe.processor.image_to_text(chosen, gen_length=window)
        text = torch.full((len(rows), window), 5)
        for index, row in enumerate(rows):
            size = min(sizes[row], window)
            text[index, size - 1 :] = FILL
            text[index, size - 1] = EOS
        ids = canvas.input_ids.clone()
        ids[:, canvas.window_slice(pipe.processor.answer_window)] = (
            pipe.processor.vocabulary.to_input_ids(text, "text")
        )
        return canvas.replace(input_ids=ids)

    sequences = write_within(pipe, TextLength(4, 10), 4, write)
    assert asked == [(10, [0, 1, 2, 3], None), (4, [1, 2], None)]
    assert lengths(sequences) == [3, 4, 4, 2]
    assert sequences.shape == (4, 4)


@pytest.mark.parametrize("steps", [1, 5, 40])
@pytest.mark.parametrize("limit", LIMITS)
def test_every_text_keeps_the_limit(captions, limit, steps):
    for row in captions(1.0, gen_length=limit, num_inference_steps=steps).tolist():
        end = row.index(EOS)
        assert FILL not in row[:end]
        assert set(row[end + 1 :]) <= {FILL}


def test_texts_from_prompts_keep_the_same_rule(make, prefer_ends):
    write = make(UnifiedTextGenerationPipeline, scheduler=scheduler(0.0))
    prompts = ["what?", "a red apple", "is there a square?", "a blue circle", "yes", "no"]
    pipe = prefer_ends(write, 6.0)
    usual = pipe(prompts, output_type="seq").sequences
    limited = pipe(prompts, output_type="seq", gen_length=8).sequences
    fits = [length <= 8 for length in lengths(usual)]
    assert any(fits)
    assert torch.equal(limited[fits], usual[fits][:, :8])
    assert max(lengths(limited)) <= 8


def test_a_longer_limit_makes_a_longer_window(make):
    processor = make(UnifiedImageToTextPipeline).processor
    assert TextLength.resolve(None, 8, processor) == TextLength(8, 8)
    assert TextLength.resolve(3, 8, processor) == TextLength(3, 8)
    assert TextLength.resolve(12, 8, processor) == TextLength(12, 12)
    assert TextLength.resolve(None, 99, processor) == TextLength(MAX_TEXT, MAX_TEXT)
    with pytest.raises(ConfigError, match=f"`gen_length` must be .* at most {MAX_TEXT}; got 21"):
        TextLength.resolve(21, 8, processor)


def test_a_run_that_is_stopped_keeps_the_limit_too(make):
    read = make(UnifiedImageToTextPipeline, scheduler=scheduler(0.0))

    def stop(pipe, step, timestep, tensors):
        pipe._interrupt = True
        return {}

    row = read(picture(0), gen_length=3, callback_on_step_end=stop, output_type="seq").sequences
    assert row.shape == (1, 3)
