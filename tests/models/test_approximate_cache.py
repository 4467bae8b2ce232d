"""Approximate caches: which columns they compute, what refresh does, and what they cost."""

import pytest
import torch

from multimodal_dlm.errors import ConfigError
from multimodal_dlm.evaluation.cache_divergence import cache_divergence
from multimodal_dlm.models.approximate_cache import (
    DelayedCacheConfig,
    DualCacheConfig,
    FeatureCacheConfig,
    PrefixCacheConfig,
)
from multimodal_dlm.models.kv_cache import ExactCacheConfig
from tests.models.tiny import tiny_model
from tests.pipelines.test_cached_runs import ANSWER, CONDITION, Checked, make_canvas, run

CONFIGS = {
    "prefix": PrefixCacheConfig,
    "dual": DualCacheConfig,
    "delayed": DelayedCacheConfig,
    "feature": FeatureCacheConfig,
}


def full_canvas(model, lengths=(5, 3)):
    canvas = make_canvas(model.vocabulary, [0] * ANSWER, lengths)
    return canvas.replace(order=torch.zeros_like(canvas.order))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_refresh_at_every_forward_is_exact(name):
    """Everything computed each time: the exactness bound holds at every step, with guidance."""
    model = tiny_model().double()
    model.enable_cache(CONFIGS[name](refresh_interval=1))
    checked = Checked(model)
    output = run(checked, full_canvas(model), guidance=2.5)
    assert checked.num_compared == output.num_forwards


@pytest.mark.parametrize("name", CONFIGS)
def test_without_refresh_fewer_columns_are_computed_and_the_run_is_complete(name):
    model = tiny_model()
    canvas = full_canvas(model)
    config = CONFIGS[name](refresh_share=1.0, refresh_interval=None)
    model.enable_cache(config)
    columns = []
    model.blocks[0].register_forward_pre_hook(lambda _, x: columns.append(x[0].shape[1]))
    output = run(model, canvas)
    assert columns[0] == CONDITION + ANSWER
    assert max(columns[1:]) <= ANSWER
    assert not model.vocabulary.is_masked(output.canvas.input_ids).any()


def test_a_key_is_computed_again_when_enough_has_changed():
    """Six tokens and a share of a third: a change of three makes the condition old."""
    model = tiny_model()
    model.enable_cache(DualCacheConfig(refresh_share=0.34))
    columns = []
    model.blocks[0].register_forward_pre_hook(lambda _, x: columns.append(x[0].shape[1]))
    run(model, full_canvas(model, (5,)), settings={})
    whole = CONDITION + ANSWER
    assert columns == [whole, ANSWER, ANSWER, whole, ANSWER, ANSWER]


@pytest.mark.parametrize("conditioned", [True, False])
def test_divergence(conditioned):
    model = tiny_model()
    canvas = full_canvas(model)

    def measure(config):
        def finish(callback):
            return run(model, canvas, callback=callback)

        return cache_divergence(model, config, canvas, finish, noise_conditioning=conditioned)

    exact = measure(DualCacheConfig(refresh_interval=1))
    assert exact.kl_mean < 1e-8
    assert exact.argmax_agreement == 1.0
    assert exact.first_divergence is None
    rough = measure(DualCacheConfig(refresh_share=1.0))
    assert rough.kl_mean > 1e-6
    assert rough.kl_p95 >= rough.kl_mean * 0.5
    assert rough.num_positions == exact.num_positions > 12
    assert model.level_conditioning.kind == "ada_norm_single"
    assert not model.is_cache_enabled


def test_messages():
    with pytest.raises(ConfigError, match=r"`refresh_share` must be in \(0, 1\]; got 0"):
        DualCacheConfig(refresh_share=0.0)
    with pytest.raises(ConfigError, match="`refresh_interval` must be 1 or more; got 0"):
        DelayedCacheConfig(refresh_interval=0)
    with pytest.raises(ConfigError, match=r"`share` must be in \(0, 1\]; got 2"):
        FeatureCacheConfig(share=2.0)
    with pytest.raises(ConfigError, match="`num_prefixes` must be a whole number"):
        ExactCacheConfig(num_prefixes=-1)
