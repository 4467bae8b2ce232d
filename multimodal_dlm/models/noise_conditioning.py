"""Noise level -> modulation of the blocks.

For absorbing noise the number of masks already tells the level (Ou et al. 2024, arXiv 2406.03736,
Theorem 1), so conditioning can only help a finite model; uniform noise needs it.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from multimodal_dlm.errors import unknown_name

NUM_LEVELS = 257
NOISE_CONDITIONINGS = ("ada_norm_single", "additive", "none")
_NUM_FREQUENCIES = 128


def level_index(noise_levels: Float[Tensor, "batch length"]) -> Tensor:
    """ceil(256 x level): 257 rows, and a masked token is never row 0."""
    return torch.ceil(noise_levels * (NUM_LEVELS - 1)).long().clamp(0, NUM_LEVELS - 1)


class LevelEmbedding(nn.Module):
    """Sinusoidal features of the level through a two-layer network, zero at the start.

    Args:
        hidden_size: Width of the network.
        out_features: Width of the result.
    """

    def __init__(self, *, hidden_size: int, out_features: int) -> None:
        super().__init__()
        self.linear_in = nn.Linear(2 * _NUM_FREQUENCIES, hidden_size)
        self.linear_out = nn.Linear(hidden_size, out_features)
        nn.init.zeros_(self.linear_out.weight)
        nn.init.zeros_(self.linear_out.bias)

    def forward(self, index: Tensor) -> Tensor:
        """Row numbers (n,) -> features (n, out_features)."""
        steps = torch.arange(_NUM_FREQUENCIES, device=index.device, dtype=torch.float64)
        frequencies = torch.exp(steps * (-math.log(10_000.0) / _NUM_FREQUENCIES))
        angles = index.double()[:, None] * (1000.0 / (NUM_LEVELS - 1)) * frequencies
        features = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.linear_out(F.silu(self.linear_in(features.to(self.linear_in.weight.dtype))))


class NoiseConditioning(nn.Module):
    """What a backbone needs of the noise levels, for each way of conditioning.

    `ada_norm_single` (Chen et al. 2023, arXiv 2310.00426, section 2.3) gives six factors a block:
    one network for all blocks and a learned offset per block. `additive` adds an embedding to
    masked tokens. `none` does nothing. The network runs on the levels present only.

    Args:
        kind: `ada_norm_single`, `additive` or `none`.
        hidden_size: Width of the backbone.
    """

    def __init__(self, *, kind: str, hidden_size: int) -> None:
        super().__init__()
        if kind not in NOISE_CONDITIONINGS:
            raise unknown_name("noise_conditioning", kind, NOISE_CONDITIONINGS)
        self.kind = kind
        if kind != "none":
            width = 6 * hidden_size if kind == "ada_norm_single" else hidden_size
            self.level_embedding = LevelEmbedding(hidden_size=hidden_size, out_features=width)

    def forward(
        self,
        noise_levels: Float[Tensor, "batch length"],
        conditioning_embeds: Float[Tensor, "batch width"] | None = None,
    ) -> "Modulation | None":
        """The modulation shared by all blocks, or None."""
        if self.kind == "none":
            return None
        index = level_index(noise_levels)
        if conditioning_embeds is None:
            rows, inverse = index.unique(return_inverse=True)
            return Modulation(self.level_embedding(rows), inverse, noise_levels > 0)
        batch = torch.arange(index.shape[0], device=index.device)[:, None]
        keys, inverse = (batch * NUM_LEVELS + index).unique(return_inverse=True)
        extra = conditioning_embeds[keys // NUM_LEVELS]
        features = self.level_embedding(keys % NUM_LEVELS)
        repeat = features.shape[-1] // extra.shape[-1]
        return Modulation(features + extra.repeat(1, repeat), inverse, noise_levels > 0)


class Modulation:
    """Features of the levels present, and which of them each token takes.

    Args:
        features: (levels, width).
        inverse: Row of `features` for each token, (batch, length).
        is_noisy: Tokens whose level is above zero, (batch, length).
    """

    def __init__(self, features: Tensor, inverse: Tensor, is_noisy: Tensor) -> None:
        self.features = features
        self.inverse = inverse
        self.is_noisy = is_noisy

    def block_factors(self, offset: Float[Tensor, "six width"]) -> tuple[Tensor, ...]:
        """Shift, scale and gate of the attention and of the MLP, each (batch, length, width)."""
        rows = self.features + offset.flatten().to(self.features.dtype)
        return F.embedding(self.inverse, rows).chunk(6, dim=-1)

    def token_embedding(self) -> Tensor:
        """What `additive` adds: the level's embedding on noisy tokens, zero elsewhere."""
        return F.embedding(self.inverse, self.features) * self.is_noisy.unsqueeze(-1)

    def select(self, columns: Tensor) -> "Modulation":
        """The modulation of some columns."""
        return Modulation(self.features, self.inverse[:, columns], self.is_noisy[:, columns])
