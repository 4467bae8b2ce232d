"""Seeds of rows and generators of groups."""

import pytest
import torch

from multimodal_dlm.errors import ConfigError
from multimodal_dlm.pipelines.randomness import RowSeeds, draw_row_seeds, group_generators


def test_row_seeds_come_by_one_draw_each():
    shared = torch.Generator().manual_seed(0)
    expected = [int(torch.randint(2**63 - 1, (), generator=shared)) for _ in range(3)]
    assert draw_row_seeds(torch.Generator().manual_seed(0), 3) == expected
    lists = [torch.Generator().manual_seed(seed) for seed in (4, 4)]
    first, second = draw_row_seeds(lists, 2)
    assert first == second
    assert len(set(draw_row_seeds(None, 4))) == 4
    for wrong in (0, RowSeeds(0)):
        with pytest.raises(ConfigError, match=r"one per row; got 0. Use torch.Generator"):
            draw_row_seeds(wrong, 2)


def test_generators_of_groups_differ():
    first, second = group_generators([1, 2], 2)
    draws = [float(torch.rand((), generator=each)) for each in (*first, *second)]
    assert len(set(draws)) == 4
