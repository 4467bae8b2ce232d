"""Likelihood estimates against the exact likelihood of an enumerable law of two modalities."""

import pytest
import torch

from multimodal_dlm.diffusion.forward_process import UniformProcess
from multimodal_dlm.diffusion.likelihood import (
    LikelihoodEstimate,
    chain_nelbo,
    denoiser_scorer,
    enumerated_nelbo,
    enumerated_square,
    mean_estimate,
    monte_carlo_nelbo,
    monte_carlo_uniform_nelbo,
)
from multimodal_dlm.errors import ConfigError
from tests.diffusion.oracle import Joint, perturb

TEXT = torch.tensor([True, True, False, False])
PICTURE = ~TEXT
BOTH = torch.ones(4, dtype=torch.bool)


@pytest.fixture(scope="module")
def joint() -> Joint:
    """Two text tokens of three values, then two picture tokens of two."""
    return Joint(3, 3, 2, 2, seed=5, scale=2.5)


def scorer_of(joint: Joint, denoiser, sequence):
    return denoiser_scorer(denoiser, sequence, num_columns=joint.num_columns)


BOUNDS = {
    "diagonal": lambda scorer: enumerated_nelbo(scorer, BOTH),
    "chain, text first": lambda scorer: chain_nelbo(scorer, TEXT, PICTURE),
    "chain, picture first": lambda scorer: chain_nelbo(scorer, PICTURE, TEXT),
}


@pytest.mark.parametrize("bound", BOUNDS)
def test_with_the_perfect_denoiser_each_row_gets_its_exact_likelihood(joint, bound):
    """Stronger than the mean: the any-order bound is tight for every row."""
    total = 0.0
    for sequence, probability in zip(joint.sequences, joint.probs, strict=True):
        estimate = BOUNDS[bound](scorer_of(joint, joint.absorbing_denoiser, sequence))
        assert estimate.value == pytest.approx(-float(probability.log()), abs=1e-10)
        assert estimate.low == estimate.high == estimate.value
        assert estimate.is_bound
        total += float(probability) * estimate.value
    assert total == pytest.approx(joint.entropy, abs=1e-10)


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("size", [0.05, 1.0])
def test_no_bound_falls_below_the_entropy_for_a_wrong_denoiser(joint, bound, seed, size):
    wrong = perturb(joint.absorbing_denoiser, seed, size)
    mean = sum(
        float(probability) * BOUNDS[bound](scorer_of(joint, wrong, sequence)).value
        for sequence, probability in zip(joint.sequences, joint.probs, strict=True)
    )
    assert mean > joint.entropy


def test_the_independent_square_is_no_joint_bound():
    """It says so, and here is why: the perfect denoiser takes it below the entropy.

    Two text and three picture tokens that mostly agree: each modality tells the other the same.
    """
    joint = Joint(3, 3, 2, 2, 2, seed=5, scale=1.0)
    agree = (joint.sequences.clamp(max=1).diff(dim=1) == 0).all(dim=1)
    joint.probs = joint.probs * torch.where(agree, 1000.0, 1.0)
    joint.probs = joint.probs / joint.probs.sum()
    is_text = torch.arange(5) < 2
    square, chain = 0.0, 0.0
    for sequence, probability in zip(joint.sequences, joint.probs, strict=True):
        scorer = scorer_of(joint, joint.absorbing_denoiser, sequence)
        estimate = enumerated_square(scorer, is_text, ~is_text)
        assert not estimate.is_bound
        square += float(probability) * estimate.value
        chain += float(probability) * chain_nelbo(scorer, is_text, ~is_text).value
    assert square < joint.entropy - 0.05
    assert chain == pytest.approx(joint.entropy, abs=1e-10)


def test_the_square_equals_sampling_both_counts(joint, generator):
    scorer = scorer_of(joint, joint.absorbing_denoiser, joint.sequences[7])
    counts = torch.randint(1, 3, (2, 20_000), generator=generator)
    parts = []
    for count, is_free in zip(counts, (TEXT, PICTURE), strict=True):
        ranks = torch.rand(20_000, 4, generator=generator).masked_fill(~is_free, 2).argsort(dim=1)
        parts.append(ranks.argsort(dim=1) < count[:, None])
    nll = scorer(parts[0] | parts[1])
    values = sum(
        2 / count * nll.masked_fill(~part, 0.0).sum(dim=1)
        for count, part in zip(counts, parts, strict=True)
    )
    exact = enumerated_square(scorer, TEXT, PICTURE).value
    assert float(values.mean()) == pytest.approx(exact, abs=4 * float(values.std()) / 20_000**0.5)


def test_conditionals_are_scored_at_the_corners(joint):
    """Text given the picture masked is the marginal; given it clean, the conditional."""
    sequence = joint.sequences[10]
    scorer = scorer_of(joint, joint.absorbing_denoiser, sequence)
    agrees = (joint.sequences == sequence)[:, TEXT].all(dim=1)
    marginal = -float(joint.probs[agrees].sum().log())
    total = -float(joint.probs[10].log())
    hidden = enumerated_nelbo(scorer, TEXT, is_hidden=PICTURE)
    assert hidden.value == pytest.approx(marginal, abs=1e-10)
    given_text = enumerated_nelbo(scorer, PICTURE)
    assert given_text.value == pytest.approx(total - marginal, abs=1e-10)


@pytest.mark.parametrize("num_draws", [2, 8, 200])
def test_sampling_is_unbiased_and_its_error_is_honest(joint, num_draws):
    wrong = perturb(joint.absorbing_denoiser, 1, 1.0)
    scorer = scorer_of(joint, wrong, joint.sequences[3])
    exact = enumerated_nelbo(scorer, BOTH).value
    generator = torch.Generator().manual_seed(num_draws)
    estimates = [
        monte_carlo_nelbo(scorer, BOTH, num_draws=num_draws, generator=generator)
        for _ in range(300)
    ]
    values = torch.tensor([estimate.value for estimate in estimates], dtype=torch.float64)
    spread = float(values.std())
    assert float(values.mean()) == pytest.approx(exact, abs=4 * spread / 300**0.5)
    claimed = torch.tensor([estimate.standard_error for estimate in estimates]).square().mean()
    assert float(claimed.sqrt()) == pytest.approx(spread, rel=0.2)
    assert all(estimate.is_bound and estimate.num_draws == num_draws for estimate in estimates)
    if num_draws == 200:
        covered = [estimate.low <= exact <= estimate.high for estimate in estimates]
        assert 0.90 <= sum(covered) / 300 <= 0.99


def test_two_draws_a_length_take_every_count_twice(joint, generator):
    seen = []

    def scorer(is_masked):
        seen.append(is_masked.sum(dim=1))
        return torch.zeros(is_masked.shape)

    monte_carlo_nelbo(scorer, BOTH, num_draws=8, generator=generator)
    assert sorted(torch.cat(seen).tolist()) == [1, 1, 2, 2, 3, 3, 4, 4]


def test_the_chain_can_be_sampled(joint):
    scorer = scorer_of(joint, joint.absorbing_denoiser, joint.sequences[20])
    generator = torch.Generator().manual_seed(0)
    estimate = chain_nelbo(scorer, TEXT, PICTURE, num_draws=400, generator=generator)
    assert estimate.num_draws == 800
    assert estimate.value == pytest.approx(
        -float(joint.probs[20].log()), abs=4 * estimate.standard_error + 1e-9
    )
    with pytest.raises(ConfigError, match="`generator` must be given with `num_draws`"):
        chain_nelbo(scorer, TEXT, PICTURE, num_draws=4)


def test_the_uniform_process_is_bounded_by_sampling():
    joint = Joint(3, 3, seed=2)
    process = UniformProcess(num_columns=3, mask_schedule="cosine")

    def denoiser(columns, t):
        return joint.uniform_denoiser(columns, process.mask_schedule.alpha(t))

    generator = torch.Generator().manual_seed(0)
    estimates = [
        monte_carlo_uniform_nelbo(denoiser, row, process, num_draws=2000, generator=generator)
        for row in joint.sequences
    ]
    mean = sum(float(p) * e.value for p, e in zip(joint.probs, estimates, strict=True))
    variance = sum(
        (float(p) * e.standard_error) ** 2 for p, e in zip(joint.probs, estimates, strict=True)
    )
    assert mean == pytest.approx(joint.entropy, abs=4 * variance**0.5)
    assert 0 < variance**0.5 < 0.1
    assert all(estimate.is_bound for estimate in estimates)


def test_rows_are_averaged_with_the_spread_between_them():
    rows = [LikelihoodEstimate(value, 0.0, 3, True) for value in (1.0, 2.0, 3.0, 6.0)]
    mean = mean_estimate(rows)
    assert mean.value == 3.0
    assert mean.standard_error == pytest.approx((14 / 3) ** 0.5 / 2)
    assert (mean.num_draws, mean.is_bound) == (12, True)
    assert mean.high - mean.value == pytest.approx(1.96 * mean.standard_error, rel=1e-3)
    assert not mean_estimate([*rows, LikelihoodEstimate(0.0, 0.0, 1, False)]).is_bound
    chained = rows[0].chain(LikelihoodEstimate(2.0, 0.4, 1, False))
    assert (chained.value, chained.standard_error, chained.is_bound) == (3.0, 0.4, False)


def test_wrong_arguments_are_explained(joint, generator):
    scorer = scorer_of(joint, joint.absorbing_denoiser, joint.sequences[0])
    nothing = torch.zeros(4, dtype=torch.bool)
    with pytest.raises(ConfigError, match="1 to 16 free positions; got 17.*monte_carlo_nelbo"):
        enumerated_nelbo(scorer, torch.ones(17, dtype=torch.bool))
    with pytest.raises(ConfigError, match="got 0"):
        enumerated_nelbo(scorer, nothing)
    with pytest.raises(ConfigError, match="at least one position; got none"):
        monte_carlo_nelbo(scorer, nothing, num_draws=4, generator=generator)
    with pytest.raises(ConfigError, match="must not share positions; got 2"):
        enumerated_nelbo(scorer, BOTH, is_hidden=TEXT)
    for num_draws in (0, 3):
        with pytest.raises(ConfigError, match=f"even and at least 2; got {num_draws}"):
            monte_carlo_nelbo(scorer, BOTH, num_draws=num_draws, generator=generator)
    with pytest.raises(ConfigError, match="at least 2 rows; got 1"):
        mean_estimate([LikelihoodEstimate(1.0, 0.0, 1, True)])
