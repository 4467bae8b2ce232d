"""Drawing mask counts: stratified over a batch, so that every batch covers all noise levels."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def stratified_uniforms(
    count: int, *, generator: torch.Generator | None = None
) -> Float[Tensor, " count"]:
    """One uniform number in each of `count` equal strata of [0, 1), in random order, float64.

    Call it once per modality and per task: two modalities that shared one draw would have a
    constant difference of noise levels within a batch.
    """
    offsets = torch.rand(count, generator=generator, dtype=torch.float64)
    order = torch.randperm(count, generator=generator)
    return (order.double() + offsets) / max(count, 1)


def low_discrepancy_uniforms(
    count: int, *, generator: torch.Generator | None = None
) -> Float[Tensor, " count"]:
    """(u + i / count) mod 1 for one u, in random order (Kingma et al. 2021, arXiv 2107.00630)."""
    start = torch.rand(1, generator=generator, dtype=torch.float64)
    order = torch.randperm(count, generator=generator)
    return (start + order.double() / max(count, 1)) % 1.0


def counts_from_uniforms(
    uniforms: Float[Tensor, "*shape"], lengths: Int[Tensor, "*shape"]
) -> Int[Tensor, "*shape"]:
    """k = ceil(u x L), clipped to 1..L (0 where L is 0): uniform on 1..L for uniform u."""
    counts = torch.ceil(uniforms.double() * lengths.double()).long()
    return torch.minimum(counts.clamp(min=1), lengths)
