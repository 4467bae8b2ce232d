"""Ancestral sampling by the posteriors, with the perfect denoiser, against the joint law."""

import itertools

import pytest
import torch
from torch import Tensor

from multimodal_dlm.diffusion.forward_process import ForwardProcess, get_forward_process
from tests.diffusion.oracle import Joint, chi_square_z

LENGTH = 3
CASES = [("absorbing", "linear"), ("absorbing", "cosine"), ("uniform", "linear")]


@pytest.fixture(scope="module")
def joint() -> Joint:
    return Joint(3, 3, 3, seed=7)


def reverse_steps(joint: Joint, process: ForwardProcess, num_steps: int):
    """All states (n, length), and per step the law of each token's next value, (n, length, states).

    Rows sum to one. Tokens of one step are drawn independently.
    """
    states = torch.tensor(list(itertools.product(range(process.num_states), repeat=LENGTH)))
    steps = []
    for i in range(num_steps):
        t, s = 1 - i / num_steps, max(0.0, 1 - (i + 1) / num_steps)
        if process.num_states == joint.num_columns:
            alpha = torch.full((len(states),), process.mask_schedule.alpha(t))
            clean = joint.uniform_denoiser(states, alpha).exp()
        else:
            clean = joint.absorbing_denoiser(states).exp()
        steps.append(process.posterior(clean, states, s, t))
    return states, steps


def start_law(process: ForwardProcess, states: Tensor) -> Tensor:
    return process.stationary()[states].prod(dim=1)


def final_law(joint: Joint, process: ForwardProcess, num_steps: int) -> Tensor:
    """Exact law of the sampler's result, by propagating the law of all states."""
    states, steps = reverse_steps(joint, process, num_steps)
    law = start_law(process, states)
    places = torch.arange(LENGTH)
    for step in steps:
        kernel = step[:, places, states].prod(dim=-1)  # [from, to]
        law = law @ kernel
    clean = (states < joint.num_columns).all(dim=1)
    assert float(law[~clean].sum()) == 0.0
    return law[clean]


def divergence(joint: Joint, law: Tensor) -> float:
    assert float(law.sum()) == pytest.approx(1.0, abs=1e-9)
    return float((joint.probs * (joint.probs / law).log()).sum())


@pytest.mark.parametrize(("name", "mask_schedule"), CASES)
def test_the_sampler_tends_to_the_joint_law(joint, name, mask_schedule):
    """What is left is the error of parallel draws, and it falls like 1 / steps."""
    process = get_forward_process(name, num_columns=3, mask_schedule=mask_schedule)
    gaps = [divergence(joint, final_law(joint, process, steps)) for steps in (1, 16, 64)]
    assert gaps[0] > 0.05
    assert gaps[2] < 0.35 * gaps[1] < 0.35 * gaps[0]
    assert gaps[2] < 0.02


def test_one_step_draws_the_product_of_the_marginals(joint):
    process = get_forward_process("absorbing", num_columns=3)
    marginals = joint.absorbing_denoiser(torch.full((1, LENGTH), 3)).exp()[0]
    product = marginals[torch.arange(LENGTH), joint.sequences].prod(dim=1)
    torch.testing.assert_close(final_law(joint, process, 1), product)


@pytest.mark.parametrize(("name", "mask_schedule"), CASES)
def test_samples_pass_a_chi_square_test(joint, name, mask_schedule):
    num_samples, num_steps = 3000, 400
    process = get_forward_process(name, num_columns=3, mask_schedule=mask_schedule)
    states, steps = reverse_steps(joint, process, num_steps)
    generator = torch.Generator().manual_seed(11)
    powers = process.num_states ** torch.arange(LENGTH - 1, -1, -1)
    index = torch.multinomial(
        start_law(process, states), num_samples, replacement=True, generator=generator
    )
    for step in steps:
        law = step[index].flatten(0, 1)
        drawn = torch.multinomial(law, 1, generator=generator).view(num_samples, LENGTH)
        index = (drawn * powers).sum(dim=1)
    clean_index = (states[index] * 3 ** torch.arange(LENGTH - 1, -1, -1)).sum(dim=1)
    counts = torch.bincount(clean_index, minlength=len(joint.sequences)).double()
    assert abs(chi_square_z(counts, joint.probs)) < 3.1
    one_step = torch.multinomial(
        final_law(joint, process, 1), num_samples, replacement=True, generator=generator
    )
    coarse = torch.bincount(one_step, minlength=len(joint.sequences)).double()
    assert chi_square_z(coarse, joint.probs) > 10.0


def test_first_hitting_draws_the_joint_law_exactly(joint):
    """One token at a time in any order: the absorbing process without parallel draws.

    Zheng et al. 2024 (arXiv 2409.02908).
    """
    orders = list(itertools.permutations(range(LENGTH)))
    law = torch.zeros(len(joint.sequences), dtype=torch.float64)
    for order in orders:
        known = torch.full_like(joint.sequences, 3)
        probability = torch.ones(len(joint.sequences), dtype=torch.float64)
        for place in order:
            conditional = joint.absorbing_denoiser(known).exp()[:, place]
            probability *= conditional.gather(1, joint.sequences[:, place, None])[:, 0]
            known[:, place] = joint.sequences[:, place]
        law += probability / len(orders)
    torch.testing.assert_close(law, joint.probs)
