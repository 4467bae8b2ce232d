"""Which positions are masked: exact counts, Bernoulli, complementary pairs, holes and spans.

With k of L positions masked, k uniform on 1..L and every subset of that size equally likely, the
masked cross-entropy times L / k is an unbiased estimate of the any-order bound on the negative
log-likelihood (Uria et al. 2014, arXiv 1310.1757; Ou et al. 2024, arXiv 2406.03736), with less
variance than Bernoulli masks and weight 1 / t: the mean loss of a row no longer fluctuates with the
number of masks. Holes and spans are training recipes; their losses bound nothing.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from multimodal_dlm.errors import ConfigError


class ComplementaryPair(NamedTuple):
    """A mask, its complement, and what each one's summed cross-entropy is multiplied by.

    Attributes:
        is_masked: The first mask.
        complement: The free positions that the first mask leaves clean.
        weight: Of the first mask's sum, per row.
        complement_weight: Of the complement's sum, per row; 0 where the complement is empty.
    """

    is_masked: Bool[Tensor, "batch length"]
    complement: Bool[Tensor, "batch length"]
    weight: Float[Tensor, " batch"]
    complement_weight: Float[Tensor, " batch"]


def exact_count_mask(
    is_free: Bool[Tensor, "batch length"],
    counts: Int[Tensor, " batch"],
    *,
    generator: torch.Generator | None,
) -> Bool[Tensor, "batch length"]:
    """Mask exactly `counts[b]` of the free positions of row b, every subset equally likely.

    Args:
        is_free: Positions that may be masked.
        counts: Masks of each row, 0..number of free positions.
        generator: Source of all randomness.

    Raises:
        ConfigError: When a count is negative or above the number of free positions.
    """
    counts = counts.to(is_free.device)
    free = is_free.sum(dim=1)
    is_wrong = (counts < 0) | (counts > free)
    if bool(is_wrong.any()):
        row = int(is_wrong.nonzero()[0])
        raise ConfigError(
            f"`counts` must lie in 0..{int(free[row])}, the free positions of the row; got"
            f" {int(counts[row])} in row {row}. Use `counts_from_uniforms`."
        )
    # The positions with the smallest of n independent uniform numbers are a uniform subset; through
    # ranks, so that a tie can never change the count.
    order = _uniforms(is_free, generator).masked_fill_(~is_free, 2.0).argsort(dim=1)
    ranks = torch.arange(is_free.shape[1], device=is_free.device)
    chosen = ranks < counts[:, None]
    return torch.zeros_like(is_free).scatter_(1, order, chosen)


def bernoulli_mask(
    is_free: Bool[Tensor, "batch length"],
    mask_rate: Float[Tensor, " batch"],
    *,
    generator: torch.Generator | None,
) -> Bool[Tensor, "batch length"]:
    """Mask every free position of row b independently with probability `mask_rate[b]`.

    The absorbing q(x_t | x_0) with mask_rate = 1 - alpha(t) (Austin et al. 2021, arXiv 2107.03006).
    For sampling the process; training uses exact counts.

    Args:
        is_free: Positions that may be masked.
        mask_rate: Probability of each row, in [0, 1].
        generator: Source of all randomness.
    """
    rate = mask_rate.to(is_free.device, torch.float64)[:, None]
    return (_uniforms(is_free, generator) < rate) & is_free


def exact_count_weight(
    is_masked: Bool[Tensor, "batch length"],
    is_free: Bool[Tensor, "batch length"],
    *,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, " batch"]:
    """Weight L / k of each row, for k masked of L free positions; 0 where nothing is masked.

    Args:
        is_masked: The masks.
        is_free: Positions that could be masked.
        dtype: Of the weights.
    """
    counts, lengths = is_masked.sum(dim=1), is_free.sum(dim=1)
    return (lengths.to(dtype) / counts.clamp(min=1)) * (counts > 0)


def complementary_pair(
    is_masked: Bool[Tensor, "batch length"],
    is_free: Bool[Tensor, "batch length"],
    *,
    dtype: torch.dtype = torch.float32,
) -> ComplementaryPair:
    """Pair an exact-count mask with its complement, so that every free position is a target once.

    NELBO_row = weight x (CE summed over the mask) + complement_weight x (CE summed over the
    complement), with k masks of L: (L / k) / 2 and (L / (L - k)) / 2 for k < L. For k = L the
    complement masks nothing and its estimate would be 0, so halving there is biased (below the
    entropy, even); such a row takes the mask alone, weight 1. With k uniform on 1..L the mean is
    exactly the any-order bound. (The pair itself: Li et al. 2025, LaViDa, arXiv 2505.16839.)

    Args:
        is_masked: A mask with k >= 1 free positions in every row that has any.
        is_free: Positions that may be masked.
        dtype: Of the weights.
    """
    complement = is_free & ~is_masked
    weight = exact_count_weight(is_masked, is_free, dtype=dtype)
    return ComplementaryPair(
        is_masked=is_masked,
        complement=complement,
        weight=torch.where(complement.any(dim=1), 0.5 * weight, weight),
        complement_weight=0.5 * exact_count_weight(complement, is_free, dtype=dtype),
    )


def rectangle_mask(
    batch: int, grid: tuple[int, int], *, generator: torch.Generator | None
) -> Bool[Tensor, "batch height width"]:
    """One random rectangle of a token grid per row, height and width uniform, at least 1 x 1.

    Args:
        batch: Number of rows.
        grid: Height and width of the grid, in tokens.
        generator: Source of all randomness.
    """
    rows = _runs(batch, grid[0], generator)
    columns = _runs(batch, grid[1], generator)
    return rows[:, :, None] & columns[:, None, :]


def span_mask(
    is_free: Bool[Tensor, "batch length"], *, generator: torch.Generator | None
) -> Bool[Tensor, "batch length"]:
    """One random run of consecutive free positions per row, length uniform on 1..free positions.

    Args:
        is_free: Positions that may be masked; positions that are not free do not interrupt a run.
        generator: Source of all randomness.
    """
    draws = _uniforms(is_free.new_empty(len(is_free), 2), generator)
    free = is_free.sum(dim=1)
    length = _below(draws[:, 0], free) + 1
    start = _below(draws[:, 1], free - length + 1)
    rank = is_free.cumsum(dim=1) - 1
    return is_free & (rank >= start[:, None]) & (rank < (start + length)[:, None])


def _runs(batch: int, size: int, generator: torch.Generator | None) -> Bool[Tensor, "batch size"]:
    """One run per row within `size` positions."""
    device = torch.device("cpu") if generator is None else generator.device
    is_free = torch.ones(batch, size, dtype=torch.bool, device=device)
    return span_mask(is_free, generator=generator)


def _below(uniforms: Float[Tensor, " batch"], limits: Int[Tensor, " batch"]) -> Tensor:
    """Uniform integers in 0..limits - 1 (0 where the limit is 0)."""
    return torch.minimum((uniforms * limits).long(), (limits - 1).clamp(min=0))


def _uniforms(
    like: Bool[Tensor, "batch length"], generator: torch.Generator | None
) -> Float[Tensor, "batch length"]:
    """Float64 numbers in [0, 1), drawn on the generator's device and moved to that of `like`."""
    device = torch.device("cpu") if generator is None else generator.device
    draws = torch.rand(like.shape, generator=generator, dtype=torch.float64, device=device)
    return draws.to(like.device)
