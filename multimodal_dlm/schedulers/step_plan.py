"""Step plans: how many tokens to commit at each of K steps, from a measured information profile.

Drawing s tokens at once from their own distributions costs what each would have learned from those
drawn beside it. For tokens in random order and h(j), the mean entropy of a token given j of the N
others, steps that end at N_1 < ... < N_K = N have the expected divergence

    KL = sum over steps of [ s_k h(N_{k-1}) - sum of h(j) over j = N_{k-1} .. N_k - 1 ]

from the model's own joint law: the left Riemann error of the profile (compare Li and Cai 2025,
arXiv 2505.21400, whose bounds are of this sum). The sizes that make it smallest are found by
dynamic programming. Tokens committed by confidence are not in random order: for them it is a guide.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from multimodal_dlm.errors import ConfigError


def interpolate_profile(profile: Sequence[float], num_tokens: int) -> NDArray[np.float64]:
    """h(j) for j = 0 .. num_tokens - 1, from a profile at evenly spaced shares of known tokens.

    Args:
        profile: Nats per token at shares i / (M - 1), i = 0 .. M - 1; the last entry stands for all
            but one token known.
        num_tokens: Tokens N of the window, 1 or more.

    A token can only be surer when more is known, so a profile that rises somewhere, as measured
    ones do by chance, is first made non-increasing by least squares.

    Raises:
        ConfigError: When the profile has fewer than 2 entries, or one that is negative or not
            finite.
    """
    check_profile(profile)
    shares = np.arange(num_tokens) / max(num_tokens - 1, 1)
    return np.interp(shares, np.linspace(0.0, 1.0, len(profile)), _non_increasing(profile))


def check_profile(profile: Any) -> None:
    """Refuse what is no information profile.

    Raises:
        ConfigError: When it has fewer than 2 entries, or one that is negative or not finite.
    """
    is_sequence = isinstance(profile, (list, tuple)) and len(profile) >= 2
    if not is_sequence or not all(_is_entropy(value) for value in profile):
        raise ConfigError(
            "`step_profile` must be a list of 2 or more finite numbers, 0 or more (nats a token);"
            f" got {profile!r}. Measure it with `multimodal-dlm study step-plan`."
        )


def parallel_error(entropies: Sequence[float] | NDArray[np.float64], sizes: Sequence[int]) -> float:
    """Expected KL in nats of drawing tokens in random order, `sizes` at a time.

    Args:
        entropies: h(j) for j = 0 .. N - 1 known tokens.
        sizes: Tokens of each step; they sum to N.

    Raises:
        ConfigError: When the sizes do not sum to N.
    """
    h = np.asarray(entropies, np.float64)
    if sum(sizes) != len(h):
        raise ConfigError(
            f"`sizes` must sum to the number of tokens, {len(h)}; got {list(sizes)}, which sum to"
            f" {sum(sizes)}."
        )
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(int)
    return float(sum(size * h[start] for start, size in zip(starts, sizes, strict=True)) - h.sum())


def plan_steps(
    profile: Sequence[float], num_tokens: int, num_steps: int, *, num_known: int = 0
) -> tuple[int, ...]:
    """The sizes of `num_steps` steps with the smallest `parallel_error`.

    Dynamic programming over where each step ends, O(num_steps num_tokens^2); the result is kept.

    Args:
        profile: As for `interpolate_profile`.
        num_tokens: Tokens to write, 1 or more.
        num_steps: Steps, 1 or more; beyond `num_tokens` every step takes one.
        num_known: Tokens of the same window that are known before the first step.

    Raises:
        ConfigError: When the profile is refused or a number is below 1.
    """
    if min(num_tokens, num_steps) < 1:
        raise ConfigError(
            "`num_tokens` and `num_steps` must be 1 or more; got"
            f" {num_tokens} and {num_steps}. An empty window needs no plan."
        )
    check_profile(profile)
    return _plan(tuple(float(value) for value in profile), num_tokens, num_steps, num_known)


@lru_cache(maxsize=256)
def _plan(
    profile: tuple[float, ...], num_tokens: int, num_steps: int, num_known: int
) -> tuple[int, ...]:
    if num_steps >= num_tokens:
        return (1,) * num_tokens
    h = interpolate_profile(profile, num_known + num_tokens)[num_known:]
    # best[b]: least sum of s_k h(N_{k-1}) over the steps so far, which end at b known tokens.
    ends = np.arange(num_tokens + 1)
    best = np.where(ends == 0, 0.0, np.inf)
    came_from = np.zeros((num_steps, num_tokens + 1), dtype=np.int64)
    sizes = ends[None, :] - ends[:-1, None]  # (start, end)
    cost = np.where(sizes >= 1, sizes * h[:, None], np.inf)
    for step in range(num_steps):
        total = best[:-1, None] + cost
        came_from[step] = total.argmin(axis=0)
        best = total.min(axis=0)
    stops = [num_tokens]
    for step in reversed(range(num_steps)):
        stops.append(int(came_from[step, stops[-1]]))
    return tuple(int(size) for size in np.diff(stops[::-1]))


def _non_increasing(profile: Sequence[float]) -> NDArray[np.float64]:
    """The closest non-increasing sequence in least squares: pool adjacent violators."""
    pools: list[tuple[float, int]] = []  # (mean, entries)
    for value in profile:
        mean, size = float(value), 1
        while pools and pools[-1][0] < mean:
            before, count = pools.pop()
            mean = (before * count + mean * size) / (count + size)
            size += count
        pools.append((mean, size))
    return np.repeat([mean for mean, _ in pools], [size for _, size in pools])


def _is_entropy(value: Any) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and math.isfinite(value) and value >= 0.0
