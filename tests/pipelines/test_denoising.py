"""The one loop: groups, stages, branches, generators, callbacks, length rules."""

import contextlib

import pytest
import torch

from multimodal_dlm.errors import CanvasError, ConfigError
from multimodal_dlm.models.kv_cache import ExactCacheConfig
from multimodal_dlm.pipelines import UnifiedTextToImagePipeline, denoise
from multimodal_dlm.pipelines.guidance import (
    Branch,
    classifier_free,
    combine,
    conditional_only,
)
from multimodal_dlm.pipelines.noise_groups import noise_groups, stage_steps
from multimodal_dlm.schedulers import ConfidenceScheduler


@pytest.fixture
def pipe(make):
    return make(UnifiedTextToImagePipeline)


@contextlib.contextmanager
def exact_cache(pipe):
    """The exact cache enabled, and off again: the components are shared by the tests."""
    pipe.transformer.enable_cache(ExactCacheConfig())
    try:
        yield
    finally:
        pipe.transformer.disable_cache()


def run(pipe, canvas, steps=6, seeds=None, **options):
    seeds = list(range(canvas.batch_size)) if seeds is None else seeds
    options.setdefault("scheduler", pipe.scheduler)
    scheduler = options.pop("scheduler")
    return denoise(
        pipe.transformer, scheduler, canvas, num_inference_steps=steps, row_seeds=seeds, **options
    )


def recorded(pipe, canvas, **options):
    """The canvas after every step."""
    seen = []

    def callback(step, timestep, now):
        seen.append(now)
        return now

    output = run(pipe, canvas, callback=callback, **options)
    return output, seen


def masks(pipe, canvas, part):
    return int(pipe.transformer.vocabulary.is_masked(canvas.input_ids[:, part]).sum())


def test_known_tokens_never_change_and_free_ones_are_written(pipe):
    canvas = pipe.processor.text_to_image(["a red apple", "a"])
    output = run(pipe, canvas)
    known = ~canvas.is_free
    assert torch.equal(output.canvas.input_ids[known], canvas.input_ids[known])
    assert not pipe.transformer.vocabulary.is_masked(output.canvas.input_ids[~known]).any()
    output.canvas.validate(pipe.transformer.vocabulary)
    assert output.is_complete
    assert output.num_forwards == output.num_steps == 6


def test_more_steps_than_tokens_take_one_forward_per_token(pipe):
    canvas = pipe.processor.text(["what?"], gen_length=4)
    assert run(pipe, canvas, steps=50).num_forwards <= 4


def test_nothing_masked_costs_nothing(pipe):
    codes = pipe.processor.image_codes(run(pipe, pipe.processor.text_to_image(["a"])).canvas)
    canvas = pipe.processor.inpaint(codes, torch.zeros(1, 4, 4, dtype=torch.bool), ["a"])
    output = run(pipe, canvas)
    assert output.num_forwards == 0
    assert torch.equal(output.canvas.input_ids, canvas.input_ids)


def test_frozen_masks_stay_masked(pipe):
    canvas = pipe.processor.unconditional(pipe.processor.text_to_image(["a red apple"]))
    frozen = pipe.transformer.vocabulary.is_masked(canvas.input_ids) & ~canvas.is_free
    assert frozen.any()
    written = run(pipe, canvas).canvas
    after = pipe.transformer.vocabulary.is_masked(written.input_ids)
    assert torch.equal(after, frozen)


def test_blocks_open_when_lower_orders_are_closed(pipe):
    canvas = pipe.processor.text(["what?", "a"], gen_length=8)
    window = pipe.processor.answer_window
    part = canvas.window_slice(window)
    order = canvas.order.clone()
    order[:, part] = torch.tensor([2, 2, 2, 2, 3, 3, 4, 4])
    canvas = canvas.replace(order=order)
    stages = noise_groups(canvas, pipe.transformer.vocabulary.modalities)
    assert [[(g.order, g.start, g.stop) for g in stage] for stage in stages] == [
        [(2, 0, 4)],
        [(3, 4, 6)],
        [(4, 6, 8)],
    ]
    assert stage_steps(stages, 9) == [3, 3, 3]
    assert stage_steps(stages, 2) == [1, 1, 1]
    plain = ConfidenceScheduler(modalities={"text": {}})
    output, seen = recorded(pipe, canvas, steps=6, scheduler=plain)
    first = part.start
    for now in seen:
        if masks(pipe, now, slice(first, first + 4)):
            assert masks(pipe, now, slice(first + 4, first + 8)) == 2 * 4
        if masks(pipe, now, slice(first + 4, first + 6)):
            assert masks(pipe, now, slice(first + 6, first + 8)) == 2 * 2
    assert output.num_forwards == 6
    assert masks(pipe, output.canvas, part) == 0


def blocks_of_pictures(pipe, size=4):
    """Prompts of different lengths; the picture in blocks of `size` tokens."""
    canvas = pipe.processor.text_to_image(["a red apple", "a"])
    part = canvas.window_slice(pipe.processor.image_windows[0])
    order = canvas.order.clone()
    order[:, part] += torch.arange(part.stop - part.start) // size
    return canvas.replace(order=order)


@pytest.mark.parametrize("rule", [None, "threshold"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_blocks_are_written_the_same_with_and_without_the_cache(pipe, guidance, rule):
    """The same ids, guided or not; each block is computed while it is open, and once more."""
    canvas = blocks_of_pictures(pipe)
    # The tiny model is so sure that float32 ties: noise orders the positions.
    image = {"temperature": 1.0, "choice_temperature": 4.0, "commit_rule": rule}
    scheduler = ConfidenceScheduler(modalities={"image": image})

    def unconditional(canvas):
        # The processor sets its own orders; the branch keeps the blocks of the picture.
        other = pipe.processor.unconditional(canvas)
        part = canvas.window_slice(pipe.processor.image_windows[0])
        there = other.window_slice(pipe.processor.image_windows[0])
        order = other.order.clone()
        order[:, there] = canvas.order[:, part]
        return other.replace(order=order)

    def branches(canvas):
        conditional = Branch("conditional", canvas, guidance)
        if guidance == 1.0:
            return [conditional]
        return [conditional, Branch("unconditional", unconditional(canvas), 1.0 - guidance)]

    expected = run(pipe, canvas, steps=16, scheduler=scheduler, branches=branches)
    computed = []
    hook = pipe.transformer.blocks[0].register_forward_pre_hook(
        lambda _, inputs: computed.append(inputs[0].shape[1])
    )
    with exact_cache(pipe):
        found = run(pipe, canvas, steps=16, scheduler=scheduler, branches=branches)
    hook.remove()
    assert torch.equal(found.canvas.input_ids, expected.canvas.input_ids)
    assert found.num_forwards == expected.num_forwards
    if guidance != 1.0:
        # Captions, and the masks that stand for none, once for both rows.
        assert computed[:2] == [4, 6]
        computed[:2] = [10]
    assert len(computed) == found.num_steps
    if rule is None:
        # Condition and structure with the first block; each block commits with the next one's.
        assert computed == [10, 6, 6, 6, 10, 4, 4, 4, 8, 4, 4, 4, 8, 4, 4, 4]
    assert sum(computed) < 0.5 * canvas.length * len(computed)


def test_stopping_in_a_block_predicts_the_rest_as_without_the_cache(pipe):
    canvas = blocks_of_pictures(pipe)
    noisy = ConfidenceScheduler(modalities={"image": {"choice_temperature": 4.0}})

    def stop(step, timestep, now):
        return None if step == 5 else now

    expected = run(pipe, canvas, steps=16, scheduler=noisy, callback=stop)
    with exact_cache(pipe):
        found = run(pipe, canvas, steps=16, scheduler=noisy, callback=stop)
    assert not found.is_complete
    assert torch.equal(found.canvas.input_ids, expected.canvas.input_ids)


@pytest.mark.parametrize("cached", [False, True])
def test_a_token_of_a_closed_block_that_is_taken_back_is_not_left_masked(pipe, cached):
    """The later blocks see the mask; in the end it takes a prediction, and the run says so."""
    canvas = blocks_of_pictures(pipe)
    first = canvas.window_slice(pipe.processor.image_windows[0]).start
    mask = pipe.transformer.vocabulary.mask_token_id("image")
    noisy = ConfidenceScheduler(modalities={"image": {"choice_temperature": 4.0}})

    def callback(step, timestep, now):
        if step != 6:
            return now
        ids = now.input_ids.clone()
        ids[:, first] = mask
        return now.replace(input_ids=ids)

    def finish():
        return run(pipe, canvas, steps=16, scheduler=noisy, callback=callback)

    plain = finish()
    with exact_cache(pipe) if cached else contextlib.nullcontext():
        output = finish()
    assert not output.is_complete
    assert masks(pipe, output.canvas, slice(None)) == 0
    assert torch.equal(output.canvas.input_ids, plain.canvas.input_ids)


def test_a_branch_that_serves_one_window_is_cached_like_the_others(pipe):
    """Its other window stays masked for it; what it serves must not come from empty states."""
    canvas = pipe.processor.joint(1, gen_length=6)
    image, answer = pipe.processor.image_windows[0], pipe.processor.answer_window
    order = canvas.order.clone()
    order[:, canvas.window_slice(image)] += 1
    canvas = canvas.replace(order=order)
    noisy = {"choice_temperature": 4.0}
    scheduler = ConfidenceScheduler(modalities={"image": noisy, "text": noisy})

    def branches(canvas):
        return [
            Branch("text", canvas, 0.5, windows=(answer,)),
            Branch("image", canvas, 0.5, windows=(image,)),
        ]

    expected = run(pipe, canvas, steps=8, scheduler=scheduler, branches=branches)
    with exact_cache(pipe):
        found = run(pipe, canvas, steps=8, scheduler=scheduler, branches=branches)
    assert torch.equal(found.canvas.input_ids, expected.canvas.input_ids)


def test_rows_with_different_orders_in_a_free_window_are_refused(pipe):
    canvas = pipe.processor.text(["a", "b"], gen_length=4)
    order = canvas.order.clone()
    order[1, canvas.window_slice(pipe.processor.answer_window)] += 1
    with pytest.raises(CanvasError, match="same attention order in every row"):
        run(pipe, canvas.replace(order=order))


def test_staggered_windows_write_text_first(pipe):
    canvas = pipe.processor.joint(2, gen_length=6)
    text = canvas.window_slice(pipe.processor.answer_window)
    image = canvas.window_slice(pipe.processor.image_windows[0])
    windows = {"text": (1.0, 0.5), "image": (0.5, 0.0)}
    output, seen = recorded(pipe, canvas, steps=8, time_windows=windows)
    states = [(masks(pipe, now, text), masks(pipe, now, image)) for now in seen]
    assert all(left_image == 2 * 16 for left_text, left_image in states if left_text)
    assert states[-1] == (0, 0)
    assert any(left_text == 0 and left_image == 2 * 16 for left_text, left_image in states)
    assert output.num_forwards <= 8


def test_steps_before_any_window_has_begun_cost_no_forward(pipe):
    canvas = pipe.processor.text_to_image(["a"])
    output = run(pipe, canvas, steps=8, time_windows={"image": (0.5, 0.25)})
    assert output.num_forwards == 2


def test_a_row_does_not_depend_on_how_long_its_other_group_took(pipe):
    """Text rows of a joint batch finish at different steps; each equals its single call."""
    sampled = {"temperature": 1.0, "choice_temperature": 1.0}
    scheduler = ConfidenceScheduler(
        modalities={"text": {**sampled, "eos_column": 0, "fill_column": 1}, "image": sampled}
    )
    canvas = pipe.processor.joint(4, gen_length=8)
    seeds = [11, 12, 13, 14]
    together = run(pipe, canvas, steps=8, seeds=seeds, scheduler=scheduler).canvas
    for row, seed in enumerate(seeds):
        single = run(
            pipe, canvas.select_rows(slice(0, 1)), steps=8, seeds=[seed], scheduler=scheduler
        ).canvas
        assert torch.equal(single.input_ids[0], together.input_ids[row])


# Guidance.


def guided(pipe, scale):
    return classifier_free(pipe.processor.unconditional, scale)


def test_combine_is_the_weighted_sum_in_float32():
    logits = {"cond": torch.randn(1, 2, 3), "uncond": torch.randn(1, 2, 3)}
    weights = {"cond": 3.0, "uncond": -2.0}
    low = {name: values.bfloat16() for name, values in logits.items()}
    combined = combine(low, weights)
    assert combined.dtype == torch.float32
    torch.testing.assert_close(combined, 3 * low["cond"].float() - 2 * low["uncond"].float())
    alone = combine({"cond": logits["cond"]}, weights)
    torch.testing.assert_close(alone, logits["cond"])


def test_three_branches_combine_with_their_weights(pipe):
    """Two unconditional branches of weight (1 - g) / 2 are one of weight 1 - g."""
    canvas = pipe.processor.text_to_image(["a red apple"])

    def three(given):
        other = pipe.processor.unconditional(given)
        return [
            Branch("cond", given, 2.0),
            Branch("first", other, -0.5),
            Branch("second", other, -0.5),
        ]

    left = run(pipe, canvas, branches=three)
    right = run(pipe, canvas, branches=guided(pipe, 2.0))
    assert torch.equal(left.canvas.input_ids, right.canvas.input_ids)
    assert left.num_forwards == 18
    assert right.num_forwards == 12


def test_scale_one_builds_one_branch(pipe):
    assert guided(pipe, 1.0) is conditional_only
    assert (
        run(pipe, pipe.processor.text_to_image(["a"]), branches=guided(pipe, 1.0)).num_forwards == 6
    )


@pytest.mark.parametrize(
    ("start", "stop", "num_guided"), [(0.0, 0.5, 3), (0.5, 1.0, 3), (0.0, 0.0, 0), (0.34, 0.6, 1)]
)
def test_guidance_acts_inside_its_window_only(pipe, start, stop, num_guided):
    canvas = pipe.processor.text_to_image(["a red apple"])
    output = run(pipe, canvas, branches=guided(pipe, 3.0), guidance_start=start, guidance_stop=stop)
    assert output.num_forwards == 6 + num_guided


def test_branch_with_another_window_length_is_refused(pipe):
    canvas = pipe.processor.text(["what?"], gen_length=6)

    def wrong(given):
        return [
            Branch("cond", given, 2.0),
            Branch("uncond", pipe.processor.text(["what?"], gen_length=5), -1.0),
        ]

    with pytest.raises(CanvasError, match=r"same length in every branch; got 5 in `uncond` and 6"):
        run(pipe, canvas, branches=wrong)


# Callbacks and length rules.


def test_callback_may_write_free_positions(pipe):
    canvas = pipe.processor.text_to_image(["a"])
    part = canvas.window_slice(pipe.processor.image_windows[0])
    first = pipe.transformer.vocabulary.columns("image").start

    def callback(step, timestep, now):
        ids = now.input_ids.clone()
        ids[:, part.start] = first + 7
        return now.replace(input_ids=ids)

    output = run(pipe, canvas, callback=callback, branches=guided(pipe, 2.0))
    assert int(output.canvas.input_ids[0, part.start]) == first + 7


def test_callback_may_not_write_known_positions(pipe):
    canvas = pipe.processor.text_to_image(["a"])

    def callback(step, timestep, now):
        return now.replace(input_ids=now.input_ids.roll(1, dims=1))

    with pytest.raises(CanvasError, match="free positions only"):
        run(pipe, canvas, callback=callback)


def test_callback_that_remasks_is_written_again(pipe):
    canvas = pipe.processor.text_to_image(["a"])
    part = canvas.window_slice(pipe.processor.image_windows[0])
    mask = pipe.transformer.vocabulary.mask_token_id("image")

    def callback(step, timestep, now):
        if step != 3:
            return now
        ids = now.input_ids.clone()
        ids[:, part] = mask
        return now.replace(input_ids=ids)

    output = run(pipe, canvas, callback=callback)
    assert output.num_forwards == 6
    assert masks(pipe, output.canvas, part) == 0


def test_stopping_fills_the_rest_with_predictions(pipe):
    canvas = pipe.processor.joint(1, gen_length=6)
    windows = {"text": (1.0, 0.5), "image": (0.5, 0.0)}
    output = run(
        pipe, canvas, steps=8, time_windows=windows, callback=lambda step, timestep, now: None
    )
    assert not output.is_complete
    assert output.num_steps == 1
    assert masks(pipe, output.canvas, slice(None)) == 0
    output.canvas.validate(pipe.transformer.vocabulary)


def test_length_rule_may_change_the_canvas(pipe):
    canvas = pipe.processor.text(["what?"], gen_length=8)
    plain = ConfidenceScheduler(modalities={"text": {}})

    def rule(now):
        if now.length <= canvas.length - 3:
            return now
        kept = slice(0, now.length - 1)
        return type(now)(
            **{name: getattr(now, name)[:, kept] for name in vars(canvas) if name[0] != "_"}
        )

    output = run(
        pipe, canvas, steps=8, scheduler=plain, length_rule=rule, branches=guided(pipe, 2.0)
    )
    assert output.canvas.length == canvas.length - 3
    assert masks(pipe, output.canvas, output.canvas.window_slice(pipe.processor.answer_window)) == 0


@pytest.mark.parametrize("stops", [False, True])
def test_stages_after_a_length_rule_are_those_of_the_new_canvas(pipe, stops):
    """A caption after its picture becomes longer while the picture is written."""
    canvas = pipe.processor.joint(1, gen_length=6)
    part = canvas.window_slice(pipe.processor.answer_window)
    order = canvas.order.clone()
    order[:, part] = order.max() + 1
    canvas = canvas.replace(order=order)

    def rule(now):
        if now.length > canvas.length:
            return now
        return now.select_columns(
            torch.tensor([*range(part.stop), *range(part.stop - 1, now.length)])
        )

    def callback(step, timestep, now):
        return None if stops and step == 10 else now

    output = run(pipe, canvas, steps=8, length_rule=rule, callback=callback)
    assert output.canvas.length == canvas.length + 1
    assert output.is_complete is not stops
    assert masks(pipe, output.canvas, slice(None)) == 0


# Seeds.


def test_one_seed_per_row_is_required(pipe):
    with pytest.raises(ConfigError, match="`row_seeds` must have one entry per row; got 1 for 2"):
        run(pipe, pipe.processor.text_to_image(["a", "b"]), seeds=[0])
