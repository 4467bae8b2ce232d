"""Draws cover all noise levels, and each alone is uniform."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from multimodal_dlm.diffusion.mask_schedules import get_mask_schedule
from multimodal_dlm.diffusion.timesteps import (
    banded_uniforms,
    counts_from_uniforms,
    grouped_uniforms,
    low_discrepancy_uniforms,
    mean_scheduled_count,
    scheduled_counts,
    stratified_uniforms,
)
from multimodal_dlm.errors import ConfigError
from tests.diffusion.oracle import EXAMPLES, chi_square_z


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("draw", [stratified_uniforms, low_discrepancy_uniforms])
@EXAMPLES
@given(count=st.integers(0, 70), seed=st.integers(0, 2**31))
def test_each_stratum_holds_exactly_one(draw, count, seed):
    values = draw(count, generator=seeded(seed))
    assert values.dtype == torch.float64
    assert values.shape == (count,)
    assert bool(((values >= 0) & (values < 1)).all())
    if draw is stratified_uniforms:
        assert sorted((values * count).long().tolist()) == list(range(count))
    elif count:
        spacing = values.sort().values.diff()
        torch.testing.assert_close(spacing, torch.full_like(spacing, 1 / count))


@pytest.mark.parametrize("draw", [stratified_uniforms, low_discrepancy_uniforms])
def test_one_number_of_a_batch_is_uniform(draw):
    generator = seeded(1)
    first = torch.stack([draw(8, generator=generator)[0] for _ in range(4000)])
    counts = torch.bincount((first * 20).long(), minlength=20).double()
    assert abs(chi_square_z(counts, torch.full((20,), 0.05, dtype=torch.float64))) < 3.1


@pytest.mark.parametrize("draw", [stratified_uniforms, low_discrepancy_uniforms])
def test_two_calls_are_independent(draw):
    """Sharing one sequence would leave the difference of two modalities' levels constant."""
    generator = seeded(2)
    differences = draw(512, generator=generator) - draw(512, generator=generator)
    assert float(differences.std()) == pytest.approx((1 / 6) ** 0.5, abs=0.03)
    assert not torch.equal(draw(9, generator=seeded(3)), draw(9, generator=seeded(4)))
    assert torch.equal(draw(9, generator=seeded(3)), draw(9, generator=seeded(3)))


def test_stratification_removes_most_of_the_variance_of_a_batch_mean():
    generator = seeded(5)
    means = torch.stack([stratified_uniforms(64, generator=generator).mean() for _ in range(300)])
    assert float(means.std()) < 0.1 * (1 / 12 / 64) ** 0.5


@EXAMPLES
@given(groups=st.lists(st.sampled_from("abc"), max_size=40), seed=st.integers(0, 99))
def test_each_group_is_stratified_alone(groups, seed):
    values = grouped_uniforms(groups, generator=seeded(seed))
    assert values.shape == (len(groups),)
    for name in set(groups):
        rows = [row for row, group in enumerate(groups) if group == name]
        assert sorted((values[rows] * len(rows)).long().tolist()) == list(range(len(rows)))


def test_the_band_is_respected_and_checked():
    values = banded_uniforms(stratified_uniforms(100, generator=seeded(0)), 0.3, 0.8)
    assert 0.3 <= float(values.min()) < 0.31
    assert 0.79 < float(values.max()) <= 0.8
    for low, high in ((0.5, 0.5), (-0.1, 0.5), (0.5, 1.1), (0.8, 0.2)):
        with pytest.raises(ConfigError, match="0 <= low < high <= 1; got"):
            banded_uniforms(values, low, high)


@EXAMPLES
@given(length=st.integers(0, 300), seed=st.integers(0, 999))
def test_counts_are_uniform_on_one_to_length(length, seed):
    """L stratified numbers give every count exactly once."""
    lengths = torch.full((length,), length)
    counts = counts_from_uniforms(stratified_uniforms(length, generator=seeded(seed)), lengths)
    assert sorted(counts.tolist()) == list(range(1, length + 1))


def test_counts_at_the_ends():
    u = torch.tensor([0.0, 1e-12, 0.5, 1 - 2**-53, 1.0, 0.7], dtype=torch.float64)
    counts = counts_from_uniforms(u, torch.tensor([5, 5, 5, 5, 5, 0]))
    assert counts.tolist() == [1, 1, 3, 5, 5, 0]
    assert counts.dtype == torch.long
    large = torch.tensor([2**25 + 1])
    assert counts_from_uniforms(torch.ones(1), large).tolist() == large.tolist()


SCHEDULES = [
    get_mask_schedule("linear"),
    get_mask_schedule("cosine"),
    get_mask_schedule("polynomial", power=0.5),
    get_mask_schedule("polynomial", power=3),
    get_mask_schedule("geometric"),
    get_mask_schedule("geometric", growth=50),
]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
@pytest.mark.parametrize("length", [1, 2, 7, 64])
def test_counts_of_a_schedule_are_as_likely_as_they_say(schedule, length):
    """Against the frequencies of an even grid of uniform numbers."""
    grid = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    lengths = torch.full((100_000,), length)
    counts, likely = scheduled_counts(grid, lengths, schedule)
    shares = torch.bincount(counts, minlength=length + 1)[1:] / 100_000
    seen = torch.zeros(length, dtype=torch.float64)
    seen[counts - 1] = likely
    assert int(counts.min()) >= 1
    assert int(counts.max()) <= length
    assert torch.allclose(shares.double(), seen, atol=2e-5)
    mean = mean_scheduled_count(torch.tensor([length]), schedule)
    assert float(mean) == pytest.approx(float(counts.double().mean()), rel=1e-3)


def test_a_linear_schedule_gives_the_uniform_counts_and_an_empty_window_none():
    u = torch.tensor([0.0, 0.2, 0.5, 1 - 2**-53, 0.3], dtype=torch.float64)
    lengths = torch.tensor([5, 5, 8, 8, 0])
    counts, likely = scheduled_counts(u, lengths, get_mask_schedule("linear"))
    assert counts.tolist() == counts_from_uniforms(u, lengths).tolist()
    expected = torch.tensor([1 / 5, 1 / 5, 1 / 8, 1 / 8, 1.0], dtype=torch.float64)
    assert torch.allclose(likely, expected)
    means = mean_scheduled_count(lengths, get_mask_schedule("linear"))
    assert torch.allclose(means, torch.tensor([3.0, 3.0, 4.5, 4.5, 0.0], dtype=torch.float64))
    assert mean_scheduled_count(lengths[:0], get_mask_schedule("cosine")).shape == (0,)
