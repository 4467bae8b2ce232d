"""Generators that depend on what is drawn, never on who draws it.

A draw for a row of the global batch is keyed by (seed, step, row), so it is the same with any
number of processes, workers and micro-batches, and after a resume.
"""

import numpy as np
import torch

_ROW, _STEP = 11, 12
EVALUATION_SEED = 0  # Of held-out rows, noise levels and masks, whatever the run's seed.


def row_generator(seed: int, step: int, row: int) -> torch.Generator:
    """The generator of one row of the global batch."""
    return keyed_generator(_ROW, seed, step, row)


def step_generator(seed: int, step: int, *key: int) -> torch.Generator:
    """A generator for what all rows of a step share, such as stratified draws."""
    return keyed_generator(_STEP, seed, step, *key)


def keyed_generator(*key: int) -> torch.Generator:
    """A CPU generator seeded from a key of non-negative integers."""
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))
