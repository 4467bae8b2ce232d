"""Drawing noise levels for a batch: numbers u in [0, 1], and mask counts from them.

A stratified or low-discrepancy batch covers all noise levels, which removes most of the variance
that the level adds to the loss. Every function returns its numbers in random order. Draw once for
each modality and each task: two modalities that shared one sequence would keep a constant
difference of noise levels within a batch, so most of the (t_text, t_image) square would never be
seen together. What a count or a level does to tokens is the forward process.
"""

from collections.abc import Hashable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from multimodal_dlm.diffusion.mask_schedules import MaskSchedule
from multimodal_dlm.errors import ConfigError


def stratified_uniforms(count: int, *, generator: torch.Generator | None) -> Float[Tensor, " n"]:
    """One uniform number in each of `count` equal strata of [0, 1), in random order, float64.

    Number i of the permuted batch is (i + u_i) / count with its own u_i, so each number alone is
    uniform on [0, 1) and the batch has exactly one in each stratum.

    Args:
        count: How many numbers, 0 or more.
        generator: Source of all randomness; its device is where the draws are made.
    """
    device = _device(generator)
    offsets = torch.rand(count, generator=generator, dtype=torch.float64, device=device)
    order = torch.randperm(count, generator=generator, device=device)
    # (count - 1 + u) / count may round up to 1; the largest double below 1 stays in [0, 1).
    return ((order + offsets) / max(count, 1)).clamp(max=1 - 2**-53)


def low_discrepancy_uniforms(
    count: int, *, generator: torch.Generator | None
) -> Float[Tensor, " n"]:
    """The numbers (u + i / count) mod 1 with one shared u, in random order, float64.

    Equal spacing instead of independent offsets: less variance within a batch than stratified
    numbers, but all numbers are functions of one draw (Kingma et al. 2021, arXiv 2107.00630,
    appendix I.1).

    Args:
        count: How many numbers, 0 or more.
        generator: Source of all randomness.
    """
    device = _device(generator)
    start = torch.rand(1, generator=generator, dtype=torch.float64, device=device)
    order = torch.randperm(count, generator=generator, device=device)
    return (start + order / max(count, 1)) % 1.0


def grouped_uniforms(
    groups: Sequence[Hashable], *, generator: torch.Generator | None
) -> Float[Tensor, " n"]:
    """Stratified numbers for rows of several kinds, such as tasks: each kind is stratified alone.

    Call it once per modality with the same groups: the permutations are independent, so within a
    task the levels of two modalities are too.

    Args:
        groups: Kind of each row of the global batch; kinds draw in order of first appearance.
        generator: Source of all randomness.
    """
    rows: dict[Hashable, list[int]] = {}
    for row, group in enumerate(groups):
        rows.setdefault(group, []).append(row)
    result = torch.zeros(len(groups), dtype=torch.float64, device=_device(generator))
    for members in rows.values():
        result[members] = stratified_uniforms(len(members), generator=generator)
    return result


def banded_uniforms(
    uniforms: Float[Tensor, "*shape"], low: float, high: float
) -> Float[Tensor, "*shape"]:
    """Squeeze uniform numbers into the band [low, high].

    A recipe, not a likelihood: a loss drawn from a band leaves out the other noise levels, so its
    NELBO is not a bound unless the band is all of [0, 1].

    Args:
        uniforms: Numbers in [0, 1].
        low: Lowest level, in [0, high).
        high: Highest level, at most 1.

    Raises:
        ConfigError: When the band is empty or leaves [0, 1].
    """
    if not 0.0 <= low < high <= 1.0:
        raise ConfigError(
            f"`low` and `high` must satisfy 0 <= low < high <= 1; got {low} and {high}."
            " Use 0 and 1 for all noise levels."
        )
    return low + (high - low) * uniforms


def counts_from_uniforms(
    uniforms: Float[Tensor, "*shape"], lengths: Int[Tensor, "*shape"]
) -> Int[Tensor, "*shape"]:
    """Mask counts k = ceil(u L), clipped to 1..L: uniform on 1..L when u is uniform.

    Computed in float64; 0 where L is 0 (nothing can be masked).

    Args:
        uniforms: Numbers in [0, 1].
        lengths: Free positions L of each window.
    """
    counts = torch.ceil(uniforms.double() * lengths).to(lengths.dtype)
    return torch.minimum(counts.clamp(min=1), lengths)


def scheduled_counts(
    uniforms: Float[Tensor, "*shape"], lengths: Int[Tensor, "*shape"], schedule: MaskSchedule
) -> tuple[Int[Tensor, "*shape"], Float[Tensor, "*shape"]]:
    """Mask counts k = ceil(m(u) L) of a mask rate m, and how likely each was.

    With the rate of `cosine` half of the windows are more than 70 % masks, as in half of the steps
    of a sampler that follows it (Chang et al. 2022, arXiv 2202.04200, section 3.3). A loss
    divided by L p(k) has the expectation that uniform counts give it.

    Args:
        uniforms: Numbers u in [0, 1).
        lengths: Free positions L of each window.
        schedule: Its mask rate m, linear for uniform counts.

    Returns:
        The counts, in 1..L (0 where L is 0), and p(k) = t(k / L) - t((k - 1) / L) in float64, t the
        inverse of m (1 where L is 0).
    """
    counts = counts_from_uniforms(schedule.mask_rate(uniforms.double()), lengths)
    size = lengths.clamp(min=1).double()
    upper, lower = counts / size, (counts - 1).clamp(min=0) / size
    # `inverse` has exact ends, where that of a steep schedule overflows.
    likely = schedule.inverse(1 - lower.clamp(max=1))
    likely = schedule.inverse(1 - upper.clamp(max=1)) - likely
    return counts, torch.where(lengths > 0, likely, torch.ones_like(likely))


def mean_scheduled_count(
    lengths: Int[Tensor, "*shape"], schedule: MaskSchedule
) -> Float[Tensor, "*shape"]:
    """Mean of the counts of `scheduled_counts`, in float64; 0 where L is 0."""
    longest = int(lengths.max()) if lengths.numel() else 0
    counts = torch.arange(longest, device=lengths.device)
    size = lengths.clamp(min=1).double()[..., None]
    # The mean of a count is the sum over k of the chance that it exceeds k.
    exceeds = 1 - schedule.inverse(1 - (counts / size).clamp(max=1))
    return (exceeds * (counts < lengths[..., None])).sum(dim=-1)


def _device(generator: torch.Generator | None) -> torch.device:
    return torch.device("cpu") if generator is None else generator.device
