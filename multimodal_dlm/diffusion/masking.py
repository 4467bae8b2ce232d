"""Which positions are masked: exact counts, Bernoulli, complementary pairs, rectangular holes.

With k of L positions masked, k uniform on 1..L, and weight L / k, the masked cross-entropy is the
any-order bound on the negative log-likelihood (Uria et al. 2014, arXiv 1310.1757; Ou et al. 2024,
arXiv 2406.03736, Eq. 14) with less variance than Bernoulli masks and weight 1 / t.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from multimodal_dlm.errors import ConfigError


def exact_count_mask(
    is_free: Bool[Tensor, "batch length"],
    counts: Int[Tensor, " batch"],
    *,
    generator: torch.Generator | None = None,
) -> Bool[Tensor, "batch length"]:
    """Mask exactly `counts[b]` of the free positions of row b, every subset equally likely.

    Raises:
        ConfigError: When a count is negative or above the number of free positions.
    """
    free = is_free.sum(dim=1)
    if bool(((counts < 0) | (counts > free)).any()):
        bad = int(((counts < 0) | (counts > free)).nonzero()[0])
        raise ConfigError(
            f"`counts` must lie in 0..free positions; row {bad} has count {int(counts[bad])} and"
            f" {int(free[bad])} free positions."
        )
    scores = torch.rand(is_free.shape, generator=generator, dtype=torch.float64)
    scores = scores.to(is_free.device).masked_fill(~is_free, 2.0)
    rank = scores.argsort(dim=1).argsort(dim=1)
    return rank < counts.to(is_free.device).unsqueeze(1)


def bernoulli_mask(
    is_free: Bool[Tensor, "batch length"],
    t: Float[Tensor, " batch"],
    *,
    generator: torch.Generator | None = None,
) -> Bool[Tensor, "batch length"]:
    """Mask every free position of row b with probability `t[b]`, independently."""
    draws = torch.rand(is_free.shape, generator=generator, dtype=torch.float64)
    return (draws.to(is_free.device) < t.to(is_free.device).unsqueeze(1)) & is_free


def complementary_pair(
    is_masked: Bool[Tensor, "batch length"], is_free: Bool[Tensor, "batch length"]
) -> tuple[Bool[Tensor, "batch length"], Float[Tensor, " batch"]]:
    """The complement of an exact-count mask, and the weight of the first mask's estimate.

    A complement without masks says nothing, and averaging with it would be biased; such rows (k =
    L) get weight 1 for the mask itself and 0 for the complement, the others 1/2 each.

    Returns:
        The complement, and the weight of the mask; the complement's weight is 1 minus it.
    """
    complement = is_free & ~is_masked
    weight = torch.where(complement.any(dim=1), 0.5, 1.0)
    return complement, weight


def rectangle_mask(
    batch: int,
    grid: tuple[int, int],
    *,
    generator: torch.Generator | None = None,
) -> Bool[Tensor, "batch height width"]:
    """One random rectangle of tokens per row, at least 1 x 1 (inpainting practice, not a bound)."""
    height, width = grid
    draws = torch.rand(batch, 4, generator=generator, dtype=torch.float64)
    heights = (draws[:, 0] * height).long() + 1
    widths = (draws[:, 1] * width).long() + 1
    tops = (draws[:, 2] * (height - heights + 1)).long()
    lefts = (draws[:, 3] * (width - widths + 1)).long()
    rows, columns = torch.arange(height)[None, :, None], torch.arange(width)[None, None, :]
    inside_rows = (rows >= tops[:, None, None]) & (rows < (tops + heights)[:, None, None])
    inside_columns = (columns >= lefts[:, None, None]) & (columns < (lefts + widths)[:, None, None])
    return inside_rows & inside_columns
