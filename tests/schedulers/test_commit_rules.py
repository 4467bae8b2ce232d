"""Commit rules against their definitions, and what they may and may not change in a run."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from multimodal_dlm.errors import ConfigError
from multimodal_dlm.schedulers import ConfidenceScheduler
from multimodal_dlm.schedulers.commit_rules import COMMIT_RULES, Candidates, get_commit_rule
from tests.schedulers.registry import logits_of, masked_start, run, seeds_to_generators

COLUMNS = 5


def candidates(probabilities, is_masked=None, place=(2, 3), memory=None):
    """Greedy candidates from a table of probabilities (batch, seq, columns)."""
    table = torch.tensor(probabilities, dtype=torch.float64)
    table = table if table.dim() == 3 else table[None]
    is_masked = torch.ones(table.shape[:2], dtype=torch.bool) if is_masked is None else is_masked
    logs = table.log()
    confidence = logs.amax(dim=-1).masked_fill(~is_masked, 0.0)
    return Candidates(is_masked, confidence, logs[is_masked], *place, memory or {})


def random_candidates(seed, length=6, sharpness=4.0):
    generator = torch.Generator().manual_seed(seed)
    logits = sharpness * torch.randn(3, length, COLUMNS, generator=generator, dtype=torch.float64)
    is_masked = torch.rand(3, length, generator=generator) < 0.8
    return candidates(logits.softmax(dim=-1).tolist(), is_masked), logits.log_softmax(dim=-1)


def test_threshold_by_hand():
    given_ = candidates([[0.95, 0.05], [0.89, 0.11], [0.5, 0.5]])
    assert get_commit_rule("threshold").threshold == 0.9
    assert get_commit_rule("threshold")(given_).is_sure.tolist() == [[True, False, False]]
    loose = get_commit_rule("threshold", threshold=0.6)
    assert loose(given_).is_sure.tolist() == [[True, True, False]]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), factor=st.sampled_from([0.5, 1.0, 2.0]))
def test_factor_takes_the_largest_n_that_keeps_the_bound(seed, factor):
    given_, logs = random_candidates(seed)
    found = get_commit_rule("factor", factor=factor)(given_).is_sure
    for row in range(3):
        positions = [i for i in range(6) if given_.is_masked[row, i]]
        positions.sort(key=lambda i: -logs[row, i].max().item())
        best = 0
        for n in range(1, len(positions) + 1):
            if math.exp(logs[row, positions[n - 1]].max().item()) >= 1 - factor / (n + 1):
                best = n
        assert {i for i in range(6) if found[row, i]} == set(positions[:best])


def test_what_the_factor_rule_commits_is_the_likeliest_joint():
    """Fast-dLLM's theorem on every joint law over two tokens of a grid, brute force."""
    rule = get_commit_rule("factor", factor=1.0)
    num_pairs = 0
    for weights in itertools.product(range(6), repeat=4):
        if sum(weights) == 0:
            continue
        joint = torch.tensor(weights, dtype=torch.float64).reshape(2, 2) / sum(weights)
        marginals = torch.stack([joint.sum(dim=1), joint.sum(dim=0)])
        sure = rule(candidates(marginals.tolist())).is_sure
        if not bool(sure.all()) or bool((marginals.max(dim=1).values == 2 / 3).any()):
            continue  # At exactly 2 / 3 two pairs may tie.
        num_pairs += 1
        first, second = marginals.argmax(dim=1).tolist()
        assert joint[first, second] == joint.max()
    assert num_pairs > 100


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), bound=st.sampled_from([0.05, 0.5, 2.0]))
def test_entropy_bound_takes_the_longest_prefix(seed, bound):
    given_, logs = random_candidates(seed)
    found = get_commit_rule("entropy_bound", bound=bound)(given_).is_sure
    entropies = -(logs.exp() * logs).sum(dim=-1)
    for row in range(3):
        positions = [i for i in range(6) if given_.is_masked[row, i]]
        positions.sort(key=lambda i: entropies[row, i].item())
        best = 0
        for n in range(1, len(positions) + 1):
            values = [entropies[row, i].item() for i in positions[:n]]
            if sum(values) - max(values) <= bound:
                best = n
        assert {i for i in range(6) if found[row, i]} == set(positions[:best])
        assert bool(found[row].any()) == bool(positions)


def test_entropy_of_impossible_columns_is_zero():
    given_ = candidates([[1.0, 0.0], [1.0, 0.0], [0.5, 0.5]])
    rule = get_commit_rule("entropy_bound", bound=0.1)
    assert rule(given_).is_sure.tolist() == [[True, True, True]]


def test_stability_needs_a_sure_token_that_has_stopped_moving():
    rule = get_commit_rule("stability", threshold=0.8, kl_bound=0.01, num_steps=2)
    still, unsure, moving = [0.95, 0.05], [0.6, 0.4], [[0.95, 0.05], [0.85, 0.15]]
    memory = {}
    for step in range(4):
        given_ = candidates([still, unsure, moving[step % 2]], memory=memory)
        selection = rule(given_)
        memory = selection.memory
        assert selection.is_sure.tolist() == [[step >= 2, False, False]]
    divergence = 0.95 * math.log(0.95 / 0.85) + 0.05 * math.log(0.05 / 0.15)
    assert divergence > 0.01
    assert memory["num_stable"].tolist() == [[3, 3, 0]]


def test_a_distribution_that_widens_is_not_stable():
    rule = get_commit_rule("stability", threshold=0.5, kl_bound=10.0, num_steps=1)
    first = rule(candidates([[1.0, 0.0]]))
    assert not bool(rule(candidates([[0.9, 0.1]], memory=first.memory)).is_sure.any())


def test_early_exit_commits_all_of_a_row_or_nothing():
    rule = get_commit_rule("early_exit", early=3.0, middle=2.0, late=1.0)
    clear, near = [0.9, 0.1], [0.6, 0.4]  # Gaps of 2.197 and 0.405 nats, mean 1.301.
    table = [[clear, near], [clear, clear]]
    assert not bool(rule(candidates(table, place=(1, 3))).is_sure.any())
    middle = rule(candidates(table, place=(2, 3))).is_sure
    assert middle.tolist() == [[False, False], [True, True]]
    assert bool(rule(candidates(table, place=(3, 3))).is_sure.all())
    masked = torch.tensor([[True, False], [True, True]])
    alone = rule(candidates(table, masked, place=(2, 3))).is_sure
    assert alone.tolist() == [[True, False], [True, True]]


def test_a_position_without_a_choice_does_not_end_the_run():
    rule = get_commit_rule("early_exit")
    flat = [0.25, 0.25, 0.25, 0.25]
    forced = [1.0, 0.0, 0.0, 0.0]
    for place in ((1, 3), (2, 3), (3, 3)):
        assert not bool(rule(candidates([forced, flat, flat], place=place)).is_sure.any())
        assert bool(rule(candidates([forced, forced], place=place)).is_sure.all())


@pytest.mark.parametrize("num_steps", [3, 6, 12, 24])
def test_the_thirds_of_a_run_are_thirds(num_steps):
    rule = get_commit_rule("early_exit", early=3.0, middle=2.0, late=1.0)
    gaps = (0.5, 1.5, 2.5)  # Sure in no third, in the last one, in the last two.
    counts = []
    for gap in gaps:
        table = [[1 / (1 + math.exp(-gap)), 1 / (1 + math.exp(gap))]]
        places = [(done, num_steps) for done in range(1, num_steps + 1)]
        counts.append(sum(bool(rule(candidates(table, place=p)).is_sure.all()) for p in places))
    assert counts == [0, num_steps // 3, 2 * num_steps // 3]


def test_a_token_that_was_taken_back_has_no_past():
    rule = get_commit_rule("stability", threshold=0.5, kl_bound=10.0, num_steps=1)
    known = torch.tensor([[False, True]])
    memory = rule(candidates([[0.5, 0.5], [0.9, 0.1]], known)).memory
    after = rule(candidates([[0.9, 0.1], [0.9, 0.1]], memory=memory))
    assert after.is_sure.tolist() == [[False, True]]


def test_a_sure_fill_that_is_held_back_takes_no_place_of_the_plan():
    """The plan takes two flat content tokens, the rule two peaked `<fill>`s that must wait."""
    table = torch.tensor(
        [[0.02, 0.01, 0.65, 0.11, 0.11, 0.10]] * 2 + [[0.0, 0.6, 0.0, 0.4, 0, 0]] * 2
    )
    options = {"eos_column": 0, "fill_column": 1}
    counts = []
    for rule in ({}, {"commit_rule": "entropy_bound", "commit_rule_options": {"bound": 1.0}}):
        scheduler = ConfidenceScheduler(modalities={"words": {**options, **rule}})
        scheduler.set_timesteps(2)
        sample, is_free = torch.full((1, 4), 6), torch.ones(1, 4, dtype=torch.bool)
        state = scheduler.begin(sample, is_free, "words")
        out = scheduler.step(
            table.clamp(min=1e-9).log()[None], 1.0, sample, state=state, is_free=is_free
        )
        counts.append(int(out.committed.sum()))
    assert counts[0] == 2
    assert counts[1] >= counts[0]


@pytest.mark.parametrize("name", COMMIT_RULES)
def test_a_run_follows_the_plan_or_is_ahead_of_it(name):
    """The plan is the least a step commits; a rule only adds, and so ends no later."""
    start, is_free = masked_start(4, 24, COLUMNS, 0.0, 3)

    def counts(rule):
        scheduler = ConfidenceScheduler(modalities={"codes": {"commit_rule": rule}})
        _, commits = run(
            scheduler, start, is_free, "codes",
            num_columns=COLUMNS, num_inference_steps=24, seeds=[1, 2, 3, 4],
        )  # fmt: skip
        return torch.stack([committed.sum(dim=1) for committed in commits])

    plan, ruled = counts(None), counts(name)
    assert bool((plan == 1).all())
    assert bool((ruled.cumsum(dim=0) >= plan.cumsum(dim=0)[: len(ruled)]).all())
    assert len(ruled) < len(plan)


@pytest.mark.parametrize("name", COMMIT_RULES)
def test_every_committed_token_was_sure_or_planned(name):
    scheduler = ConfidenceScheduler(modalities={"codes": {"commit_rule": name}})
    scheduler.set_timesteps(16)
    sample, is_free = masked_start(2, 16, COLUMNS, 0.0, 5)
    state = scheduler.begin(sample, is_free, "codes")
    rule, memory = get_commit_rule(name), {}
    for index, timestep in enumerate(scheduler.timesteps):
        is_masked = sample == COLUMNS
        if not bool(is_masked.any()):
            break
        logs = logits_of(sample, COLUMNS).log_softmax(dim=-1)
        confidence = logs.amax(dim=-1).masked_fill(~is_masked, 0.0)
        expected = rule(Candidates(is_masked, confidence, logs[is_masked], index + 1, 16, memory))
        memory = expected.memory
        out = scheduler.step(logs, timestep, sample, state=state, is_free=is_free)
        sample, state = out.prev_sample, out.state
        assert bool(out.committed[expected.is_sure].all())
        is_idle = ~expected.is_sure.any(dim=1)
        left_by_plan = 16 - (index + 1)
        due = (is_masked.sum(dim=1) - left_by_plan).clamp(min=1)
        assert bool((out.committed.sum(dim=1)[is_idle] == due[is_idle]).all())


def test_a_sure_answer_takes_one_forward_and_budgets_differ_by_modality():
    """In one canvas, each modality keeps its own rule."""
    modalities = {
        "words": {"commit_rule": "threshold", "commit_rule_options": {"threshold": 0.5}},
        "codes": {},
    }
    scheduler = ConfidenceScheduler(modalities=modalities)
    scheduler.set_timesteps(8)
    sample = torch.full((1, 8), COLUMNS)
    is_free = torch.ones(1, 8, dtype=torch.bool)
    logits = torch.zeros(1, 8, COLUMNS)
    logits[..., 2] = 9.0
    num = {}
    for modality in modalities:
        state = scheduler.begin(sample, is_free, modality)
        out = scheduler.step(logits, 1.0, sample, state=state, is_free=is_free)
        num[modality] = int(out.committed.sum())
    assert num == {"words": 8, "codes": 1}


def test_memory_moves_with_the_rows():
    options = {"commit_rule": "stability", "commit_rule_options": {"threshold": 0.3}}
    scheduler = ConfidenceScheduler(modalities={"codes": options})
    scheduler.set_timesteps(9)
    sample, is_free = masked_start(3, 9, COLUMNS, 0.0, 1)
    state = scheduler.begin(sample, is_free, "codes")
    out = scheduler.step(
        logits_of(sample, COLUMNS), 1.0, sample, state=state, is_free=is_free,
        generator=seeds_to_generators([1, 2, 3]),
    )  # fmt: skip
    moved = out.state.map_tensors(lambda tensor: tensor[[2]])
    assert set(moved.memory) == {"log_probabilities", "num_stable"}
    for name, tensor in out.state.memory.items():
        assert torch.equal(moved.memory[name][0], tensor[2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"commit_rule": "treshold"}, r"Unknown commit rule `treshold`.*`threshold`"),
        (
            {"commit_rule": "factor", "commit_rule_options": {"factors": 1.0}},
            r"option of commit rule `factor`:.*`factors`.*`factor`",
        ),
        (
            {"commit_rule": "threshold", "commit_rule_options": {"threshold": 1.5}},
            r"`threshold` must be a finite number in \(0, 1\]; got 1.5",
        ),
        (
            {"commit_rule": "stability", "commit_rule_options": {"num_steps": 0}},
            r"`num_steps` must be a whole number above 0; got 0",
        ),
        ({"commit_rule_options": {"bound": 1.0}}, r"`commit_rule_options` needs a `commit_rule`"),
        ({"commit_rule_options": None}, r"(?s)Modality `words`:.*commit_rule_options"),
    ],
)
def test_messages(options, message):
    with pytest.raises(ConfigError, match=message):
        ConfidenceScheduler(modalities={"words": options})
