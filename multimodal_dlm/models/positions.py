"""Rotary position embedding over several axes (sequence, row, column).

Su et al. 2021 (arXiv 2104.09864), in the rotate-half convention of Llama: with one axis the result
is Llama's. With several, each axis owns a share of the frequencies.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from multimodal_dlm.errors import ConfigError


@dataclass(frozen=True)
class Rotary:
    """Cosines and signed sines (-sin on the first half), (batch, length, rotary_dim).

    Args:
        cos: Cosines.
        sin: Signed sines.

    Attributes:
        by_head: Both as (batch, length, 1, rotary_dim).
    """

    cos: Float[Tensor, "batch length dim"]
    sin: Float[Tensor, "batch length dim"]
    by_head: tuple[Tensor, Tensor] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "by_head", (self.cos.unsqueeze(2), self.sin.unsqueeze(2)))


def check_axes(axes_dims: Sequence[int], rotary_dim: int) -> tuple[int, ...]:
    """Refuse axes that are odd or do not fill the rotary dimensions of a head."""
    axes = tuple(int(dim) for dim in axes_dims)
    if not axes or any(dim < 2 or dim % 2 for dim in axes):
        raise ConfigError(f"`axes_dims_rope` must be even and at least 2 each; got {axes}.")
    if sum(axes) != rotary_dim:
        raise ConfigError(
            "`axes_dims_rope` must sum to `head_dim` x `partial_rotary_factor`; got"
            f" {axes} with sum {sum(axes)} and {rotary_dim}. Use ({rotary_dim},) for one axis."
        )
    return axes


def rotary_tables(
    position_ids: Int[Tensor, "batch length axes"],
    *,
    axes_dims: Sequence[int],
    theta: float,
    dtype: torch.dtype = torch.float32,
) -> Rotary:
    """Angles position x theta^(-2i/dim) of every axis, side by side.

    The tables are made in float64 at every forward: a buffer would be cast by `model.to(bf16)`.

    Args:
        position_ids: Coordinates; only the first `len(axes_dims)` axes are read.
        axes_dims: Rotary dimensions owned by each axis.
        theta: Base of the geometric series of frequencies.
        dtype: Of the result.

    Raises:
        ConfigError: When `position_ids` has too few axes.
    """
    if position_ids.shape[-1] < len(axes_dims):
        raise ConfigError(
            f"`position_ids` must have {len(axes_dims)} axes; got {position_ids.shape[-1]}."
        )
    angles = []
    for axis, dim in enumerate(axes_dims):
        steps = torch.arange(0, dim, 2, dtype=torch.float64, device=position_ids.device)
        frequencies = torch.exp(steps * (-math.log(theta) / dim))
        angles.append(position_ids[..., axis, None].double() * frequencies)
    angle = torch.cat(angles, dim=-1)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    return Rotary(torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1))


def apply_rotary(
    heads: Float[Tensor, "batch length heads dim"], rotary: Rotary
) -> Float[Tensor, "batch length heads dim"]:
    """Rotate the first rotary dimensions of each head and leave the others alone."""
    cos, sin = rotary.by_head
    dim = cos.shape[-1]
    is_whole = dim == heads.shape[-1]
    turned = heads if is_whole else heads[..., :dim]
    rotated = torch.addcmul(turned * cos, turned.roll(dim // 2, dims=-1), sin)
    return rotated if is_whole else torch.cat([rotated, heads[..., dim:]], dim=-1)
