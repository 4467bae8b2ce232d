"""How often each source of a mixture is drawn: weights, a temperature, or stated passes."""

import math
from collections.abc import Mapping

BLOCK_SLOTS = 1000


def temperature_shares(sizes: Mapping[str, int], temperature: float) -> dict[str, int]:
    """Shares in proportion to size^(1 / temperature), of `BLOCK_SLOTS` slots, each at least one.

    A temperature of 1 draws in proportion to the sizes, a high one evenly (Arivazhagan et al. 2019,
    arXiv 1907.05019, section 4.2). Rounded by largest remainders.
    """
    logs = {name: math.log(size) / temperature for name, size in sizes.items()}
    peak = max(logs.values())
    weights = {name: math.exp(value - peak) for name, value in logs.items()}
    total = sum(weights.values())
    exact = {name: BLOCK_SLOTS * weight / total for name, weight in weights.items()}
    shares = {name: int(value) for name, value in exact.items()}
    by_remainder = sorted(exact, key=lambda name: (shares[name] - exact[name], name))
    for name in by_remainder[: BLOCK_SLOTS - sum(shares.values())]:
        shares[name] += 1
    return {name: max(1, share) for name, share in shares.items()}


def slot_shares(
    weights: Mapping[str, int],
    sizes: Mapping[str, int],
    *,
    temperature: float | None = None,
    passes: Mapping[str, float] | None = None,
) -> tuple[dict[str, int], int]:
    """Integer share of each source in a block of slots, and the slots that an epoch must hold.

    Args:
        weights: Weights of the manifest; used when neither of the others is given.
        sizes: Samples of each source that are drawn.
        temperature: See `temperature_shares`.
        passes: Passes over each source in an epoch; the epoch has exactly that many slots.
    """
    if passes:
        shares = {name: max(1, round(passes[name] * size)) for name, size in sizes.items()}
        return shares, sum(shares.values())
    total = sum(sizes.values())
    if temperature is not None:
        return temperature_shares(sizes, temperature), total
    return dict(weights), total
