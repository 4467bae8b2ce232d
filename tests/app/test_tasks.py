"""What the page runs, step by step, without the page."""

import numpy as np
import pytest
import torch
from PIL import Image

from multimodal_dlm.app.tasks import SCHEDULERS, Controls, Studio
from multimodal_dlm.errors import ConfigError
from multimodal_dlm.pipelines import (
    UnifiedImageToTextPipeline,
    UnifiedJointPipeline,
    UnifiedTextToImagePipeline,
)
from multimodal_dlm.pipelines.drafts import MASKED_SHADE, draft_captions, draft_pictures
from tests.pipelines.tiny import IMAGE_SIZE, seeded, tiny_components


@pytest.fixture(scope="module")
def studio():
    return Studio(UnifiedTextToImagePipeline(**tiny_components()))


def picture():
    pixels = np.random.default_rng(0).integers(0, 255, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def hidden(image):
    """Share of the pixels that have the gray of masks."""
    return float((np.asarray(image) == round(MASKED_SHADE * 255)).all(axis=-1).mean())


def test_a_drawing_is_seen_growing_and_ends_as_the_pipeline_draws_it(studio):
    frames = list(studio.draw("a red apple", Controls(steps=4, count=2, seed=7)))
    assert [frame.step for frame in frames] == [1, 2, 3, 4, 4]
    assert [frame.is_final for frame in frames] == [False] * 4 + [True]
    shares = [hidden(frame.pictures[0]) for frame in frames]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 0.2
    assert shares[-1] < 0.05
    assert frames[0].num_steps == 4
    last = frames[-1]
    assert last.num_forwards == 8  # Guided: two branches.
    assert [np.asarray(film).tobytes() for film in last.film] == [
        np.asarray(frame.pictures[0]).tobytes() for frame in frames[:-1]
    ]
    pipe = UnifiedTextToImagePipeline(**tiny_components())
    expected = pipe(
        "a red apple", num_images_per_prompt=2, num_inference_steps=4, generator=seeded(7, 8)
    ).images
    for found, wanted in zip(last.pictures, expected, strict=True):
        assert np.array_equal(np.asarray(found), np.asarray(wanted))


def test_captions_and_answers_are_seen_growing(studio):
    pipe = UnifiedImageToTextPipeline.from_pipe(studio.pipeline)
    for question, asked in (("", ()), ("what colour?", ("what colour?",))):
        frames = list(studio.read(picture(), question, Controls()))
        assert frames[-1].is_final
        assert frames[-1].texts == tuple(pipe(picture(), *asked, generator=seeded(0)).texts)
        assert "[MASK]" in frames[0].texts[0]
        assert "[MASK]" not in frames[-2].texts[0]
        assert frames[-1].step == frames[-1].num_forwards == len(frames) - 1


def test_pairs_and_holes_are_seen_growing(studio):
    pairs = list(studio.invent(Controls(steps=8, count=2)))
    assert len(pairs[-1].pictures) == len(pairs[-1].texts) == len(pairs[0].texts) == 2
    assert "[MASK]" in pairs[0].texts[0]
    mask = Image.new("L", (IMAGE_SIZE, IMAGE_SIZE))
    mask.paste(255, (0, 0, IMAGE_SIZE // 2, IMAGE_SIZE))
    frames = list(studio.inpaint(picture(), mask, "a red apple", Controls(steps=4)))
    kept = np.asarray(frames[-1].pictures[0])[:, IMAGE_SIZE // 2 :]
    assert np.array_equal(kept, np.asarray(picture())[:, IMAGE_SIZE // 2 :])
    assert 0 < hidden(frames[0].pictures[0]) < 0.6


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_scheduler_draws_and_reads(studio, scheduler):
    controls = Controls(steps=3, scheduler=scheduler)
    assert list(studio.draw("a red apple", controls))[-1].is_final
    assert list(studio.read(picture(), "", controls))[-1].is_final


def test_a_visitor_who_leaves_stops_the_run_and_frees_the_model(studio):
    frames = studio.draw("a red apple", Controls(steps=16))
    next(frames)
    frames.close()
    assert list(studio.draw("a", Controls(steps=1)))[-1].is_final


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 65}, "`steps` must lie between 0 and 64; got 65."),
        ({"guidance": None}, "`guidance` must lie between 0 and 20; got None."),
        ({"seed": -1}, "`seed` must lie"),
        ({"count": 5}, "`pictures` must lie between 1 and 4; got 5."),
        ({"scheduler": "ancestral"}, "Unknown scheduler `ancestral`"),
    ],
)
def test_controls_out_of_range_are_refused(changes, message):
    with pytest.raises(ConfigError) as caught:
        Controls(**changes)
    assert message in str(caught.value)


def test_mistakes_of_a_visitor_are_raised_before_or_while_it_runs(studio):
    with pytest.raises(ConfigError, match="The prompt must have 1 to 400 characters; got 0"):
        studio.draw("  ", Controls())
    with pytest.raises(ConfigError, match="got 401"):
        studio.read(picture(), "x" * 401, Controls())
    with pytest.raises(ConfigError, match="holds at most"):
        list(studio.draw("apple " * 60, Controls(steps=1)))


def test_drafts_of_a_finished_run_are_the_result(studio):
    seen = {}

    def look(pipe, step, timestep, tensors):
        seen["pictures"] = draft_pictures(pipe, tensors["input_ids"])
        seen["captions"] = draft_captions(pipe, tensors["input_ids"])
        return {}

    pipe = UnifiedJointPipeline.from_pipe(studio.pipeline)
    result = pipe(2, num_inference_steps=8, generator=seeded(1, 2), callback_on_step_end=look)
    assert [text.strip() for text in seen["captions"]] == result.texts
    for draft, image in zip(seen["pictures"], result.images, strict=True):
        assert np.array_equal(np.asarray(draft), np.asarray(image))
    assert torch.is_grad_enabled()
