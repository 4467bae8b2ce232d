"""Step plans: the error identity by enumeration, the optimum by trying all plans, the scheduler."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from multimodal_dlm.errors import ConfigError
from multimodal_dlm.schedulers import AbsorbingAncestralScheduler, ConfidenceScheduler
from multimodal_dlm.schedulers.step_plan import (
    check_profile,
    interpolate_profile,
    parallel_error,
    plan_steps,
)
from tests.schedulers.registry import masked_start, run


def joint_law(seed=0):
    """A random, strongly dependent joint law over four tokens of three values."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2.5 * torch.randn((3,) * 4, generator=generator, dtype=torch.float64)
    return logits.flatten().softmax(dim=0).reshape((3,) * 4)


def entropy(joint, kept):
    """Entropy of the marginal over some axes."""
    others = [axis for axis in range(joint.dim()) if axis not in kept]
    marginal = joint.sum(dim=others) if others else joint
    return float(torch.special.entr(marginal).sum())


def measured_profile(joint):
    """h(j): mean over sets R of j tokens and i outside R of H(X_i | X_R)."""
    n = joint.dim()
    profile = []
    for j in range(n):
        values = [
            entropy(joint, (*known, i)) - entropy(joint, known)
            for known in itertools.combinations(range(n), j)
            for i in range(n)
            if i not in known
        ]
        profile.append(sum(values) / len(values))
    return profile


def enumerated_kl(joint, sizes):
    """Mean over all orders of KL(p || q), q drawing each group from products of conditionals."""
    n = joint.dim()
    total = 0.0
    for order in itertools.permutations(range(n)):
        kl, known = -entropy(joint, tuple(range(n))), ()
        for size in sizes:
            group = order[len(known) : len(known) + size]
            # E_p of -log q is the sum of the conditional entropies of the group's tokens.
            kl += sum(entropy(joint, (*known, i)) - entropy(joint, known) for i in group)
            known = (*known, *group)
        total += kl
    return total / math.factorial(n)


@pytest.mark.parametrize("sizes", [(4,), (1, 3), (3, 1), (2, 2), (1, 1, 2), (1, 1, 1, 1)])
def test_the_error_is_the_expected_divergence(sizes):
    joint = joint_law()
    assert parallel_error(measured_profile(joint), sizes) == pytest.approx(
        enumerated_kl(joint, sizes), abs=1e-12
    )


def test_one_step_costs_the_total_correlation_and_single_tokens_nothing():
    joint = joint_law(1)
    profile = measured_profile(joint)
    correlation = sum(entropy(joint, (i,)) for i in range(4)) - entropy(joint, (0, 1, 2, 3))
    assert correlation > 0.1
    assert parallel_error(profile, (4,)) == pytest.approx(correlation, abs=1e-12)
    assert parallel_error(profile, (1, 1, 1, 1)) == pytest.approx(0.0, abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    profile=st.lists(st.floats(0.0, 9.0), min_size=2, max_size=9),
    num_tokens=st.integers(1, 9),
    num_steps=st.integers(1, 9),
)
def test_no_plan_is_better(profile, num_tokens, num_steps):
    sizes = plan_steps(profile, num_tokens, num_steps)
    assert sum(sizes) == num_tokens
    assert len(sizes) == min(num_steps, num_tokens)
    assert min(sizes) >= 1
    entropies = interpolate_profile(profile, num_tokens)
    cuts = itertools.combinations(range(1, num_tokens), len(sizes) - 1)
    plans = [np.diff([0, *cut, num_tokens]).tolist() for cut in cuts]
    best = min(parallel_error(entropies, plan) for plan in plans)
    assert parallel_error(entropies, sizes) == pytest.approx(best, abs=1e-9)


def test_a_falling_profile_begins_with_small_steps():
    profile = [7.0 / (1 + 8 * share) for share in np.linspace(0, 1, 33).tolist()]
    sizes = plan_steps(profile, 64, 8)
    assert list(sizes) == sorted(sizes)
    assert sizes[0] < sizes[-1]
    entropies = interpolate_profile(profile, 64)
    cosine = np.diff(np.floor(64 * (1 - np.sin(np.pi * np.linspace(1, 0, 9) / 2)) + 1e-9))
    for other in ([8] * 8, cosine.astype(int).tolist()):
        assert sum(other) == 64
        assert parallel_error(entropies, sizes) < parallel_error(entropies, other)


@pytest.mark.parametrize("cls", [ConfidenceScheduler, AbsorbingAncestralScheduler])
def test_the_scheduler_commits_what_the_plan_says(cls):
    profile = [6.0, 2.0, 1.0, 0.8]
    scheduler = cls(modalities={"codes": {"temperature": 1.0, "step_profile": profile}})
    assert scheduler.config.modalities["codes"]["step_profile"] == profile
    start, is_free = masked_start(3, 30, 5, 0.4, 0)
    _, commits = run(
        scheduler, start, is_free, "codes",
        num_columns=5, num_inference_steps=6, seeds=[1, 2, 3],
    )  # fmt: skip
    counts = torch.stack([committed.sum(dim=1) for committed in commits]).T.tolist()
    for row, found in zip(is_free, counts, strict=True):
        num_free = int(row.sum())
        assert tuple(found) == plan_steps(profile, num_free, 6, num_known=30 - num_free)


def test_a_profile_that_rises_by_chance_is_made_non_increasing():
    assert interpolate_profile([3.0, 1.0, 2.0, 0.5], 4).tolist() == [3.0, 1.5, 1.5, 0.5]
    assert interpolate_profile([1.0, 2.0, 3.0], 3).tolist() == [2.0, 2.0, 2.0]
    entropies = interpolate_profile([1.0, 0.5, 2.0], 8)
    assert parallel_error(entropies, plan_steps([1.0, 0.5, 2.0], 8, 2)) >= 0


def test_known_tokens_move_the_plan_along_the_profile():
    """The best plan for the second half of a window is the best on the second half of h."""
    profile = [7.0 / (1 + 8 * share) for share in np.linspace(0, 1, 33).tolist()]
    entropies = interpolate_profile(profile, 24)[12:]
    cuts = itertools.combinations(range(1, 12), 3)
    best = min(parallel_error(entropies, np.diff([0, *cut, 12]).tolist()) for cut in cuts)
    sizes = plan_steps(profile, 12, 4, num_known=12)
    assert parallel_error(entropies, sizes) == pytest.approx(best, abs=1e-9)
    assert sizes != plan_steps(profile, 12, 4)


def test_drawn_counts_and_a_plan_exclude_each_other():
    with pytest.raises(ConfigError, match=r"`counts` is `binomial`.*\['codes'\]"):
        AbsorbingAncestralScheduler(
            modalities={"codes": {"step_profile": [2.0, 1.0]}}, counts="binomial"
        )


def test_a_time_window_has_its_own_number_of_steps():
    profile = [6.0, 2.0, 1.0, 0.8]
    options = {"step_profile": profile, "start": 0.75, "stop": 0.25}
    scheduler = ConfidenceScheduler(modalities={"codes": options})
    start, is_free = masked_start(1, 30, 5, 0.0, 0)
    _, commits = run(
        scheduler, start, is_free, "codes", num_columns=5, num_inference_steps=8, seeds=[1]
    )
    counts = [int(committed.sum()) for committed in commits]
    assert counts == [0, 0, *plan_steps(profile, 30, 4)]


@pytest.mark.parametrize("profile", [[1.0], [1.0, -0.5], [1.0, float("nan")], "steep", [1, "2"]])
def test_profiles_are_checked(profile):
    with pytest.raises(ConfigError, match=r"`step_profile` must be a list of 2 or more finite"):
        check_profile(profile)


def test_a_wrong_profile_is_refused_by_the_config():
    with pytest.raises(ConfigError, match=r"Modality `codes`: `step_profile` must be a list of 2"):
        ConfidenceScheduler(modalities={"codes": {"step_profile": [1.0]}})


def test_sizes_must_sum_to_the_number_of_tokens():
    with pytest.raises(ConfigError, match=r"`sizes` must sum to the number of tokens, 3; got"):
        parallel_error([3.0, 2.0, 1.0], (1, 1))
