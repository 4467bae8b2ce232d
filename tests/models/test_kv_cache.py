"""The prefix cache against the same plan without a cache."""

import pytest
import torch

from multimodal_dlm.errors import ConfigError
from multimodal_dlm.models.attention_plan import AttentionPlan
from multimodal_dlm.models.kv_cache import PrefixCache, PrefixCacheConfig
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
    model.enable_cache(PrefixCacheConfig())
    canvas = free_canvas(ORDERS[mode])
    plan = AttentionPlan.from_canvas(canvas)
    cache = model.new_cache(plan, canvas.is_free)
    for current in steps(canvas, model.vocabulary):
        cached = run(model, current, attention_plan=plan, kv_cache=cache)
        expected = run(model, current, attention_plan=plan)
        assert (cached - expected).abs().max() <= tolerance(dtype, expected)
    assert cache.closed.tolist() == [i for i, o in enumerate(ORDERS[mode]) if o < max(ORDERS[mode])]


def test_cached_equals_uncached_with_padding_and_rows_that_differ():
    padding = torch.zeros(2, 10, dtype=torch.bool)
    padding[0, [2, 9]] = True
    canvas = free_canvas(ORDERS["prefix"], padding=padding)
    order = canvas.order.clone()
    order[1] = 0  # The second row has nothing free and sees everything.
    canvas = canvas.replace(order=order, is_free=canvas.is_free & (order == 1))
    model = tiny_model()
    plan = AttentionPlan.from_canvas(canvas)
    cache = PrefixCache(plan, canvas.is_free)
    assert cache.closed.tolist() == [0, 1, 2, 3, 9]
    for current in steps(canvas, model.vocabulary):
        cached = run(model, current, attention_plan=plan, kv_cache=cache)[~padding]
        expected = run(model, current, attention_plan=plan)[~padding]
        assert (cached - expected).abs().max() <= tolerance(torch.float32, expected)


def test_a_column_is_closed_only_if_it_is_in_every_row():
    order = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1]])
    plan = AttentionPlan.build(order=order)
    assert PrefixCache(plan, order == 1).closed.tolist() == [0]
    everything_free = torch.tensor([[False] * 4, [True] * 4])
    assert PrefixCache(plan, everything_free).closed.tolist() == []


def test_only_open_columns_are_computed():
    model, canvas = tiny_model(), free_canvas(ORDERS["prefix"])
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    plan = AttentionPlan.from_canvas(canvas)
    cache = PrefixCache(plan, canvas.is_free)
    for _ in range(2):
        run(model, canvas, attention_plan=plan, kv_cache=cache)
    cache.invalidate(start=5)
    run(model, canvas, attention_plan=plan, kv_cache=cache)
    cache.invalidate()
    run(model, canvas, attention_plan=plan, kv_cache=cache)
    assert seen == [10, 6, 6, 10]


def test_nothing_free_computes_nothing_twice():
    model, canvas = tiny_model(), make_canvas(torch.zeros(2, 6, dtype=torch.long))
    plan = AttentionPlan.from_canvas(canvas)
    cache = PrefixCache(plan, torch.zeros_like(canvas.is_free))
    first = run(model, canvas, kv_cache=cache, attention_plan=plan)
    assert torch.equal(run(model, canvas, kv_cache=cache, attention_plan=plan), first)


def test_a_cache_of_another_length_is_refused():
    model, canvas = tiny_model(), free_canvas(ORDERS["prefix"])
    cache = PrefixCache(AttentionPlan.from_canvas(canvas), canvas.is_free)
    run(model, canvas, kv_cache=cache)
    with pytest.raises(ConfigError, match="10 columns; got 6"):
        run(model, free_canvas([0] * 2 + [1] * 4), kv_cache=cache)
    with pytest.raises(ConfigError, match="shape"):
        PrefixCache(AttentionPlan.from_canvas(canvas), canvas.is_free[:, :4])


def test_enabling_records_the_choice():
    model, canvas = tiny_model(), free_canvas(ORDERS["prefix"])
    plan = AttentionPlan.from_canvas(canvas)
    assert not model.is_cache_enabled
    assert model.new_cache(plan, canvas.is_free) is None
    model.enable_cache(PrefixCacheConfig())
    assert model.is_cache_enabled
    assert isinstance(model.new_cache(plan, canvas.is_free), PrefixCache)
    with pytest.raises(ConfigError, match="disable_cache"):
        model.enable_cache(PrefixCacheConfig())
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
