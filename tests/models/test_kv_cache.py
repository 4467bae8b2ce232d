"""The exact cache against the same plan without a cache."""

import pytest
import torch

from multimodal_dlm.errors import ConfigError
from multimodal_dlm.models.attention_plan import AttentionPlan
from multimodal_dlm.models.cache_base import Tokens
from multimodal_dlm.models.kv_cache import LONG, ExactCache, ExactCacheConfig
from multimodal_dlm.models.noise_conditioning import NoiseConditioning, token_tables
from multimodal_dlm.models.prefix_memory import NUM_LEVEL_SETS, LevelMemory
from tests.models.tiny import make_canvas, run, tiny_model, tolerance

ORDERS = {
    "prefix": [0] * 4 + [1] * 6,
    "prefix_at_the_end": [1] * 6 + [0] * 4,
    "in_the_middle": [1] * 3 + [0] * 4 + [1] * 3,
    "blocks": [0] * 3 + [1] * 3 + [2] * 4,
}


def free_canvas(order, *, padding=None):
    """A canvas whose highest order is free and partly masked; the rest is known or frozen."""
    order = torch.tensor([order] * 2)
    canvas = make_canvas(order, is_padding=padding)
    return canvas.replace(is_free=(order == order.max()) & ~canvas.is_padding)


def steps(canvas, vocabulary, num=3):
    """The canvas, then with more and more free positions written."""
    generator = torch.Generator().manual_seed(1)
    columns = vocabulary.columns("image")
    for _ in range(num):
        yield canvas
        drawn = torch.randint(
            columns.start, columns.stop, canvas.input_ids.shape, generator=generator
        )
        is_written = canvas.is_free & (torch.rand(drawn.shape, generator=generator) < 0.4)
        canvas = canvas.replace(input_ids=torch.where(is_written, drawn, canvas.input_ids))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [{}, {"num_key_value_heads": 1, "qk_norm": True}])
@pytest.mark.parametrize("mode", ORDERS)
def test_cached_equals_uncached(mode, options, dtype):
    model = tiny_model(**options).to(dtype)
    model.enable_cache(ExactCacheConfig())
    canvas = free_canvas(ORDERS[mode])
    plan = AttentionPlan.from_canvas(canvas)
    cache = model.new_cache(plan, canvas.is_free)
    for current in steps(canvas, model.vocabulary):
        cached = run(model, current, attention_plan=plan, kv_cache=cache)
        expected = run(model, current, attention_plan=plan)
        assert (cached - expected).abs().max() <= tolerance(dtype, expected)
    assert cache.kept.tolist() == [i for i, o in enumerate(ORDERS[mode]) if o < max(ORDERS[mode])]


def test_cached_equals_uncached_with_padding_and_rows_that_differ():
    padding = torch.zeros(2, 10, dtype=torch.bool)
    padding[0, [2, 9]] = True
    canvas = free_canvas(ORDERS["prefix"], padding=padding)
    order = canvas.order.clone()
    order[1] = 0  # The second row has nothing free and sees everything.
    canvas = canvas.replace(order=order, is_free=canvas.is_free & (order == 1))
    model = tiny_model()
    plan = AttentionPlan.from_canvas(canvas)
    cache = ExactCache(plan, canvas.is_free)
    for current in steps(canvas, model.vocabulary):
        cached = run(model, current, attention_plan=plan, kv_cache=cache)[~padding]
        expected = run(model, current, attention_plan=plan)[~padding]
        assert (cached - expected).abs().max() <= tolerance(torch.float32, expected)
    assert sorted(cache.kept.tolist()) == [0, 1, 2, 3, 9]


def test_a_column_is_final_only_if_it_is_so_in_every_row():
    model, canvas = tiny_model(), make_canvas(torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1]]))
    masked = model.vocabulary.mask_token_id("image")

    def kept(is_free):
        ids = canvas.input_ids.masked_fill(is_free, masked)
        current = canvas.replace(input_ids=ids, is_free=is_free)
        cache = ExactCache(AttentionPlan.from_canvas(current), is_free)
        run(model, current, kv_cache=cache)
        return cache.kept.tolist()

    assert kept(canvas.order == 1) == [0]
    assert kept(torch.tensor([[False] * 4, [True] * 4])) == []


def counted(model):
    """Columns of each forward, counted at the first block."""
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    return seen


BLOCKS = [0] * 3 + [1] * 4 + [2] * 4 + [3] * 2


def block_run(vocabulary, *, rows=2, padding=None):
    """A canvas written block by block, a few positions a step; yields the open order as well."""
    order = torch.tensor([BLOCKS] * rows)
    canvas = make_canvas(order, is_padding=padding)
    is_free = (order > 0) & ~canvas.is_padding
    masked = vocabulary.mask_token_id("image")
    canvas = canvas.replace(
        is_free=is_free, input_ids=canvas.input_ids.masked_fill(is_free, masked)
    )
    generator = torch.Generator().manual_seed(1)
    columns = vocabulary.columns("image")
    for block in (1, 2, 3):
        while True:
            is_open = (canvas.input_ids == masked) & (order == block) & is_free
            if not bool(is_open.any()):
                break
            yield canvas, block
            is_written = is_open & (torch.rand(order.shape, generator=generator) < 0.5)
            drawn = torch.randint(columns.start, columns.stop, order.shape, generator=generator)
            canvas = canvas.replace(input_ids=torch.where(is_written, drawn, canvas.input_ids))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [{}, {"logits_shift": True}, {"num_key_value_heads": 1}])
@pytest.mark.parametrize("ragged", [False, True])
def test_block_after_block_equals_uncached(options, dtype, ragged):
    """At every step, the states of the open block are those of a full forward."""
    padding = torch.zeros(2, len(BLOCKS), dtype=torch.bool)
    if ragged:
        padding[0, [2, 9, 10]] = True
        padding[1, [1, 12]] = True
    model = tiny_model(**options).to(dtype)
    cache, num = None, 0
    for canvas, block in block_run(model.vocabulary, padding=padding):
        plan = AttentionPlan.from_canvas(canvas)
        cache = cache or ExactCache(plan, canvas.is_free)
        cached = run(model, canvas, attention_plan=plan, kv_cache=cache)
        expected = run(model, canvas, attention_plan=plan)
        is_seen = (canvas.order <= block) & ~canvas.is_padding
        difference = (cached - expected)[is_seen].abs().max()
        assert difference <= tolerance(dtype, expected)
        num += 1
    assert num > 6


def test_a_forward_computes_the_open_block_and_what_has_just_closed():
    model = tiny_model()
    seen, cache, blocks = counted(model), None, []
    for canvas, block in block_run(model.vocabulary):
        cache = cache or ExactCache(AttentionPlan.from_canvas(canvas), canvas.is_free)
        run(model, canvas, kv_cache=cache)
        blocks.append(block)
    size = {1: 4, 2: 4, 3: 2}
    expected = [
        size[block] + ({1: 3, 2: 4, 3: 4}[block] if block not in blocks[:step] else 0)
        for step, block in enumerate(blocks)
    ]
    assert seen == expected
    assert min(blocks.count(block) for block in (1, 2, 3)) >= 2


@pytest.mark.parametrize("shift", [0, 1])
def test_a_forward_writes_its_states_in_their_places(shift):
    """It copies no state that it did not compute: the states of a run are one tensor."""
    model, cache, places = tiny_model(logits_shift=shift), None, set()
    for canvas, _ in block_run(model.vocabulary):
        plan = AttentionPlan.from_canvas(canvas)
        cache = cache or ExactCache(plan, canvas.is_free, logits_shift=shift)
        states = run(model, canvas, kv_cache=cache, shift_states=False)
        places.add(states.data_ptr())
        assert not states.requires_grad
    assert len(places) == 1


def test_leaving_rows_out_copies_only_those_that_change_place():
    model, canvas = tiny_model().double(), free_canvas(ORDERS["prefix"])
    canvas = canvas.select_rows(torch.tensor([0, 1, 0, 1]))
    draw = torch.Generator().manual_seed(2)
    columns = model.vocabulary.columns("image")
    ids = torch.randint(columns.start, columns.stop, (4, 4), generator=draw)
    canvas = canvas.replace(input_ids=torch.cat([ids, canvas.input_ids[:, 4:]], dim=1))
    cache = ExactCache(AttentionPlan.from_canvas(canvas), canvas.is_free)
    run(model, canvas, kv_cache=cache)
    before = [part.data_ptr() for pair in cache._keys_values.values() for part in pair]
    for rows in ([0, 3, 2], [0, 2], [1]):
        cache.select_rows(torch.tensor(rows))
        canvas = canvas.select_rows(torch.tensor(rows))
        cached, expected = run(model, canvas, kv_cache=cache), run(model, canvas)
        assert (cached - expected).abs().max() <= tolerance(torch.float64, expected)
    assert len(cache.kept) == 4
    assert [part.data_ptr() for pair in cache._keys_values.values() for part in pair] == before


def test_a_canvas_changed_behind_its_back_starts_it_anew():
    model = tiny_model()
    canvases = [canvas for canvas, _ in block_run(model.vocabulary)]
    last = canvases[-1]
    plan = AttentionPlan.from_canvas(last)
    cache = ExactCache(plan, last.is_free)
    for canvas in canvases:
        run(model, canvas, attention_plan=plan, kv_cache=cache)
    assert len(cache.kept) == 11
    other = last.input_ids.clone()
    other[0, 5] = model.vocabulary.columns("image").start + (other[0, 5] == 24).long()
    assert not torch.equal(other, last.input_ids)
    masked = last.input_ids.clone()
    masked[1, 4] = model.vocabulary.mask_token_id("image")  # A token is taken back.
    for ids in (other, masked):
        changed = last.replace(input_ids=ids)
        cached = run(model, changed, attention_plan=plan, kv_cache=cache)
        expected = run(model, changed, attention_plan=plan)
        is_seen = changed.order <= int(changed.order[:, cache.open].max())
        assert torch.allclose(cached[is_seen], expected[is_seen], atol=1e-5)


def test_columns_that_are_asked_for_are_computed_whatever_waits_below():
    """A token of a closed block is masked again while a later block is written."""
    model = tiny_model()
    canvases = list(block_run(model.vocabulary))
    canvas = next(canvas for canvas, block in canvases if block == 3)
    plan = AttentionPlan.from_canvas(canvas)
    cache = ExactCache(plan, canvas.is_free)
    run(model, canvas, attention_plan=plan, kv_cache=cache)
    ids = canvas.input_ids.clone()
    ids[0, 4] = model.vocabulary.mask_token_id("image")
    again = canvas.replace(input_ids=ids)
    cache.read([11])
    cached = run(model, again, attention_plan=plan, kv_cache=cache)
    assert torch.allclose(cached, run(model, again, attention_plan=plan), atol=1e-5)
    assert cache.kept.tolist() == [0, 1, 2]


def tokens_of(canvas, levels, **changed):
    return Tokens(canvas.input_ids, None, levels, canvas.position_ids, **changed)


def test_known_tables_of_levels_equal_fresh_ones_and_follow_the_levels():
    model = tiny_model()
    canvas = make_canvas(torch.zeros(2, 6, dtype=torch.long))
    memory, conditioning = LevelMemory(), model.level_conditioning
    block = model.blocks[1]
    calls = []
    conditioning.register_forward_hook(lambda *_: calls.append(1))
    first = torch.tensor([[0.0, 0.5, 0.5, 0.25, 0.0, 0.0], [1.0] * 6])
    second = torch.tensor([[0.0, 0.5, 0.5, 0.75, 0.0, 0.0], [1.0] * 6])
    for levels, num_calls in ((first, 1), (second, 2), (first.flip(1), 2), (second, 2)):
        known = memory.modulation(conditioning, tokens_of(canvas, levels))
        assert len(calls) == num_calls
        fresh = NoiseConditioning.forward(conditioning, levels)
        assert torch.equal(known.features, fresh.features)
        assert torch.equal(known.rows, fresh.rows)
        both = (known.gatings(block.scale_shift_table), fresh.gatings(block.scale_shift_table))
        for kept, made in zip(*both, strict=True):
            parts = zip(
                token_tables(kept, block.norm1.weight, torch.float32),
                token_tables(made, block.norm1.weight, torch.float32),
                strict=True,
            )
            assert all(torch.equal(ours, theirs) for ours, theirs in parts)
            assert torch.equal(kept.shift, made.shift)  # Also once the finished table is known.
            assert torch.equal(kept.gate, made.gate)
    assert [len(known) for _, known in memory._entries.values()] == [2, 2]
    extra = torch.ones(2, 32)
    with_extra = memory.modulation(
        conditioning, tokens_of(canvas, first, conditioning_embeds=extra)
    )
    assert with_extra.known is None  # Such features belong to their rows.


def test_only_so_many_sets_of_levels_are_kept():
    model = tiny_model()
    canvas = make_canvas(torch.zeros(1, 1, dtype=torch.long))
    memory = LevelMemory()
    for level in range(NUM_LEVEL_SETS + 3):
        levels = torch.tensor([[level / 256]])
        memory.modulation(model.level_conditioning, tokens_of(canvas, levels))
    assert len(memory) == NUM_LEVEL_SETS
    assert (NUM_LEVEL_SETS + 2,) in memory._entries
    assert (0,) not in memory._entries


def test_known_levels_are_forgotten_with_the_weights():
    """A second call takes the tables of the first; after a change of weights it may not."""
    model = tiny_model().double()
    canvas = free_canvas(ORDERS["prefix"])
    plan = AttentionPlan.from_canvas(canvas)
    model.enable_cache(ExactCacheConfig())
    calls = []
    model.level_conditioning.register_forward_hook(lambda *_: calls.append(1))

    def call():
        calls.clear()
        cache = model.new_cache(plan, canvas.is_free)
        found = run(model, canvas, attention_plan=plan, kv_cache=cache)
        num_calls = len(calls)
        assert (found - run(model, canvas, attention_plan=plan)).abs().max() < 1e-10
        return num_calls

    assert (call(), call(), call()) == (1, 1, 0)  # Then without, then with a known prefix.
    with torch.no_grad():
        model.level_conditioning.linear_out.weight.mul_(1.5)
        model.blocks[0].scale_shift_table.add_(0.3)
    assert call() == 1


def test_known_rotary_tables_follow_positions_and_dtype():
    model = tiny_model()
    canvas = free_canvas(ORDERS["prefix"])
    cache = ExactCache(AttentionPlan.from_canvas(canvas), canvas.is_free)
    positions = canvas.position_ids
    first = cache.rotary(model._rotary, positions, torch.float32)
    assert cache.rotary(model._rotary, positions.clone(), torch.float32) is first
    for changed, dtype in (
        (positions + 1, torch.float32),
        (positions[:, 2:], torch.float32),
        (positions[:, 2:], torch.float64),
        (positions, torch.float64),
    ):
        found, fresh = cache.rotary(model._rotary, changed, dtype), model._rotary(changed, dtype)
        assert torch.equal(found.cos, fresh.cos)
        assert torch.equal(found.sin, fresh.sin)


def test_a_long_condition_goes_alone_and_takes_no_mask():
    model = tiny_model().double()
    order = torch.tensor([[0] * 2 + [1] * LONG + [2] * 3 + [3] * 3] * 2)
    canvas = make_canvas(order)
    masked = model.vocabulary.mask_token_id("image")
    ids = canvas.input_ids.masked_fill(canvas.input_ids == masked, 100)
    canvas = canvas.replace(is_free=order > 1, input_ids=ids.masked_fill(order > 1, masked))
    seen, plan = counted(model), AttentionPlan.from_canvas(canvas)
    cache = ExactCache(plan, canvas.is_free)
    found = run(model, canvas, attention_plan=plan, kv_cache=cache)
    assert seen == [2 + LONG, 3]
    assert cache.plan.mask is None
    assert "mask" not in vars(plan)  # No mask over the whole canvas was made.
    expected = run(model, canvas, attention_plan=plan)
    is_seen = canvas.order <= 2
    assert (found - expected)[is_seen].abs().max() <= tolerance(torch.float64, expected)


def test_full_attention_gets_no_cache():
    model, canvas = tiny_model(), make_canvas(torch.zeros(2, 6, dtype=torch.long))
    model.enable_cache(ExactCacheConfig())
    assert model.new_cache(AttentionPlan.from_canvas(canvas), canvas.is_free) is None


def test_only_open_columns_are_computed():
    model, canvas = tiny_model(), free_canvas(ORDERS["prefix"])
    seen = counted(model)
    plan = AttentionPlan.from_canvas(canvas)
    cache = ExactCache(plan, canvas.is_free)
    for _ in range(2):
        run(model, canvas, attention_plan=plan, kv_cache=cache)
    changed = canvas.input_ids.clone()
    changed[0, 0] = model.vocabulary.columns("text").start + (changed[0, 0] == 0).long()
    run(model, canvas.replace(input_ids=changed), attention_plan=plan, kv_cache=cache)
    assert seen == [10, 6, 10]


def test_nothing_free_computes_nothing_twice():
    model, canvas = tiny_model(), make_canvas(torch.zeros(2, 6, dtype=torch.long))
    plan = AttentionPlan.from_canvas(canvas)
    cache = ExactCache(plan, torch.zeros_like(canvas.is_free))
    first = run(model, canvas, kv_cache=cache, attention_plan=plan)
    assert torch.equal(run(model, canvas, kv_cache=cache, attention_plan=plan), first)


def test_a_cache_of_another_length_is_refused():
    model, canvas = tiny_model(), free_canvas(ORDERS["prefix"])
    cache = ExactCache(AttentionPlan.from_canvas(canvas), canvas.is_free)
    run(model, canvas, kv_cache=cache)
    with pytest.raises(ConfigError, match="10 columns; got 6"):
        run(model, free_canvas([0] * 2 + [1] * 4), kv_cache=cache)
    with pytest.raises(ConfigError, match="shape"):
        ExactCache(AttentionPlan.from_canvas(canvas), canvas.is_free[:, :4])


def test_enabling_records_the_choice():
    model, canvas = tiny_model(), free_canvas(ORDERS["prefix"])
    plan = AttentionPlan.from_canvas(canvas)
    assert not model.is_cache_enabled
    assert model.new_cache(plan, canvas.is_free) is None
    model.enable_cache(ExactCacheConfig())
    assert model.is_cache_enabled
    assert isinstance(model.new_cache(plan, canvas.is_free), ExactCache)
    with pytest.raises(ConfigError, match="disable_cache"):
        model.enable_cache(ExactCacheConfig())
    model.disable_cache()
    model.disable_cache()
    assert not model.is_cache_enabled


def test_a_cache_of_diffusers_still_installs():
    from diffusers import FirstBlockCacheConfig

    model, canvas = tiny_model(num_layers=3), free_canvas(ORDERS["prefix"])
    expected = run(model, canvas).detach()
    model.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    assert model.is_cache_enabled
    assert model.new_cache(AttentionPlan.from_canvas(canvas), canvas.is_free) is None
    with torch.no_grad(), model.cache_context("cond"):
        assert torch.allclose(run(model, canvas), expected, atol=1e-5)
    model.disable_cache()
    assert not model.is_cache_enabled
    assert torch.allclose(run(model, canvas), expected, atol=1e-6)
