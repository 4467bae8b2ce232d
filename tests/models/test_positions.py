"""Rotary axes."""

import pytest
import torch

from multimodal_dlm.errors import ConfigError
from multimodal_dlm.models.positions import apply_rotary, check_axes, rotary_tables


def scores(query, key, query_position, key_position, axes):
    """Dot product of a rotated query and key."""
    tables = [
        rotary_tables(p.view(1, 1, -1), axes_dims=axes, theta=100.0, dtype=torch.float64)
        for p in (query_position, key_position)
    ]
    turned = [apply_rotary(v, t) for v, t in zip((query, key), tables, strict=True)]
    return (turned[0] * turned[1]).sum()


def test_one_axis_is_a_complex_rotation():
    heads = torch.randn(1, 3, 2, 8, dtype=torch.float64)
    positions = torch.tensor([[[0], [1], [5]]])
    tables = rotary_tables(positions, axes_dims=(8,), theta=50.0, dtype=torch.float64)
    frequencies = 50.0 ** (-torch.arange(4, dtype=torch.float64) / 4)
    angle = positions.double() * frequencies
    numbers = torch.complex(heads[..., :4], heads[..., 4:])
    turned = numbers * torch.polar(torch.ones_like(angle), angle).unsqueeze(2)
    expected = torch.cat([turned.real, turned.imag], dim=-1)
    assert torch.allclose(apply_rotary(heads, tables), expected, atol=1e-12)


def test_scores_depend_on_offsets_along_each_axis_only():
    query, key = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)
    axes = (8, 4, 4)
    first, second = torch.tensor([3, 1, 2]), torch.tensor([1, 4, 0])
    shift = torch.tensor([7, 2, 5])
    there = scores(query, key, first, second, axes)
    assert torch.allclose(there, scores(query, key, first + shift, second + shift, axes))
    for axis in range(3):
        moved = first.clone()
        moved[axis] += 1
        assert not torch.allclose(there, scores(query, key, moved, second, axes))


def test_position_zero_changes_nothing():
    heads = torch.randn(2, 4, 1, 16)
    tables = rotary_tables(torch.zeros(2, 4, 3, dtype=torch.long), axes_dims=(8, 4, 4), theta=10.0)
    assert torch.equal(apply_rotary(heads, tables), heads)


def test_partial_rotary_leaves_the_rest_alone():
    heads = torch.randn(1, 2, 1, 8)
    tables = rotary_tables(torch.tensor([[[1], [2]]]), axes_dims=(4,), theta=10.0)
    turned = apply_rotary(heads, tables)
    assert torch.equal(turned[..., 4:], heads[..., 4:])
    assert not torch.equal(turned[..., :4], heads[..., :4])


def test_wrong_axes_are_refused():
    with pytest.raises(ConfigError, match="sum 12 and 16"):
        check_axes((8, 4), 16)
    with pytest.raises(ConfigError, match="even"):
        check_axes((7, 9), 16)
    with pytest.raises(ConfigError, match="3 axes"):
        rotary_tables(torch.zeros(1, 2, 2, dtype=torch.long), axes_dims=(8, 4, 4), theta=10.0)
