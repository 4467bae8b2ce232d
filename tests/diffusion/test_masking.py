"""Masks: exact counts, every subset equally likely, and pairs without bias."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from multimodal_dlm.diffusion.masking import (
    bernoulli_mask,
    complementary_pair,
    exact_count_mask,
    exact_count_weight,
    rectangle_mask,
    span_mask,
)
from multimodal_dlm.errors import ConfigError
from tests.diffusion.oracle import EXAMPLES, Joint, chi_square_z

ROWS = st.lists(st.lists(st.booleans(), min_size=7, max_size=7), min_size=1, max_size=5)


def all_subsets(length: int) -> torch.Tensor:
    """Every non-empty subset of the positions, (2^length - 1, length)."""
    return torch.tensor(list(itertools.product([False, True], repeat=length)))[1:]


@EXAMPLES
@given(rows=ROWS, seed=st.integers(0, 999))
def test_exactly_the_asked_number_of_free_positions_is_masked(rows, seed):
    generator = torch.Generator().manual_seed(seed)
    is_free = torch.tensor(rows)
    free = is_free.sum(dim=1)
    for counts in (free, torch.zeros_like(free), (free + 1) // 2):
        is_masked = exact_count_mask(is_free, counts, generator=generator)
        assert torch.equal(is_masked.sum(dim=1), counts)
        assert not bool((is_masked & ~is_free).any())


def test_no_positions_and_no_rows_are_fine(generator):
    for shape in ((3, 0), (0, 4)):
        is_free = torch.ones(shape, dtype=torch.bool)
        counts = torch.zeros(shape[0], dtype=torch.long)
        assert exact_count_mask(is_free, counts, generator=generator).shape == shape
        assert span_mask(is_free, generator=generator).shape == shape


def test_every_subset_is_equally_likely(generator):
    is_free = torch.tensor([True, True, False, True, True]).expand(6000, -1)
    is_masked = exact_count_mask(is_free, torch.full((6000,), 2), generator=generator)
    index = (is_masked.long() * torch.tensor([1, 2, 0, 4, 8])).sum(dim=1)
    counts = torch.bincount(index, minlength=16)
    counts = counts[counts > 0].double()
    assert len(counts) == 6
    assert abs(chi_square_z(counts, torch.full((6,), 1 / 6, dtype=torch.float64))) < 3.1


def test_a_count_out_of_range_is_explained(generator):
    is_free = torch.tensor([[True, True, True], [True, False, True]])
    with pytest.raises(ConfigError, match=r"0\.\.2, the free positions.*got 3 in row 1"):
        exact_count_mask(is_free, torch.tensor([3, 3]), generator=generator)
    with pytest.raises(ConfigError, match="got -1 in row 0"):
        exact_count_mask(is_free, torch.tensor([-1, 0]), generator=generator)


def test_bernoulli_masks_free_positions_at_the_rate(generator):
    is_free = torch.ones(4, 5000, dtype=torch.bool)
    is_free[:, ::2] = False
    rate = torch.tensor([0.0, 0.2, 0.9, 1.0])
    is_masked = bernoulli_mask(is_free, rate, generator=generator)
    assert not bool((is_masked & ~is_free).any())
    share = is_masked.sum(dim=1) / 2500
    deviation = 4 * (rate * (1 - rate) / 2500).sqrt()
    assert bool(((share - rate).abs() <= deviation).all())


def test_the_weight_is_length_over_count():
    is_free = torch.tensor([[True] * 4, [True, True, True, False], [False] * 4])
    is_masked = torch.tensor([[True] + [False] * 3, [True, True, False, False], [False] * 4])
    assert exact_count_weight(is_masked, is_free).tolist() == [4.0, 1.5, 0.0]


def pair_expectation(row_nll, length: int, *, naive: bool) -> float:
    """Expectation of a complementary pair's estimate over k uniform on 1..L and all subsets.

    The naive rule halves both terms in every row, the empty complement counting as 0.
    """
    masks = all_subsets(length)
    is_free = torch.ones_like(masks)
    pair = complementary_pair(masks, is_free, dtype=torch.float64)
    weight, complement_weight = pair.weight, pair.complement_weight
    if naive:
        weight = 0.5 * exact_count_weight(masks, is_free, dtype=torch.float64)
    estimate = weight * row_nll(pair.is_masked) + complement_weight * row_nll(pair.complement)
    sizes = masks.sum(dim=1)
    share = torch.bincount(sizes).double().reciprocal()[sizes] / length
    return float((share * estimate).sum())


def test_pairs_are_unbiased_and_halving_an_empty_complement_is_not():
    joint = Joint(3, 3, 3, seed=2)

    def expected(naive: bool) -> float:
        total = 0.0
        for sequence, probability in zip(joint.sequences, joint.probs, strict=True):

            def row_nll(masks, sequence=sequence):
                rows = sequence.expand(len(masks), -1)
                log_probs = joint.absorbing_denoiser(rows.masked_fill(masks, 3))
                nll = -log_probs.gather(-1, rows[..., None])[..., 0]
                return nll.masked_fill(~masks, 0.0).sum(dim=1)

            total += float(probability) * pair_expectation(row_nll, 3, naive=naive)
        return total

    assert expected(naive=False) == pytest.approx(joint.entropy, abs=1e-10)
    assert expected(naive=True) < 0.9 * joint.entropy


@EXAMPLES
@given(rows=ROWS, seed=st.integers(0, 999))
def test_a_pair_makes_every_free_position_a_target_once(rows, seed):
    generator = torch.Generator().manual_seed(seed)
    is_free = torch.tensor(rows)
    free = is_free.sum(dim=1)
    counts = torch.minimum(1 + (free * 0.6).long(), free)
    is_masked = exact_count_mask(is_free, counts, generator=generator)
    pair = complementary_pair(is_masked, is_free)
    assert torch.equal(pair.is_masked ^ pair.complement, is_free)
    # Constant nll c estimates c x L whatever the draw.
    total = pair.weight * is_masked.sum(dim=1) + pair.complement_weight * pair.complement.sum(dim=1)
    torch.testing.assert_close(total, free.float())
    assert bool((pair.complement_weight[counts == free] == 0).all())


@EXAMPLES
@given(height=st.integers(1, 9), width=st.integers(1, 9), seed=st.integers(0, 999))
def test_a_hole_is_one_rectangle(height, width, seed):
    holes = rectangle_mask(6, (height, width), generator=torch.Generator().manual_seed(seed))
    assert holes.shape == (6, height, width)
    for hole in holes:
        rows, columns = hole.any(dim=1), hole.any(dim=0)
        assert torch.equal(hole, rows[:, None] & columns[None, :])
        for run in (rows, columns):
            places = run.nonzero().flatten()
            assert len(places) >= 1
            assert int(places[-1] - places[0]) == len(places) - 1


def test_heights_of_holes_are_uniform(generator):
    heights = rectangle_mask(5000, (5, 3), generator=generator).any(dim=2).sum(dim=1)
    counts = torch.bincount(heights - 1, minlength=5).double()
    assert abs(chi_square_z(counts, torch.full((5,), 0.2, dtype=torch.float64))) < 3.1


@EXAMPLES
@given(rows=ROWS, seed=st.integers(0, 999))
def test_a_span_is_one_run_of_free_positions(rows, seed):
    is_free = torch.tensor(rows)
    spans = span_mask(is_free, generator=torch.Generator().manual_seed(seed))
    assert not bool((spans & ~is_free).any())
    for span, free in zip(spans, is_free, strict=True):
        inside = span[free].nonzero().flatten()
        assert len(inside) >= min(1, int(free.sum()))
        if len(inside):
            assert int(inside[-1] - inside[0]) == len(inside) - 1
