"""The ancestral scheduler against laws computed by enumeration, with a perfect denoiser."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from multimodal_dlm.schedulers import AbsorbingAncestralScheduler
from tests.schedulers.registry import seeds_to_generators

COLUMNS, LENGTH = 3, 3
SEQUENCES = torch.tensor(list(itertools.product(range(COLUMNS), repeat=LENGTH)))
NUM_SAMPLES = 6_000


def joint() -> Tensor:
    """A joint law of three strongly dependent tokens, shape (27,), float64."""
    generator = torch.Generator().manual_seed(7)
    logits = 1.5 * torch.randn(len(SEQUENCES), generator=generator, dtype=torch.float64)
    return logits.softmax(dim=0)


def conditionals(sample: Tensor) -> Tensor:
    """The perfect denoiser: law of each token given the known ones, shape (batch, 3, 3)."""
    agrees = (sample[:, None] == SEQUENCES) | (sample[:, None] == COLUMNS)
    weights = joint() * agrees.all(dim=-1)
    one_hot = torch.nn.functional.one_hot(SEQUENCES, COLUMNS).to(torch.float64)
    mass = torch.einsum("bs,snv->bnv", weights, one_hot)
    return mass / weights.sum(dim=1)[:, None, None]


def cut_law(first_cut: dict[tuple[int, ...], float]) -> Tensor:
    """Law of a two-step run that reveals the set S first with probability `first_cut[S]`."""
    law = torch.zeros(len(SEQUENCES), dtype=torch.float64)
    marginals = conditionals(torch.full((1, LENGTH), COLUMNS))[0]
    for index, sequence in enumerate(SEQUENCES):
        for revealed, probability in first_cut.items():
            known = torch.full((1, LENGTH), COLUMNS)
            for position in revealed:
                known[0, position] = sequence[position]
                probability *= float(marginals[position, sequence[position]])
            rest = conditionals(known)[0]
            for position in set(range(LENGTH)) - set(revealed):
                probability *= float(rest[position, sequence[position]])
            law[index] += probability
    return law


def frequencies(scheduler: AbsorbingAncestralScheduler, num_steps: int) -> Tensor:
    """How often each sequence is drawn by runs with the perfect denoiser."""
    scheduler.set_timesteps(num_steps)
    sample = torch.full((NUM_SAMPLES, LENGTH), COLUMNS)
    is_free = torch.ones_like(sample, dtype=torch.bool)
    generators = seeds_to_generators(range(NUM_SAMPLES))
    state = scheduler.begin(sample, is_free, "toy")
    for timestep in scheduler.timesteps:
        logits = conditionals(sample).log()
        output = scheduler.step(
            logits, timestep, sample, state=state, is_free=is_free, generator=generators
        )
        sample = output.prev_sample
    index = (sample * torch.tensor([COLUMNS**2, COLUMNS, 1])).sum(dim=1)
    return torch.bincount(index, minlength=len(SEQUENCES)).to(torch.float64)


def chi_square_z(counts: Tensor, law: Tensor) -> float:
    """Chi-square statistic as a normal deviate (Wilson and Hilferty 1931)."""
    expected = law * counts.sum()
    freedom = len(law) - 1
    share = float(((counts - expected) ** 2 / expected).sum()) / freedom
    spread = 2.0 / (9.0 * freedom)
    return (share ** (1 / 3) - (1.0 - spread)) / math.sqrt(spread)


def make(counts: str = "planned", mask_schedule: str = "linear") -> AbsorbingAncestralScheduler:
    entry = {"temperature": 1.0, "mask_schedule": mask_schedule}
    return AbsorbingAncestralScheduler(modalities={"toy": entry}, counts=counts)


def test_as_many_steps_as_tokens_draw_from_the_joint_law():
    assert chi_square_z(frequencies(make(), LENGTH), joint()) < 3.1


@pytest.mark.parametrize("counts", ["planned", "binomial"])
def test_one_step_draws_from_the_product_of_marginals_and_not_from_the_joint(counts):
    found = frequencies(make(counts), 1)
    assert chi_square_z(found, cut_law({(0, 1, 2): 1.0})) < 3.1
    assert chi_square_z(found, joint()) > 10.0


def test_two_planned_steps_reveal_a_uniformly_random_pair_first():
    law = cut_law(dict.fromkeys(itertools.combinations(range(LENGTH), 2), 1 / 3))
    found = frequencies(make(), 2)
    assert chi_square_z(found, law) < 3.1
    assert chi_square_z(found, joint()) > 10.0


@pytest.mark.parametrize(("mask_schedule", "rate"), [("linear", 0.5), ("cosine", math.sqrt(0.5))])
def test_two_binomial_steps_reveal_each_position_with_its_probability(mask_schedule, rate):
    """P(reveal) = (alpha_s - alpha_t) / (1 - alpha_t) = 1 - rate; an empty cut takes one token."""
    cut = {}
    for size in range(1, LENGTH + 1):
        for revealed in itertools.combinations(range(LENGTH), size):
            cut[revealed] = (1 - rate) ** size * rate ** (LENGTH - size)
    for position in range(LENGTH):
        cut[(position,)] += rate**LENGTH / LENGTH
    found = frequencies(make("binomial", mask_schedule), 2)
    assert chi_square_z(found, cut_law(cut)) < 3.1


def test_many_binomial_steps_stay_between_the_joint_and_the_marginals():
    """Random cuts still draw some tokens in parallel: closer to the joint than one step is."""
    many = chi_square_z(frequencies(make("binomial"), 32), joint())
    assert many < 0.5 * chi_square_z(frequencies(make("binomial"), 1), joint())
