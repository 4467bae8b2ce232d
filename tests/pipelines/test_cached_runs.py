"""Whole runs of the loop, cached against uncached: every plan, step, branch and batch.

Each forward of a cached run is made again without a cache, and whatever the loop reads of it is
compared, so that a column that is read but was not kept up to date cannot hide.
"""

from types import SimpleNamespace

import pytest
import torch

from multimodal_dlm.canvas import Canvas
from multimodal_dlm.models.attention_plan import AttentionPlan
from multimodal_dlm.models.kv_cache import ExactCache, ExactCacheConfig
from multimodal_dlm.pipelines import denoise
from multimodal_dlm.pipelines.guidance import classifier_free, conditional_only
from multimodal_dlm.schedulers import ConfidenceScheduler
from tests.models.tiny import tiny_model, tolerance

CONDITION, ANSWER = 5, 6
PLANS = {
    "prefix": [1] * ANSWER,
    "blocks": [1, 1, 1, 2, 2, 2],
    "uneven_blocks": [1, 2, 2, 2, 3, 3],
    "causal": list(range(1, ANSWER + 1)),
}
NOISY = {"temperature": 1.0, "choice_temperature": 4.0}


class Checked:
    """A backbone that answers from its cache and compares with a forward that has none."""

    def __init__(self, model):
        self.model = model
        self.num_compared = 0
        self.columns = []
        self.hook = model.blocks[0].register_forward_pre_hook(
            lambda _, inputs: self.columns.append(tuple(inputs[0].shape[:2]))
        )

    def __getattr__(self, name):
        return getattr(self.model, name)

    def __call__(self, ids, *, kv_cache, **inputs):
        cached = self.model(ids, kv_cache=kv_cache, **inputs).hidden_states
        exact = self.model(ids, **inputs).hidden_states
        self.columns.pop()  # Of the comparison.
        return SimpleNamespace(hidden_states=torch.cat([cached, exact], -1), token_quality=None)

    def compute_logits(self, states, modality):
        cached, exact = states.chunk(2, dim=-1)
        found = self.model.compute_logits(cached, modality)
        expected = self.model.compute_logits(exact, modality)
        assert (found - expected).abs().max() <= tolerance(found.dtype, expected)
        self.num_compared += 1
        return found


def make_canvas(vocabulary, order, lengths=(5, 3, 4), *, modality="text"):
    """Rows of a known condition of some length and a masked answer, orders as given."""
    rows, total = len(lengths), CONDITION + len(order)
    index = torch.arange(total).expand(rows, total)
    is_answer = index >= CONDITION
    is_padding = ~is_answer & (index >= torch.tensor(lengths)[:, None])
    columns = vocabulary.columns(modality)
    draw = torch.Generator().manual_seed(3)
    known = torch.randint(columns.start + 2, columns.stop, index.shape, generator=draw)
    ids = torch.where(is_answer, vocabulary.mask_token_id(modality), known)
    ids = ids.masked_fill(is_padding, vocabulary.special_id("pad"))
    counted = (~is_padding).cumsum(1) * ~is_padding
    return Canvas(
        input_ids=ids,
        window_ids=1 + is_answer.long(),
        modality_ids=torch.full_like(index, vocabulary.modalities.index(modality)),
        position_ids=torch.stack([counted, 0 * counted, 0 * counted], dim=-1),
        order=torch.tensor([0] * CONDITION + order).expand(rows, total).clone(),
        document_ids=torch.zeros_like(index),
        is_free=is_answer,
        is_padding=is_padding,
    )


def without_condition(vocabulary):
    """The branch whose condition is masks, the same in every row."""

    def build(canvas):
        is_condition = canvas.window_ids == 1
        return canvas.replace(
            input_ids=canvas.input_ids.masked_fill(is_condition, vocabulary.mask_token_id("text")),
            is_padding=torch.zeros_like(canvas.is_padding),
        )

    return build


def run(model, canvas, *, guidance=1.0, settings=NOISY, seeds=None, steps=ANSWER, **options):
    vocabulary = model.vocabulary
    branches = conditional_only
    if guidance != 1.0:
        branches = classifier_free(without_condition(vocabulary), guidance)
    return denoise(
        model,
        ConfidenceScheduler(modalities={"text": settings, "image": settings}),
        canvas,
        num_inference_steps=steps,
        row_seeds=list(range(canvas.batch_size)) if seeds is None else seeds,
        branches=branches,
        **options,
    )


@pytest.mark.parametrize(
    ("plan", "shift", "dtype"),
    [
        *((plan, shift, torch.float64) for plan in PLANS for shift in (0, 1)),
        ("blocks", 1, torch.float32),
    ],
)
def test_every_step_of_a_run_equals_the_uncached_one(plan, shift, dtype):
    """Twice: the second call finds the prefixes of the first."""
    model = tiny_model(logits_shift=shift).to(dtype)
    canvas = make_canvas(model.vocabulary, PLANS[plan])
    for guidance in (1.0, 2.5):
        expected = run(model, canvas, guidance=guidance)
        model.enable_cache(ExactCacheConfig())
        for _ in range(1 if guidance == 1.0 else 2):
            checked = Checked(model)
            found = run(checked, canvas, guidance=guidance)
            assert checked.num_compared == found.num_forwards == expected.num_forwards
            assert torch.equal(found.canvas.input_ids, expected.canvas.input_ids)
            checked.hook.remove()
        model.disable_cache()


def test_a_broken_cache_is_noticed(monkeypatch):
    model = tiny_model()
    model.enable_cache(ExactCacheConfig())
    update = ExactCache.update

    def wrong(self, layer, keys, values):
        keys, values = update(self, layer, keys, values)
        return keys, values * 1.001

    monkeypatch.setattr(ExactCache, "update", wrong)
    with pytest.raises(AssertionError):
        run(Checked(model), make_canvas(model.vocabulary, PLANS["prefix"]))


def test_autoregressive_decoding_computes_one_column_a_token():
    """Greedy and sampled; each token is the choice after a plain causal forward."""
    model = tiny_model(logits_shift=1).double()
    vocabulary = model.vocabulary
    canvas = make_canvas(vocabulary, PLANS["causal"], lengths=(5, 5))
    model.enable_cache(ExactCacheConfig(num_prefixes=0))
    for temperature in (0.0, 1.0):
        checked = Checked(model)
        found = run(checked, canvas, settings={"temperature": temperature})
        assert checked.columns == [(2, CONDITION)] + [(2, 1)] * (ANSWER - 1)
        assert found.num_forwards == ANSWER
        checked.hook.remove()
    model.disable_cache()
    greedy = run(model, canvas, settings={}).canvas
    plan = AttentionPlan.from_canvas(greedy)
    states = model(
        greedy.input_ids,
        noise_levels=torch.zeros(greedy.input_ids.shape, dtype=torch.float64),
        position_ids=greedy.position_ids,
        attention_plan=plan,
    ).hidden_states
    chosen = model.compute_logits(states[:, CONDITION:], "text").argmax(-1)
    assert torch.equal(chosen + vocabulary.columns("text").start, greedy.input_ids[:, CONDITION:])


@pytest.mark.parametrize("shift", [0, 1])
def test_what_is_read_may_move_under_one_order(shift):
    """Two windows of one order, written one after the other: what was not read is not stale."""
    model = tiny_model(logits_shift=shift).double()
    canvas = make_canvas(model.vocabulary, [1] * ANSWER)
    windows = canvas.window_ids.clone()
    windows[:, CONDITION + 1 :] = 3  # The first window holds one token, read before the order.
    modalities = canvas.modality_ids.clone()
    modalities[:, CONDITION + 1 :] = 1
    ids = canvas.input_ids.clone()
    ids[:, CONDITION + 1 :] = model.vocabulary.mask_token_id("image")
    canvas = canvas.replace(window_ids=windows, modality_ids=modalities, input_ids=ids)
    times = {"text": (1.0, 0.5), "image": (0.5, 0.0)}
    expected = run(model, canvas, time_windows=times)
    model.enable_cache(ExactCacheConfig())
    checked = Checked(model)
    found = run(checked, canvas, time_windows=times)
    assert torch.equal(found.canvas.input_ids, expected.canvas.input_ids)
    assert checked.num_compared > 2


def test_a_shared_prefix_is_computed_once_for_all_rows_and_calls():
    model = tiny_model()
    canvas = make_canvas(model.vocabulary, PLANS["prefix"], lengths=(5, 5))
    questions = torch.tensor([0, 0, 1, 0])
    batch = canvas.select_rows(questions)
    model.enable_cache(ExactCacheConfig(num_prefixes=2))
    first = Checked(model)
    run(first, batch)
    assert first.columns[:2] == [(2, CONDITION), (4, ANSWER)]
    first.hook.remove()
    again = Checked(model)
    run(again, batch)
    assert again.columns[0] == (4, ANSWER)
    again.hook.remove()
    for change in ("in place", "behind its back", "one half behind its back"):
        weight = model.blocks[0].attn.to_qkv.weight
        if change == "in place":
            with torch.no_grad():
                weight.mul_(1.01)
        else:
            weight.data[len(weight) // 2 if change.startswith("one half") else 0 :] *= 1.01
        fresh = Checked(model)
        run(fresh, batch)
        assert fresh.columns[0] == (2, CONDITION), change
        fresh.hook.remove()


@pytest.mark.parametrize("shift", [0, 1])
def test_the_states_of_a_run_are_one_tensor(shift):
    """The loop picks what it reads of them; also shifted states are not copied to be read."""
    model = tiny_model(logits_shift=shift)
    model.enable_cache(ExactCacheConfig())
    places = set()
    model.register_forward_hook(
        lambda _, inputs, output: places.add(output.hidden_states.data_ptr())
    )
    assert run(model, make_canvas(model.vocabulary, PLANS["causal"])).num_forwards == ANSWER
    assert len(places) == 1


def test_only_so_many_prefixes_are_kept():
    model = tiny_model()
    canvas = make_canvas(model.vocabulary, PLANS["prefix"], lengths=(5, 4, 3))
    model.enable_cache(ExactCacheConfig(num_prefixes=2))
    run(model, canvas)
    assert len(model._own_cache.memory) == 2


@pytest.mark.parametrize("cached", [False, True])
def test_finished_rows_are_not_computed(cached):
    """A forward holds the rows that still have a free mask and no others, with a cache too.

    Results are those of single calls.
    """
    model = tiny_model()
    canvas = make_canvas(model.vocabulary, PLANS["blocks"])
    ids = canvas.input_ids.clone()
    ids[0, CONDITION + 1 :] = model.vocabulary.columns("text").start + 4  # One token to write.
    ids[1, CONDITION + 3 :] = model.vocabulary.columns("text").start + 5  # One block to write.
    canvas = canvas.replace(input_ids=ids)
    if cached:
        model.enable_cache(ExactCacheConfig())
    checked = Checked(model)
    unfinished = [3]

    def count(step, timestep, now):
        is_masked = model.vocabulary.is_masked(now.input_ids)
        unfinished.append(int(is_masked.any(dim=1).sum()))
        return now

    found = run(checked, canvas, callback=count).canvas
    assert [rows for rows, _ in checked.columns] == unfinished[:-1]
    assert {3, 2, 1} == set(unfinished[:-1])
    assert unfinished[-1] == 0
    checked.hook.remove()
    model.disable_cache()
    for row in range(3):
        single = run(model, canvas.select_rows(slice(row, row + 1)), seeds=[row]).canvas
        assert torch.equal(single.input_ids[0], found.input_ids[row])


def test_a_finished_row_that_is_reopened_is_computed_again():
    model = tiny_model()
    canvas = make_canvas(model.vocabulary, PLANS["prefix"], lengths=(5, 4))
    ids = canvas.input_ids.clone()
    ids[0, CONDITION + 1 :] = model.vocabulary.columns("text").start + 4
    canvas = canvas.replace(input_ids=ids)
    mask = model.vocabulary.mask_token_id("text")

    def reopen(step, timestep, now):
        if step != 4:
            return now
        changed = now.input_ids.clone()
        changed[0, CONDITION] = mask
        return now.replace(input_ids=changed)

    expected = run(model, canvas, callback=reopen)
    model.enable_cache(ExactCacheConfig())
    found = run(Checked(model), canvas, callback=reopen)
    assert torch.equal(found.canvas.input_ids, expected.canvas.input_ids)


def test_blocks_of_text_end_with_eos_and_what_follows_is_free():
    """A block need not end with `<eos>`; one that has it leaves nothing to compute."""
    model = tiny_model()
    vocabulary = model.vocabulary
    start = vocabulary.columns("text").start
    settings = {**NOISY, "eos_column": 0, "fill_column": 1}
    ends = set()
    for first in (0, 4):
        canvas = make_canvas(vocabulary, PLANS["blocks"], lengths=(5, 4, 3, 5))
        output = run(model, canvas, settings=settings, seeds=range(first, first + 4))
        for row in (output.canvas.input_ids[:, CONDITION:] - start).tolist():
            assert row.count(0) == 1
            end = row.index(0)
            assert all(code > 1 for code in row[:end])
            assert set(row[end + 1 :]) <= {1}
            ends.add(end)
    assert max(ends) > 2  # The first block ends without one.
    ended = make_canvas(vocabulary, PLANS["blocks"], lengths=(5,))
    ids = ended.input_ids.clone()
    ids[:, CONDITION] = vocabulary.special_id("eos")
    ids[:, CONDITION + 1 : CONDITION + 3] = vocabulary.special_id("fill")
    output = run(model, ended.replace(input_ids=ids), settings=settings)
    assert output.num_forwards == 0
    assert (output.canvas.input_ids[0, CONDITION + 1 :] == vocabulary.special_id("fill")).all()
