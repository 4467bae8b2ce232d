"""Percentile bootstrap: how far a mean would move if other samples had been drawn."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from multimodal_dlm.errors import ConfigError

NUM_RESAMPLES = 1000
LEVEL = 0.95


def bootstrap_weights(
    count: int, *, seed: int = 0, num_resamples: int = NUM_RESAMPLES
) -> Float[np.ndarray, "resamples units"]:
    """How often each unit is in each resample of `count` units drawn with replacement.

    Args:
        count: Units, at least 1.
        seed: Of the resamples.
        num_resamples: Rows.
    """
    rng = np.random.default_rng(seed)
    return rng.multinomial(count, np.full(count, 1 / count), size=num_resamples).astype(np.float64)


def bootstrap_interval(
    values: Sequence[float],
    *,
    groups: Sequence[int] | None = None,
    seed: int = 0,
    num_resamples: int = NUM_RESAMPLES,
    level: float = LEVEL,
) -> tuple[float, float]:
    """Percentile interval of a mean (Efron 1979, Ann. Statist. 7, 1-26).

    Args:
        values: One number a row, at least 1.
        groups: Unit of each row, such as the picture of a question: units are drawn, not rows.
            None for one unit a row.
        seed: Of the resamples.
        num_resamples: Resamples.
        level: Share of the resamples inside.

    Returns:
        Lower and upper end.

    Raises:
        ConfigError: When there is no value.
    """
    if not len(values):
        raise ConfigError("`values` must hold at least one number; got none.")
    rows = np.asarray(values, dtype=np.float64)
    _, unit = np.unique(np.arange(len(rows)) if groups is None else groups, return_inverse=True)
    sums, sizes = np.bincount(unit, weights=rows), np.bincount(unit).astype(np.float64)
    weights = bootstrap_weights(len(sums), seed=seed, num_resamples=num_resamples)
    return percentiles((weights @ sums) / (weights @ sizes), level)


def percentiles(statistics: Float[np.ndarray, " resamples"], level: float) -> tuple[float, float]:
    """The ends that hold the share `level` of the statistics between them."""
    tail = 100 * (1 - level) / 2
    low, high = np.percentile(statistics, [tail, 100 - tail])
    return float(low), float(high)
