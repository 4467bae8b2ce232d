"""Approximate caches: which columns they compute, what refresh does, and what they cost."""

import pytest
import torch

from multimodal_dlm.canvas import noise_levels
from multimodal_dlm.errors import ConfigError
from multimodal_dlm.evaluation.cache_divergence import CacheDivergence, cache_divergence
from multimodal_dlm.models.approximate_cache import (
    ConfidenceCacheConfig,
    DelayedCacheConfig,
    DualCacheConfig,
    FeatureCacheConfig,
    PrefixCacheConfig,
)
from multimodal_dlm.models.attention_plan import AttentionPlan
from multimodal_dlm.models.cache_base import previous_columns
from multimodal_dlm.models.kv_cache import ExactCacheConfig
from multimodal_dlm.models.transformer import previous_states
from multimodal_dlm.pipelines.guidance import classifier_free
from tests.models.tiny import tiny_model
from tests.pipelines.test_cached_runs import (
    ANSWER,
    CONDITION,
    Checked,
    make_canvas,
    run,
    without_condition,
)

CONFIGS = {
    "prefix": PrefixCacheConfig,
    "dual": DualCacheConfig,
    "delayed": DelayedCacheConfig,
    "feature": FeatureCacheConfig,
    "confidence": ConfidenceCacheConfig,
}
KEEP = {"refresh_share": 1.0, "refresh_interval": None}  # Nothing becomes old.


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


@pytest.mark.parametrize(
    ("config", "kept"), [(PrefixCacheConfig, (6, 3)), (DualCacheConfig, (3, 3))]
)
def test_another_block_begins_with_a_full_forward(config, kept):
    """Blocks of three of a window of six, two forwards each."""
    model = tiny_model()
    canvas = full_canvas(model, (5,))
    model.enable_cache(config(refresh_share=1.0))
    plan = AttentionPlan.from_canvas(canvas)
    cache = model.new_cache(plan, canvas.is_free)
    columns = []
    model.blocks[0].register_forward_pre_hook(lambda _, x: columns.append(x[0].shape[1]))
    free = canvas.is_free[0].nonzero().flatten().tolist()
    for block in (free[:3], free[:3], free[3:], free[3:]):
        cache.read(block)
        model(
            canvas.input_ids,
            noise_levels=noise_levels(canvas, model.vocabulary),
            modality_ids=canvas.modality_ids,
            position_ids=canvas.position_ids,
            attention_plan=plan,
            kv_cache=cache,
        )
    whole = CONDITION + ANSWER
    assert columns == [whole, kept[0], whole, kept[1]]


class Watched:
    """A backbone that notes the ids and states of each forward and the columns computed for it."""

    def __init__(self, model):
        self.model, self.seen, self.columns = model, [], []
        model.blocks[0].register_forward_pre_hook(lambda _, x: self.columns.append(x[0].shape[1]))

    def __getattr__(self, name):
        return getattr(self.model, name)

    def __call__(self, ids, **inputs):
        output = self.model(ids, **inputs)
        self.seen.append((ids, output.hidden_states.clone()))
        return output


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("threshold", [0.0, 0.2])
def test_masks_with_a_likely_proposal_and_known_tokens_keep_their_states(threshold, shift):
    """The states a forward returns are those last computed, so they say what is kept next."""
    model = tiny_model(logits_shift=shift)
    canvas = full_canvas(model)
    vocabulary = model.vocabulary
    model.enable_cache(ConfidenceCacheConfig(threshold=threshold, **KEEP))
    watched = Watched(model)
    run(watched, canvas)
    sources = previous_columns(canvas.is_padding)
    kept = unsure = 0
    for (before, old), (now, new), count in zip(
        watched.seen, watched.seen[1:], watched.columns[1:], strict=False
    ):
        read = previous_states(old, canvas.is_padding) if shift else old
        probability = model.compute_logits(read, "text").softmax(-1).amax(-1)
        is_unsure = vocabulary.is_masked(now) & (probability <= threshold)
        is_open = (is_unsure | (now != before)).any(dim=0)
        if shift:
            is_open[sources[is_unsure]] = True
        assert count == int(is_open.sum())
        if not shift:
            assert torch.equal(new[:, ~is_open], old[:, ~is_open])
        kept += int((vocabulary.is_masked(now).any(dim=0) & ~is_open).sum())
        unsure += int(is_unsure.sum())
    assert kept
    assert bool(unsure) == (threshold > 0)


@pytest.mark.parametrize("shift", [0, 1])
def test_a_threshold_that_admits_nothing_is_exact(shift):
    """A threshold of 1: every column at every forward, finished rows left out, the ids equal."""
    model = tiny_model(logits_shift=shift).double()
    canvas = full_canvas(model, (5, 3, 4))
    ids = canvas.input_ids.clone()
    ids[0, CONDITION + 1 :] = model.vocabulary.columns("text").start + 4  # One token to write.
    ids[1, CONDITION + 3 :] = model.vocabulary.columns("text").start + 5
    canvas = canvas.replace(input_ids=ids)
    expected = run(model, canvas, guidance=2.5)
    model.enable_cache(ConfidenceCacheConfig(threshold=1.0, **KEEP))
    checked = Checked(model)
    found = run(checked, canvas, guidance=2.5)
    assert torch.equal(found.canvas.input_ids, expected.canvas.input_ids)
    assert checked.num_compared >= found.num_forwards == expected.num_forwards
    rows = [count for count, _ in checked.columns]
    assert rows[0] == 3 * rows[-1]
    assert {columns for _, columns in checked.columns} <= {CONDITION + ANSWER, 4 + ANSWER}


def test_rows_that_are_left_take_their_proposals_with_them():
    """After the first forward, which computes all, a row goes on as it would alone."""
    model = tiny_model()
    model.enable_cache(ConfidenceCacheConfig(threshold=0.25, **KEEP))
    canvas = full_canvas(model, (5, 5, 5))

    def forward(cache, part):
        plan = AttentionPlan.from_canvas(part)
        levels = noise_levels(part, model.vocabulary)
        inputs = {"position_ids": part.position_ids, "modality_ids": part.modality_ids}
        model(part.input_ids, noise_levels=levels, attention_plan=plan, kv_cache=cache, **inputs)

    counts = set()
    for row in range(3):
        part = canvas.select_rows(torch.tensor([row]))
        alone = model.new_cache(AttentionPlan.from_canvas(part), part.is_free)
        together = model.new_cache(AttentionPlan.from_canvas(canvas), canvas.is_free)
        forward(alone, part)
        forward(together, canvas)
        together.select_rows(torch.tensor([row]))
        forward(alone, part)
        forward(together, part)
        assert together.num_columns_computed == alone.num_columns_computed
        counts.add(alone.num_columns_computed)
    assert len(counts) > 1


@pytest.mark.parametrize("conditioned", [True, False])
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_divergence(conditioned, guidance):
    model = tiny_model()
    canvas = full_canvas(model)
    builder = classifier_free(without_condition(model.vocabulary), guidance)
    found = cache_divergence(
        model,
        {
            "always": DualCacheConfig(refresh_interval=1),
            "nothing": ConfidenceCacheConfig(threshold=1.0),
            "rough": DualCacheConfig(refresh_share=1.0),
            "anything": ConfidenceCacheConfig(threshold=0.0, **KEEP),
        },
        canvas,
        lambda callback: run(model, canvas, guidance=guidance, callback=callback),
        branches=builder,
        noise_conditioning=conditioned,
    )
    for name in ("always", "nothing"):
        assert found[name].kl_mean < 1e-8
        assert found[name].argmax_agreement == 1.0
        assert found[name].first_divergences == (None,)
    for name in ("rough", "anything"):
        assert found[name].kl_mean > 1e-6
        assert found[name].kl_p95 >= found[name].kl_mean * 0.5
        assert found[name].num_positions == found["always"].num_positions > 12
    assert found["anything"].first_divergences != (None,)
    both = CacheDivergence.join([found["always"], found["rough"]])
    assert both.kl_mean == pytest.approx(found["rough"].kl_mean / 2, rel=1e-4)
    assert len(both.first_divergences) == 2
    assert model.level_conditioning.kind == "ada_norm_single"
    assert not model.is_cache_enabled


def test_guidance_makes_divergences_larger():
    """The guided logits are what is compared: by each branch's own cache, weighted."""
    model = tiny_model()
    canvas = full_canvas(model)

    def measure(guidance):
        builder = classifier_free(without_condition(model.vocabulary), guidance)
        return cache_divergence(
            model,
            {"rough": DualCacheConfig(refresh_share=1.0)},
            canvas,
            lambda callback: run(model, canvas, callback=callback),  # The same states.
            branches=builder,
        )["rough"].kl_mean

    assert measure(8.0) > 1.5 * measure(1.0)


def test_messages():
    with pytest.raises(ConfigError, match=r"`refresh_share` must be in \(0, 1\]; got 0"):
        DualCacheConfig(refresh_share=0.0)
    with pytest.raises(ConfigError, match="`refresh_interval` must be 1 or more; got 0"):
        DelayedCacheConfig(refresh_interval=0)
    with pytest.raises(ConfigError, match=r"`share` must be in \(0, 1\]; got 2"):
        FeatureCacheConfig(share=2.0)
    with pytest.raises(ConfigError, match="`num_prefixes` must be a whole number"):
        ExactCacheConfig(num_prefixes=-1)
    with pytest.raises(ConfigError, match=r"`threshold` must be in \[0, 1\]; got 1.5"):
        ConfidenceCacheConfig(threshold=1.5)
    model = tiny_model()
    model.enable_cache(ConfidenceCacheConfig())
    canvas = full_canvas(model)
    plan = AttentionPlan.from_canvas(canvas)
    with pytest.raises(ConfigError, match="`modality_ids` must be given with a cache that looks"):
        model(
            canvas.input_ids,
            noise_levels=noise_levels(canvas, model.vocabulary),
            position_ids=canvas.position_ids,
            attention_plan=plan,
            kv_cache=model.new_cache(plan, canvas.is_free),
        )


def test_the_token_a_mask_is_predicted_from_is_computed_with_it():
    """With shifted logits a computed mask is read from the state before it."""
    model = tiny_model(logits_shift=1)
    canvas = full_canvas(model, (5,))
    sources = previous_columns(canvas.is_padding)
    model.enable_cache(DelayedCacheConfig(**KEEP))
    watched = Watched(model)
    opened = []
    make = model.new_cache
    watched.new_cache = lambda *parts: opened.append(make(*parts)) or opened[-1]
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda *_: seen.append(opened[-1]._open.clone()))
    run(watched, canvas)
    for (ids, _), columns in zip(watched.seen[1:], seen[1:], strict=True):
        is_open = torch.zeros(canvas.length, dtype=torch.bool)
        is_open[columns] = True
        is_masked = model.vocabulary.is_masked(ids)[0] & canvas.is_free[0]
        assert is_open[is_masked].all()
        assert is_open[sources[0, is_masked]].all()
