"""Divergence is that of the caches the denoising loop has: its lanes, groups, rows and weights."""

import pytest
import torch

from multimodal_dlm.canvas import noise_levels
from multimodal_dlm.errors import ConfigError
from multimodal_dlm.evaluation.cache_divergence import cache_divergence
from multimodal_dlm.models.approximate_cache import (
    DelayedCacheConfig,
    DualCacheConfig,
    FeatureCacheConfig,
    PrefixCacheConfig,
)
from multimodal_dlm.models.attention_plan import AttentionPlan
from multimodal_dlm.models.kv_cache import ExactCacheConfig
from multimodal_dlm.pipelines import (
    UnifiedImageToTextPipeline,
    UnifiedJointPipeline,
    UnifiedTextToImagePipeline,
    denoising,
    lanes,
)
from multimodal_dlm.pipelines.guidance import classifier_free
from multimodal_dlm.pipelines.lanes import Forwards
from tests.models.tiny import tiny_model
from tests.pipelines.registry import picture
from tests.pipelines.test_blocks import PROMPTS, RULE, pipeline
from tests.pipelines.test_cached_runs import (
    ANSWER,
    CONDITION,
    NOISY,
    PLANS,
    make_canvas,
    run,
    without_condition,
)
from tests.pipelines.tiny import MAX_TEXT, tiny_components

ROUGH = {"refresh_share": 1.0, "refresh_interval": None}  # Nothing becomes old.
EXACT = ExactCacheConfig(num_prefixes=0)


class Counted:
    """Rows and columns of every call of the first block, one list for each pass over the run."""

    def __init__(self, model):
        self.calls = []
        model.blocks[0].register_forward_pre_hook(
            lambda _, inputs: self.calls.append(tuple(inputs[0].shape[:2]))
        )

    def of(self, function):
        """What a function returns, and the calls it made."""
        self.calls.clear()
        found = function()
        return found, list(self.calls)


def halves(values):
    """The two halves of a list."""
    middle, odd = divmod(len(values), 2)
    assert not odd
    return values[:middle], values[middle:]


def through(pipe, canvas, *given, seed=0, **arguments):
    """A run of a whole pipeline, for `cache_divergence`."""

    def start(callback):
        def step_end(pipe, step, timestep, tensors):
            callback(step, timestep, canvas.replace(**tensors))
            return {}

        generator = torch.Generator().manual_seed(seed)
        return pipe(*given, **arguments, generator=generator, callback_on_step_end=step_end)

    return start


@pytest.mark.parametrize("stacked", [True, False])
def test_the_exact_cache_under_guidance_changes_nothing(stacked, monkeypatch):
    """Two branches as rows of one cache, or of a cache each; three rows of unequal conditions."""
    if not stacked:
        monkeypatch.setattr(lanes, "STACKED_TOKENS", 0)
    model = tiny_model()
    canvas = make_canvas(model.vocabulary, PLANS["prefix"])
    counted = Counted(model)
    model.enable_cache(EXACT)
    output, own = counted.of(lambda: run(model, canvas, guidance=2.5))
    model.disable_cache()
    assert len(own) < output.num_forwards + 2 if stacked else len(own) >= output.num_forwards
    found, calls = counted.of(
        lambda: cache_divergence(
            model,
            {"exact": EXACT},
            canvas,
            lambda callback: run(model, canvas, guidance=2.5, callback=callback),
        )
    )
    assert found["exact"].kl.max() < 1e-8
    assert found["exact"].argmax_agreement == 1.0
    assert found["exact"].first_divergences == (None,)
    assert calls[-2 * len(own) :] == own + own  # A run of the loop, and the run that is measured.
    exact = calls[: -2 * len(own)]
    assert halves(exact)[0] == halves(exact)[1]
    waiting = sum(range(1, ANSWER + 1)) * len(canvas.input_ids)
    assert found["exact"].num_positions == waiting  # A token a step.


def test_the_exact_cache_of_a_text_in_blocks_changes_nothing():
    """Through the pipeline; a forward computes the open block, and the one before it at first."""
    pipe = pipeline(blocks=(8, 4), **RULE)
    options = {"gen_length": 24, "block_length": 4, "output_type": "seq"}
    canvas = pipe.processor.text(PROMPTS, gen_length=24, block_length=4)
    start = through(pipe, canvas, PROMPTS, **options)
    counted = Counted(pipe.transformer)
    pipe.transformer.enable_cache(EXACT)
    _, own = counted.of(lambda: start(lambda step, timestep, now: now))
    pipe.transformer.disable_cache()
    found, calls = counted.of(
        lambda: cache_divergence(pipe.transformer, {"exact": EXACT}, canvas, start)
    )
    assert found["exact"].kl.max() < 1e-8
    assert found["exact"].argmax_agreement == 1.0
    assert found["exact"].first_divergences == (None,)
    assert calls[-2 * len(own) :] == own + own
    assert {columns for _, columns in own[2:]} == {4, 8}
    assert {columns for _, columns in calls[: -2 * len(own)]} == {canvas.length}


def test_rows_that_end_in_an_early_block_are_compared_where_they_were_written():
    """What the loop fills for free in later blocks is no mask that a forward is asked about."""
    model = tiny_model()
    start = model.vocabulary.columns("text").start
    settings = {**NOISY, "eos_column": 0, "fill_column": 1}
    canvas = make_canvas(model.vocabulary, PLANS["blocks"], lengths=(5, 4, 3) * 5)
    counted, states = Counted(model), [canvas]

    def write(callback):
        return run(model, canvas, settings=settings, callback=callback)

    model.enable_cache(EXACT)
    output, own = counted.of(lambda: write(lambda step, timestep, now: states.append(now) or now))
    model.disable_cache()
    texts = (output.canvas.input_ids[:, CONDITION:] - start).tolist()
    has_ended = [0 in text[:3] for text in texts]
    assert len(set(has_ended)) == 2
    found, calls = counted.of(lambda: cache_divergence(model, {"exact": EXACT}, canvas, write))
    assert found["exact"].kl.max() < 1e-8
    assert calls[-2 * len(own) :] == own + own
    expected = 0
    for state in states[:-1]:
        is_waiting = model.vocabulary.is_masked(state.input_ids) & state.is_free
        is_first = is_waiting & (state.order == 1)
        is_second = is_waiting & ~torch.tensor(has_ended)[:, None]
        expected += int((is_first if is_first.any() else is_second).sum())
    assert found["exact"].num_positions == expected


def staggered(canvas, vocabulary):
    """A text of three tokens and a picture of three, of one order, and the times of a run."""
    windows, modalities = canvas.window_ids.clone(), canvas.modality_ids.clone()
    ids, order = canvas.input_ids.clone(), torch.zeros_like(canvas.order)
    windows[:, CONDITION + 3 :] = 3
    modalities[:, CONDITION + 3 :] = vocabulary.modalities.index("image")
    ids[:, CONDITION + 3 :] = vocabulary.mask_token_id("image")
    made = canvas.replace(window_ids=windows, modality_ids=modalities, input_ids=ids, order=order)
    return made, {"text": (1.0, 0.5), "image": (0.5, 0.0)}


@pytest.mark.parametrize(
    ("plan", "config"),
    [
        ("blocks", DelayedCacheConfig),
        ("uneven_blocks", FeatureCacheConfig),
        ("staggered", PrefixCacheConfig),
        ("staggered", DualCacheConfig),
    ],
)
def test_a_stale_cache_gives_what_a_hand_driven_one_gives(plan, config):
    """Forwards by hand: in each state the columns of the open block or window are read alone."""
    model, times = tiny_model(), None
    vocabulary = model.vocabulary
    canvas = make_canvas(vocabulary, PLANS.get(plan, [1] * ANSWER), lengths=(5,))
    if plan == "staggered":
        canvas, times = staggered(canvas, vocabulary)

    def write(callback):
        return run(model, canvas, callback=callback, time_windows=times)

    states = [canvas]
    write(lambda step, timestep, now: states.append(now) or now)
    model.enable_cache(config(**ROUGH))
    attention = AttentionPlan.from_canvas(canvas)
    cache = model.new_cache(attention, canvas.is_free)
    assert cache is not None
    model.disable_cache()
    counted = Counted(model)

    def logits(state, is_picked, modality, kv_cache):
        hidden = model(
            state.input_ids,
            noise_levels=noise_levels(state, vocabulary),
            modality_ids=state.modality_ids,
            position_ids=state.position_ids,
            attention_plan=attention,
            kv_cache=kv_cache,
        ).hidden_states
        return model.compute_logits(hidden[is_picked], modality).double().log_softmax(-1)

    parts, columns = [], []
    keys = canvas.order * 10 + canvas.window_ids  # Blocks and windows in the order they open.
    with torch.no_grad():
        for state in states[:-1]:
            is_waiting = vocabulary.is_masked(state.input_ids) & state.is_free
            is_read = keys == keys[is_waiting].min()
            modality = vocabulary.modalities[int(state.modality_ids[is_read][0])]
            cache.read(is_read[0].nonzero().flatten().tolist())
            exact = logits(state, is_waiting & is_read, modality, None)
            counted.calls.clear()
            found = logits(state, is_waiting & is_read, modality, cache)
            columns += counted.calls
            parts.append((exact.exp() * (exact - found)).sum(-1).clamp(min=0))
    expected = torch.cat(parts)
    assert expected.max() > 1e-4
    found, calls = counted.of(
        lambda: cache_divergence(model, {"rough": config(**ROUGH)}, canvas, write)
    )
    torch.testing.assert_close(found["rough"].kl, expected, atol=1e-7, rtol=1e-4)
    assert calls[-len(columns) :] == columns
    assert sum(count for _, count in columns) < len(columns) * (CONDITION + ANSWER)


def test_windows_of_a_joint_pipeline_are_read_one_after_the_other():
    """The columns computed are those of the pipeline's own run: those of the open window."""
    pipe = UnifiedJointPipeline(**tiny_components(condition_attention="full"))
    pipe.set_progress_bar_config(disable=True)
    canvas = pipe.processor.joint(1, gen_length=6)
    options = {"gen_length": 6, "num_inference_steps": 12, "output_type": "codes"}
    start = through(pipe, canvas, seed=3, **options)
    counted = Counted(pipe.transformer)
    found, calls = counted.of(
        lambda: cache_divergence(
            pipe.transformer, {"dual": DualCacheConfig(**ROUGH)}, canvas, start
        )
    )
    exact, cached = halves(calls)
    assert halves(exact)[0] == halves(exact)[1]
    assert halves(cached)[0] == halves(cached)[1]
    assert len({columns for _, columns in cached}) > 2  # Text, picture, and everything.
    assert found["dual"].kl_mean > 1e-6


def test_captions_and_the_weights_of_each_step():
    """Weights are those of the run, also where guidance does not act, or what is asked for."""
    pipe = UnifiedImageToTextPipeline(**tiny_components(condition_attention="full"))
    pipe.set_progress_bar_config(disable=True)
    codes = pipe._encode_pixels(picture(1)[None])
    canvas = pipe.processor.image_to_text(codes, questions=None, gen_length=MAX_TEXT)

    def measure(scale, branches=None, **options):
        arguments = {"codes": codes, "guidance_scale": scale, "output_type": "seq", **options}
        return cache_divergence(
            pipe.transformer,
            {"rough": DualCacheConfig(**ROUGH)},
            canvas,
            through(pipe, canvas, seed=2, **arguments),
            branches=branches,
        )["rough"]

    off = measure(1.0)
    assert off.kl_mean > 1e-6
    assert torch.equal(measure(6.0, guidance_start=1.0).kl, off.kl)
    other = measure(1.0, classifier_free(pipe.processor.unconditional, 6.0))
    assert other.num_positions == off.num_positions
    assert other.kl_mean > 1.5 * off.kl_mean
    with pytest.raises(ConfigError, match="`canvas` must be the one `run` begins with; got"):
        measure(1.0, gen_length=MAX_TEXT - 1, question="what?")


def test_a_run_that_is_stopped_and_one_without_masks():
    """The loop has its own forwards again afterwards, come what may."""
    pipe = UnifiedTextToImagePipeline(**tiny_components())
    model = pipe.transformer
    canvas = pipe.processor.text_to_image(["a red apple"])
    scheduler, seeds = pipe.scheduler, [4]

    def stopping(callback):
        def stop(step, timestep, now):
            callback(step, timestep, now)
            return None if step == 1 else now

        denoising.denoise(
            model, scheduler, canvas, num_inference_steps=4, row_seeds=seeds, callback=stop
        )

    found = cache_divergence(model, {"exact": EXACT}, canvas, stopping)
    assert found["exact"].kl.max() < 1e-8
    assert found["exact"].num_positions > canvas.is_free.sum()
    with pytest.raises(ConfigError, match="must have free masked positions; got none"):
        cache_divergence(model, {"exact": EXACT}, canvas, lambda callback: None)
    with pytest.raises(ZeroDivisionError):
        cache_divergence(model, {"exact": EXACT}, canvas, lambda callback: 1 / 0)
    assert denoising.Forwards is Forwards
    assert not model.is_cache_enabled


def test_branches_that_are_asked_for_are_compared_on_the_states_of_the_run():
    """As those of the run, where they are the same."""
    model = tiny_model()
    canvas = make_canvas(model.vocabulary, PLANS["blocks"])
    builder = classifier_free(without_condition(model.vocabulary), 2.5)
    mine, own = (
        cache_divergence(
            model,
            {"rough": DelayedCacheConfig(**ROUGH)},
            canvas,
            lambda callback: run(model, canvas, guidance=2.5, callback=callback),
            branches=branches,
        )["rough"]
        for branches in (builder, None)
    )
    assert torch.equal(mine.kl, own.kl)
    assert own.kl_mean > 1e-6
