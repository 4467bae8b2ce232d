"""Row seeds and row generators: a row of a batch is the same as a single call.

Every row gets a seed by one draw from the generator it was given, its own or a shared one. From the
seed come CPU generators, one per noise group, so that a row's draws depend neither on the device,
nor on other rows, nor on how long another group of the same row took.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from multimodal_dlm.errors import ConfigError

SEED_RANGE = 2**63 - 1


@dataclass(frozen=True)
class RowSeeds:
    """Seeds of the rows themselves, as recorded in a recipe; takes the place of `generator`.

    Args:
        seeds: One seed per row, in 0..2^63 - 2.
    """

    seeds: tuple[int, ...]


Generators = torch.Generator | Sequence[torch.Generator] | RowSeeds | None


def draw_row_seeds(generator: Generators, batch_size: int) -> list[int]:
    """One seed per row.

    Args:
        generator: One generator that every row draws from in turn, a list of one per row, recorded
            row seeds, or None for fresh entropy of the operating system.
        batch_size: Rows.

    Raises:
        ConfigError: When it is neither, a list has not one entry per row, or an entry is no
            generator.
    """
    if generator is None:
        generator = torch.Generator()
        generator.seed()
    given = generator.seeds if isinstance(generator, RowSeeds) else generator
    if isinstance(given, torch.Generator):
        given = [given] * batch_size
    if not isinstance(given, Sequence):
        raise ConfigError(
            f"`generator` must be one `torch.Generator` or a list of one per row; got {given!r}."
            " Use torch.Generator().manual_seed(0)."
        )
    if len(given) != batch_size:
        raise ConfigError(
            "`generator` must be one `torch.Generator` or a list of one per row; got a list of"
            f" {len(given)} for {batch_size} rows. Pass"
            f" [torch.Generator().manual_seed(seed + row) for row in range({batch_size})]."
        )
    return [_row_seed(each) for each in given]


def _row_seed(source: torch.Generator | int) -> int:
    if isinstance(source, torch.Generator):
        return int(torch.randint(SEED_RANGE, (), generator=source, device=source.device))
    if isinstance(source, int) and 0 <= source < SEED_RANGE:
        return source
    raise ConfigError(
        f"`generator` must hold `torch.Generator`s (or `RowSeeds` of seeds in 0..2^63 - 2); got"
        f" {source!r}. Use torch.Generator().manual_seed(0)."
    )


def group_generators(row_seeds: Sequence[int], num_groups: int) -> list[list[torch.Generator]]:
    """For each noise group, one CPU generator per row."""
    rows = [
        torch.randint(SEED_RANGE, (num_groups,), generator=torch.Generator().manual_seed(seed))
        for seed in row_seeds
    ]
    return [
        [torch.Generator().manual_seed(int(seeds[index])) for seeds in rows]
        for index in range(num_groups)
    ]
