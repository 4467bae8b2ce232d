"""Branches as rows of one forward: what stacking keeps, when it is done, and that it is exact."""

from dataclasses import fields

import pytest
import torch

from multimodal_dlm.canvas import Canvas, noise_levels
from multimodal_dlm.models.kv_cache import ExactCacheConfig
from multimodal_dlm.pipelines import UnifiedJointPipeline, denoise, lanes
from multimodal_dlm.pipelines.guidance import Branch
from multimodal_dlm.pipelines.lanes import share_out, stack
from multimodal_dlm.schedulers import ConfidenceScheduler
from tests.models.tiny import tiny_model
from tests.pipelines.test_cached_runs import ANSWER, CONDITION, NOISY, PLANS, make_canvas
from tests.pipelines.tiny import seeded, tiny_components

LENGTHS = (5, 3, 4)


def without_some(canvas, window):
    """The same rows without the first two tokens of a window, which stay in others as they are."""
    first = canvas.window_slice(window).start
    is_kept = torch.ones(canvas.length, dtype=torch.bool)
    is_kept[first : first + 2] = False
    return canvas.select_columns(is_kept)


def shortened(vocabulary):
    """The branch whose condition is two masks."""

    def build(canvas):
        short = canvas.select_columns(slice(canvas.window_slice(2).start - 2, None))
        is_condition = short.window_ids == 1
        places = torch.arange(1, short.length + 1).expand_as(short.input_ids)
        return short.replace(
            input_ids=short.input_ids.masked_fill(is_condition, vocabulary.mask_token_id("text")),
            is_padding=torch.zeros_like(short.is_padding),
            position_ids=torch.stack([places, 0 * places, 0 * places], dim=-1),
        )

    return build


def branches_of(build):
    """Guidance at scale 2.5 with a branch of one's own."""
    return lambda canvas: [Branch("cond", canvas, 2.5), Branch("uncond", build(canvas), -1.5)]


def run(model, canvas, **options):
    return denoise(
        model,
        ConfidenceScheduler(modalities={"text": NOISY}),
        canvas,
        num_inference_steps=ANSWER,
        row_seeds=list(range(canvas.batch_size)),
        branches=branches_of(shortened(model.vocabulary)),
        **options,
    )


def test_stacking_keeps_every_token_and_its_level():
    """Row by row, without padding, each canvas is found again; windows are aligned and valid."""
    vocabulary = tiny_model().vocabulary
    whole = make_canvas(vocabulary, PLANS["blocks"], LENGTHS)
    canvases = [without_some(whole, 1), whole, whole.select_columns(slice(CONDITION, None))]
    stacked = stack(canvases)
    assert stacked.length == whole.length
    stacked.validate(vocabulary)
    levels = noise_levels(stacked, vocabulary)
    rows = iter(range(stacked.batch_size))
    for canvas in canvases:
        own_levels = noise_levels(canvas, vocabulary)
        for row in range(canvas.batch_size):
            place = next(rows)
            there, own = ~stacked.is_padding[place], ~canvas.is_padding[row]
            for part in fields(Canvas):
                found = getattr(stacked, part.name)[place, there]
                expected = getattr(canvas, part.name)[row, own]
                if part.name == "order":  # Other numbers, in the same relation to each other.
                    found, expected = (
                        order.unique(return_inverse=True)[1] for order in (found, expected)
                    )
                assert torch.equal(found, expected), part.name
            assert torch.equal(levels[place, there], own_levels[row, own])
    assert not bool((stacked.is_free & stacked.is_padding).any())


def test_branches_share_a_forward_up_to_a_number_of_tokens(monkeypatch):
    vocabulary = tiny_model().vocabulary
    canvas = make_canvas(vocabulary, PLANS["prefix"], LENGTHS)
    branches = [Branch(name, canvas, 1 / 3) for name in ("a", "b", "c")]
    size = canvas.input_ids.numel()
    for limit, expected in ((3 * size, [3]), (2 * size, [2, 1]), (2 * size - 1, [1, 1, 1])):
        monkeypatch.setattr(lanes, "STACKED_TOKENS", limit)
        assert [len(part) for part in share_out(branches)] == expected


def test_branches_whose_windows_have_another_order_go_alone():
    """Shifted logits read the token before: the columns of a row keep their order."""
    vocabulary = tiny_model().vocabulary
    canvas = make_canvas(vocabulary, PLANS["prefix"], LENGTHS)
    columns = torch.arange(canvas.length).roll(CONDITION)
    other = canvas.select_columns(columns)
    branches = [Branch("cond", canvas, 2.0), Branch("uncond", other, -1.0)]
    assert [len(part) for part in share_out(branches)] == [1, 1]


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("plan", ["prefix", "blocks", "causal"])
@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.0, 0.5), (0.4, 0.8)])
def test_a_run_of_stacked_branches_is_that_of_separate_ones(plan, shift, interval, monkeypatch):
    """A ragged branch, rows that end one after the other, guidance in some steps, both caches."""
    model = tiny_model(logits_shift=shift).double()
    canvas = make_canvas(model.vocabulary, PLANS[plan], LENGTHS)
    ids = canvas.input_ids.clone()
    ids[0, CONDITION + 2 :] = model.vocabulary.columns("text").start + 4
    canvas = canvas.replace(input_ids=ids)
    options = {"guidance_start": interval[0], "guidance_stop": interval[1]}
    calls = []
    hook = model.blocks[0].register_forward_pre_hook(lambda _, inputs: calls.append(inputs[0]))
    found = {}
    for cached in (False, True):
        if cached:
            model.enable_cache(ExactCacheConfig())
        for limit in (0, 1024):
            calls.clear()
            monkeypatch.setattr(lanes, "STACKED_TOKENS", limit)
            found[cached, limit] = run(model, canvas, **options)
            if not cached:
                output = found[cached, limit]
                assert len(calls) == (output.num_steps if limit else output.num_forwards)
    hook.remove()
    model.disable_cache()
    expected = found[False, 0]
    for output in found.values():
        assert torch.equal(output.canvas.input_ids, expected.canvas.input_ids)
        assert output.num_forwards == expected.num_forwards
    # A causal stage has one step, its first.
    is_guided = plan != "causal" or interval[0] == 0.0
    assert (expected.num_forwards > expected.num_steps) == is_guided


@pytest.mark.parametrize("shift", [0, 1])
def test_a_prefix_is_computed_once_whatever_stands_beside_it(shift):
    """The unconditional one once per model; a prompt is found again beside a longer one."""
    model = tiny_model(logits_shift=shift).double()
    both = make_canvas(model.vocabulary, PLANS["prefix"], (5, 3))
    long, short = (both.select_rows(slice(row, row + 1)) for row in (0, 1))
    short = short.select_columns(~short.is_padding[0])
    canvases = (long, short, both)
    expected = [run(model, canvas) for canvas in canvases]
    model.enable_cache(ExactCacheConfig())
    shapes = []
    hook = model.blocks[0].register_forward_pre_hook(
        lambda _, inputs: shapes.append(tuple(inputs[0].shape[:2]))
    )
    first = (
        [(2, CONDITION + ANSWER)],
        [(1, 3), (2, ANSWER)],  # Of the condition only the new prompt.
        [(4, ANSWER)],
    )
    for canvas, whole, begun in zip(canvases, expected, first, strict=True):
        shapes.clear()
        found = run(model, canvas)
        assert shapes[: len(begun)] == begun
        assert {length for _, length in shapes[len(begun) :]} == {ANSWER}
        assert torch.equal(found.canvas.input_ids, whole.canvas.input_ids)
    hook.remove()


@pytest.mark.parametrize("is_guided", [False, True])
def test_rows_of_branches_that_do_not_take_part_are_not_computed(is_guided):
    model = tiny_model()
    canvas = make_canvas(model.vocabulary, PLANS["prefix"], LENGTHS)
    rows = []
    hook = model.blocks[0].register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    run(model, canvas, guidance_stop=0.5 if is_guided else 0.0)
    hook.remove()
    assert rows == ([6] * 3 + [3] * 3 if is_guided else [3] * 6)


@pytest.mark.parametrize("gen_length", [1, 2, 3, 6])
def test_a_branch_may_have_more_masks_than_the_window_has_tokens(gen_length, monkeypatch):
    """In joint runs the branch of the picture alone has a fixed number of caption masks."""
    pipe = UnifiedJointPipeline(**tiny_components()).to(torch.float64)
    pipe.set_progress_bar_config(disable=True)

    def call():
        options = {"gen_length": gen_length, "num_inference_steps": 6, "guidance_scale": 2.0}
        found = pipe(2, generator=seeded(0, 1), output_type="codes", **options)
        return [found.images[0].tolist(), list(found.texts)]

    together = call()
    monkeypatch.setattr(lanes, "STACKED_TOKENS", 0)
    assert call() == together
