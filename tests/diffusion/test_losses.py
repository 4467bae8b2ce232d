"""Cross-entropy in chunks equals the dense one; NELBO rates integrate to the entropy."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from multimodal_dlm.diffusion.losses import (
    absorbing_nelbo_rate,
    exact_count_nelbo,
    nelbo_by_modality,
    token_nll,
    uniform_nelbo_rate,
    weighted_cross_entropy,
)
from multimodal_dlm.diffusion.mask_schedules import get_mask_schedule
from multimodal_dlm.errors import ConfigError
from tests.diffusion.oracle import EXAMPLES, Joint, gauss_legendre, perturb

WIDTH, COLUMNS = 6, 11
SCHEDULES = ["linear", "cosine", "polynomial", "geometric"]


def make(count: int, dtype: torch.dtype, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(count, WIDTH, generator=generator, dtype=dtype, requires_grad=True)
    head = torch.nn.Linear(WIDTH, COLUMNS, dtype=dtype)
    with torch.no_grad():
        head.weight.copy_(torch.randn(COLUMNS, WIDTH, generator=generator, dtype=dtype))
        head.bias.zero_()
    targets = torch.randint(COLUMNS, (count,), generator=generator)
    weights = torch.rand(count, generator=generator, dtype=torch.float32)
    return states, head, targets, weights


def run(states, head, targets, weights, chunk_elements):
    """Loss, nll and the gradients of states and head."""
    output = weighted_cross_entropy(
        states, head, targets, weights, num_columns=COLUMNS, chunk_elements=chunk_elements
    )
    gradients = torch.autograd.grad(output.loss, [states, head.weight, head.bias])
    return output.loss, output.nll, *gradients


@EXAMPLES
@given(
    count=st.integers(0, 20),
    chunk=st.integers(1, 25),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_chunks_equal_the_dense_loss_and_gradient(count, chunk, dtype):
    states, head, targets, weights = make(count, dtype)
    nll = F.cross_entropy(head(states), targets, reduction="none")
    loss = (weights.to(dtype) * nll).sum()
    dense = (loss, nll, *torch.autograd.grad(loss, [states, head.weight, head.bias]))
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    for found, expected in zip(
        run(states, head, targets, weights, chunk * COLUMNS), dense, strict=True
    ):
        assert found.dtype == expected.dtype == dtype
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("chunk_elements", [1, 4 * COLUMNS, 2**20])
def test_under_bf16_autocast_only_the_product_is_bf16(chunk_elements):
    states, head, targets, weights = make(13, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = run(states, head, targets, weights, chunk_elements)
        logits = head(states)
        assert logits.dtype == torch.bfloat16
    nll = F.cross_entropy(logits.float(), targets, reduction="none")
    loss = (weights * nll).sum()
    dense = (loss, nll, *torch.autograd.grad(loss, [states, head.weight, head.bias]))
    torch.testing.assert_close(found[1], nll, rtol=0, atol=1e-6)
    for left, right in zip(found, dense, strict=True):
        assert left.dtype == torch.float32
        torch.testing.assert_close(left, right, rtol=2e-2, atol=2e-2)


def test_chunks_keep_no_logits_for_backward():
    states, head, targets, weights = make(64, torch.float32)

    def saved(chunk_elements):
        kept = []
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: kept.append(tensor.shape) or tensor, lambda tensor: tensor
        )
        with hooks:
            weighted_cross_entropy(
                states, head, targets, weights, num_columns=COLUMNS, chunk_elements=chunk_elements
            )
        return [shape for shape in kept if len(shape) == 2 and shape[1] == COLUMNS]

    assert saved(64 * COLUMNS)
    assert not saved(8 * COLUMNS)


def test_the_softmax_is_float32_for_half_precision_states():
    generator = torch.Generator().manual_seed(0)
    logits = (8 * torch.randn(50, 2000, generator=generator)).bfloat16()
    targets = torch.randint(2000, (50,), generator=generator)
    nll = token_nll(logits, None, targets, num_columns=2000)
    exact = F.cross_entropy(logits.double(), targets, reduction="none")
    assert nll.dtype == torch.float32
    torch.testing.assert_close(nll.double(), exact, rtol=1e-6, atol=1e-5)


def test_known_values():
    flat = torch.zeros(5, 7)
    nll = token_nll(flat, None, torch.arange(5), num_columns=7)
    torch.testing.assert_close(nll, torch.full((5,), math.log(7)))
    sure = 1e4 * F.one_hot(torch.arange(5), 7).float()
    assert token_nll(sure, None, torch.arange(5), num_columns=7).tolist() == [0.0] * 5


def test_a_chunk_below_one_is_explained():
    states, head, targets, _ = make(3, torch.float32)
    with pytest.raises(ConfigError, match="`chunk_elements` must be at least 1; got 0"):
        token_nll(states, head, targets, num_columns=COLUMNS, chunk_elements=0)


def test_row_nelbo_and_split_by_modality():
    nll = torch.tensor([[1.0, 2.0, 4.0, 8.0], [1.0, torch.inf, 1.0, 1.0]])
    is_free = torch.tensor([[True, True, True, False], [True, False, False, False]])
    is_masked = torch.tensor([[True, False, True, False], [False] * 4])
    assert exact_count_nelbo(nll, is_masked, is_free).tolist() == [7.5, 0.0]
    weights = torch.tensor([[1.5, 0.0, 1.5, 0.0], [0.5, 0.0, 0.0, 0.0]])
    split = nelbo_by_modality(
        nll.nan_to_num(posinf=0.0), weights, torch.tensor([[0, 0, 2, 2], [2, 0, 1, 1]]), 3
    )
    assert split.tolist() == [[1.5, 0.0, 6.0], [0.0, 0.0, 0.5]]


def all_masks(length: int) -> torch.Tensor:
    return torch.tensor(list(itertools.product([False, True], repeat=length)))


@pytest.mark.parametrize("mask_schedule", SCHEDULES)
def test_the_absorbing_rate_integrates_to_the_entropy(mask_schedule):
    """Bernoulli masks, all of them, integrated over t: the same for every mask schedule."""
    joint = Joint(3, 2, 3, seed=1)
    schedule = get_mask_schedule(mask_schedule)
    masks = all_masks(3)
    rows = joint.sequences.repeat_interleave(len(masks), dim=0)
    drawn = masks.repeat(len(joint.sequences), 1)

    def nelbo(denoiser):
        log_probs = denoiser(rows.masked_fill(drawn, 3)).log_softmax(dim=-1)
        nll = -log_probs.gather(-1, rows[..., None])[..., 0]
        total = 0.0
        for t, weight in zip(*gauss_legendre(40), strict=True):
            times = t.expand(len(rows))
            rate = absorbing_nelbo_rate(nll, drawn, times, mask_schedule=schedule).sum(dim=1)
            alpha = schedule.alpha(t)
            share = torch.where(drawn, 1 - alpha, alpha).prod(dim=1)
            share = share * joint.probs.repeat_interleave(len(masks))
            total += float(weight * (share * rate).sum())
        return total

    assert nelbo(joint.absorbing_denoiser) == pytest.approx(joint.entropy, abs=1e-9)
    assert nelbo(perturb(joint.absorbing_denoiser, 0, 0.3)) > joint.entropy + 1e-3


def uniform_nelbo(joint: Joint, denoiser, mask_schedule, num_points: int = 60) -> float:
    """The uniform process's NELBO by enumerating clean and noisy rows and integrating over t.

    t = v^3 spreads the nodes towards t = 0, where the rate has a logarithm.
    """
    clean = joint.sequences.repeat_interleave(len(joint.sequences), dim=0)
    noisy = joint.sequences.repeat(len(joint.sequences), 1)
    clean_probs = joint.probs.repeat_interleave(len(joint.sequences))
    total = 0.0
    for node, weight in zip(*gauss_legendre(num_points), strict=True):
        t = node**3
        alpha = mask_schedule.alpha(t)
        same = (clean == noisy).double()
        share = (alpha * same + (1 - alpha) / joint.num_columns).prod(dim=1) * clean_probs
        logits = denoiser(noisy, alpha.expand(len(noisy)))
        times = t.expand(len(noisy))
        rate = uniform_nelbo_rate(logits, clean, noisy, times, mask_schedule=mask_schedule)
        assert bool((rate >= 0).all())
        total += float(3 * node**2 * weight * (share * rate.sum(dim=1)).sum())
    return total


@pytest.mark.parametrize("mask_schedule", SCHEDULES)
def test_the_uniform_rate_integrates_to_the_entropy(mask_schedule):
    joint = Joint(3, 3, 3, seed=3)
    schedule = get_mask_schedule(mask_schedule)
    found = uniform_nelbo(joint, joint.uniform_denoiser, schedule)
    assert found == pytest.approx(joint.entropy, abs=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_the_uniform_bound_stays_above_the_entropy_for_wrong_denoisers(seed):
    joint = Joint(3, 3, 3, seed=3)
    wrong = perturb(joint.uniform_denoiser, seed, 0.2)
    found = uniform_nelbo(joint, wrong, get_mask_schedule("linear"), num_points=30)
    assert found > joint.entropy + 1e-3


def test_the_uniform_rate_is_the_relative_entropy_of_jump_rates(generator):
    """Against its definition, with the jump rates written out."""
    schedule = get_mask_schedule("cosine")
    logits = torch.randn(5, 4, 6, generator=generator, dtype=torch.float64)
    clean = torch.randint(6, (5, 4), generator=generator)
    noisy = torch.randint(6, (5, 4), generator=generator)
    times = torch.tensor([0.01, 0.3, 0.5, 0.8, 0.99], dtype=torch.float64)
    found = uniform_nelbo_rate(logits, clean, noisy, times, mask_schedule=schedule)
    for row, place in itertools.product(range(5), range(4)):
        alpha, slope = schedule.alpha(float(times[row])), schedule.alpha_derivative(times[row])
        matrix = alpha * torch.eye(6, dtype=torch.float64) + (1 - alpha) / 6
        z = noisy[row, place]
        ratios = matrix / matrix[:, z, None]  # [x_0, v] = q(v | x_0) / q(z | x_0)
        true = ratios[clean[row, place]]
        model = logits[row, place].softmax(dim=0) @ ratios
        terms = model - true + true * (true / model).log()
        expected = float(-slope / alpha / 6 * (terms.sum() - terms[z]))
        assert float(found[row, place]) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("t", [0.0, 1e-12, 1e-5, 0.5, 1 - 1e-7, 1.0])
def test_the_uniform_rate_is_finite_for_any_logits_and_time(t):
    schedule = get_mask_schedule("linear")
    clean = torch.tensor([[0, 1, 2, 3]])
    noisy = torch.tensor([[0, 1, 0, 1]])
    for size in (0.0, 5.0, 100.0, 1e4):
        logits = (size * F.one_hot(noisy, 2048).float()).requires_grad_()
        rate = uniform_nelbo_rate(logits, clean, noisy, torch.tensor([t]), mask_schedule=schedule)
        (gradient,) = torch.autograd.grad(rate.sum(), logits)
        assert rate.dtype == torch.float32
        assert bool((rate >= -1e-6).all())
        assert bool(rate.isfinite().all())
        assert bool(gradient.isfinite().all())


def test_the_uniform_rate_in_float32_equals_float64(generator):
    schedule = get_mask_schedule("linear")
    logits = 3 * torch.randn(40, 8, 200, generator=generator, dtype=torch.float64)
    clean = torch.randint(200, (40, 8), generator=generator)
    is_kept = torch.rand(40, 8, generator=generator) < 0.5
    noisy = torch.where(is_kept, clean, torch.randint(200, (40, 8), generator=generator))
    times = torch.linspace(1e-4, 1 - 1e-4, 40, dtype=torch.float64)
    exact = uniform_nelbo_rate(logits, clean, noisy, times, mask_schedule=schedule)
    found = uniform_nelbo_rate(logits.float(), clean, noisy, times, mask_schedule=schedule)
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-4)
