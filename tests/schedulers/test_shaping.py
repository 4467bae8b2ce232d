"""Temperature, top-k, top-p and the draw, against slow reference computations."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from multimodal_dlm.schedulers.shaping import (
    draw_columns,
    gumbel_noise,
    rank_descending,
    shape_logits,
)


def reference_shape(row, temperature, top_k, top_p):
    """One row by sorting in Python; -inf for excluded columns."""
    scaled = [value / temperature for value in row]
    order = sorted(range(len(row)), key=lambda c: -scaled[c])[: top_k or len(row)]
    weights = [math.exp(scaled[c] - scaled[order[0]]) for c in order]
    kept, before = [], 0.0
    for column, weight in zip(order, weights, strict=True):
        if before < (top_p or 1.0) or not kept:
            kept.append(column)
        before += weight / sum(weights)
    return [scaled[c] if c in kept else -math.inf for c in range(len(row))]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    top_k=st.sampled_from([None, 1, 3, 20]),
    top_p=st.sampled_from([None, 0.05, 0.5, 0.9]),
)
def test_shaping_equals_the_reference(seed, temperature, top_k, top_p):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 7, generator=generator, dtype=torch.float64) * 2
    shaped = shape_logits(logits, temperature=temperature, top_k=top_k, top_p=top_p)
    expected = [reference_shape(row, temperature, top_k, top_p) for row in logits.tolist()]
    assert shaped.tolist() == [pytest.approx(row) for row in expected]


def test_temperature_zero_leaves_the_first_of_the_most_likely():
    shaped = shape_logits(torch.tensor([[1.0, 3.0, 3.0]]), temperature=0.0)
    assert shaped.tolist() == [[-math.inf, 0.0, -math.inf]]


def test_draws_invert_the_cumulative_distribution():
    probabilities = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]])
    numbers = torch.tensor([0.0, 0.24, 0.25, 0.74, 0.76, 1 - 2.0**-53], dtype=torch.float64)
    logits = probabilities.log().expand(6, -1)
    assert draw_columns(logits, numbers).tolist() == [1, 1, 3, 3, 4, 4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [1, 2, 63, 64, 65, 128, 200, 2560])
def test_draws_by_blocks_are_those_of_one_long_sum(count, dtype):
    generator = torch.Generator().manual_seed(count)
    logits = torch.randn(500, count, generator=generator, dtype=dtype) * 3
    logits[:, ::3] = -math.inf
    logits[:, count // 2] = 0.0  # One column at least.
    numbers = torch.rand(500, dtype=torch.float64, generator=generator)
    numbers[:2] = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)
    cumulative = logits.double().softmax(dim=-1).cumsum(dim=-1)
    level = (numbers[:, None] * cumulative[:, -1:]).clamp(max=1 - 1e-9)
    expected = torch.searchsorted(cumulative, level, right=True).squeeze(-1)
    drawn = draw_columns(logits, numbers)
    assert bool(logits.gather(-1, drawn[:, None]).isfinite().all())
    assert torch.equal(drawn[2:], expected[2:])
    assert drawn[0] == logits[0].isfinite().nonzero()[0]


def test_draws_follow_the_distribution():
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0])
    count = 20_000
    numbers = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    drawn = draw_columns(logits.expand(count, -1), numbers)
    expected = logits.softmax(dim=-1) * count
    statistic = ((torch.bincount(drawn, minlength=4) - expected) ** 2 / expected).sum()
    assert float(statistic) < 16.3  # chi-square, 3 degrees of freedom, p = 0.001


def test_gumbel_noise_is_finite_and_has_the_right_mean_and_variance():
    numbers = torch.rand(50_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    noise = gumbel_noise(numbers)
    assert float(noise.mean()) == pytest.approx(0.5772, abs=0.02)
    assert float(noise.var()) == pytest.approx(math.pi**2 / 6, rel=0.03)
    assert bool(gumbel_noise(torch.zeros(1, dtype=torch.float64)).isfinite())


def test_ranks_put_the_left_one_of_equals_first():
    scores = torch.tensor([[1.0, 3.0, 1.0, -math.inf], [0.0, 0.0, 0.0, 0.0]])
    assert rank_descending(scores).tolist() == [[1, 0, 2, 3], [0, 1, 2, 3]]
    assert rank_descending(torch.zeros(2, 500)).tolist() == [list(range(500))] * 2
