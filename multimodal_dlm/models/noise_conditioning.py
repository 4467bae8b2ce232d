"""Noise level -> modulation of the blocks.

For absorbing noise the number of masks already tells the level (Ou et al. 2024, arXiv 2406.03736,
Theorem 1), so conditioning can only help a finite model; uniform noise needs it.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from multimodal_dlm.errors import ConfigError, unknown_name

NUM_LEVELS = 257
NOISE_CONDITIONINGS = ("ada_norm_single", "additive", "none")
NUM_FREQUENCIES = 128
NUM_HALVES = 2  # Of a block.


def level_index(noise_levels: Float[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """ceil(256 x level): 257 rows, and a masked token is never row 0."""
    return torch.ceil(noise_levels * (NUM_LEVELS - 1)).long().clamp(0, NUM_LEVELS - 1)


@dataclass(frozen=True)
class Modulation:
    """Features of the levels present, and which of them each token takes.

    Args:
        features: One row for each level present, (rows, width).
        rows: Row of `features` for each token, (batch, length).
        known: Tables that earlier forwards made of the same features, by the parameter and the half
            they are for (halves of `level_tables`, which keep three tables each, count on after
            those of `token_tables`); None where nothing is kept.
    """

    features: Float[Tensor, "rows width"]
    rows: Int[Tensor, "batch length"]
    known: dict[tuple[Tensor, int], Any] | None = None

    def tables(self, offset: Float[Tensor, "six width"]) -> tuple[Tensor, ...]:
        """Shift, scale, gate of the attention and of the MLP, each (rows, width)."""
        return (self.features + offset.flatten().to(self.features.dtype)).chunk(6, dim=-1)

    def gatings(self, offset: Float[Tensor, "six width"]) -> "tuple[Gating, Gating]":
        """What the attention and the MLP of a block take."""
        known = self.known or {}
        is_known = (offset, 1) in known or (offset, 1 + NUM_HALVES) in known
        tables = () if is_known else self.tables(offset)
        return Gating(self, (offset, 0), tables[:3], []), Gating(self, (offset, 1), tables[3:], [])

    @cached_property
    def flat_rows(self) -> Int[Tensor, " tokens"]:
        """`rows` as one list."""
        return self.rows.flatten()

    @cached_property
    def short_rows(self) -> Int[Tensor, " tokens"]:
        """`flat_rows` as int32."""
        return self.flat_rows.int()

    @cached_property
    def one_hot(self) -> Float[Tensor, "rows tokens"]:
        """bf16 indicator of each token's row: a table's gradient is one product with it."""
        columns = torch.arange(self.features.shape[0], device=self.rows.device)
        return (columns[:, None] == self.flat_rows).to(torch.bfloat16)


class Gating(NamedTuple):
    """The part of a modulation that one half of a block takes.

    Attributes:
        modulation: Which row each token takes.
        key: The block's own offset and the half, by which a finished table is known.
        tables: Shift, scale and gate, (rows, width) each; none where a finished table is known.
        made: What `token_tables` gave, for the second time it is asked.
    """

    modulation: Modulation
    key: tuple[Tensor, int]
    tables: tuple[Tensor, ...]
    made: list[Tensor]

    @property
    def own(self) -> tuple[Tensor, ...]:
        """`tables`, also where a finished table is known."""
        offset, half = self.key
        return self.tables or self.modulation.tables(offset)[3 * half : 3 * half + 3]

    @property
    def shift(self) -> Float[Tensor, "rows width"]:
        """Added to the normalised token."""
        return self.own[0]

    @property
    def scale(self) -> Float[Tensor, "rows width"]:
        """1 + scale is multiplied into it before."""
        return self.own[1]

    @property
    def gate(self) -> Float[Tensor, "rows width"]:
        """1 + gate is multiplied into the half's output."""
        return self.own[2]


def token_tables(
    gating: Gating, weight: Float[Tensor, " width"], dtype: torch.dtype
) -> list[Tensor]:
    """Shift, weight x (1 + scale) and 1 + gate of each token, (batch, length, width) each.

    Args:
        gating: Of a half of a block.
        weight: Of the half's norm.
        dtype: Of the result.
    """
    if not gating.made:
        known = gating.modulation.known
        table = None if known is None else known.get(gating.key)
        if table is None:
            shift, scale, gate = gating.tables or gating.own
            table = torch.cat([shift, weight * (1 + scale), 1 + gate], dim=-1).to(dtype)
            if known is not None:
                known[gating.key] = table
        gating.made.extend(F.embedding(gating.modulation.rows, table).chunk(3, dim=-1))
    return gating.made


def level_tables(gating: Gating, weight: Float[Tensor, " width"]) -> tuple[Tensor, Tensor, Tensor]:
    """weight x (1 + scale), shift and 1 + gate of each level, in float32, (rows, width) each.

    Args:
        gating: Of a half of a block.
        weight: Of the half's norm.
    """
    known, (offset, half) = gating.modulation.known, gating.key
    key = offset, half + NUM_HALVES
    tables = None if known is None else known.get(key)
    if tables is None:
        shift, scale, gate = (part.float() for part in gating.own)
        tables = weight * (1 + scale), shift.contiguous(), 1 + gate
        if known is not None:
            known[key] = tables
    return tables


class NoiseConditioning(nn.Module):
    """What a backbone needs of the noise levels, for each way of conditioning.

    `ada_norm_single` (Chen et al. 2023, arXiv 2310.00426, section 2.3) gives six factors a block:
    one network for all blocks and a learned offset per block, all starting at zero. `additive` adds
    an embedding, zero at the start, to noisy tokens. `none` does nothing. The network runs on the
    levels present only.

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
            self.linear_in = nn.Linear(2 * NUM_FREQUENCIES, hidden_size)
            self.linear_mid = nn.Linear(hidden_size, hidden_size)
            self.linear_out = nn.Linear(hidden_size, width)
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Zero output: the network starts as `none`."""
        for layer in (self.linear_in, self.linear_mid):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.linear_out.weight)
        nn.init.zeros_(self.linear_out.bias)

    def forward(
        self,
        noise_levels: Float[Tensor, "batch length"],
        conditioning_embeds: Float[Tensor, "batch width"] | None = None,
    ) -> Modulation | None:
        """The modulation shared by all blocks, or None.

        Args:
            noise_levels: In [0, 1].
            conditioning_embeds: Added to the noise embedding of every token of a row.

        Raises:
            ConfigError: When there is no noise embedding to add `conditioning_embeds` to.
        """
        if self.kind == "none":
            if conditioning_embeds is not None:
                raise ConfigError(
                    "`conditioning_embeds` are added to the noise embedding, and this model has"
                    " `noise_conditioning` `none`. Use `ada_norm_single` or `additive`."
                )
            return None
        index = level_index(noise_levels)
        if conditioning_embeds is None:
            levels, rows = index.unique(return_inverse=True)
            return Modulation(self.features(levels), rows)
        row = torch.arange(index.shape[0], device=index.device)[:, None]
        keys, rows = (row * NUM_LEVELS + index).unique(return_inverse=True)
        extra = conditioning_embeds[keys // NUM_LEVELS]
        return Modulation(self.features(keys % NUM_LEVELS, extra), rows)

    def features(
        self, levels: Int[Tensor, " rows"], extra: Float[Tensor, "rows width"] | None = None
    ) -> Float[Tensor, "rows out"]:
        """Sinusoids of the level -> noise embedding (+ `extra`) -> factors."""
        steps = torch.arange(NUM_FREQUENCIES, device=levels.device, dtype=torch.float64)
        frequencies = torch.exp(steps * (-math.log(10_000.0) / NUM_FREQUENCIES))
        angles = levels.double()[:, None] * (1000.0 / (NUM_LEVELS - 1)) * frequencies
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.linear_in.weight.dtype)
        embedding = self.linear_mid(F.silu(self.linear_in(waves)))
        if extra is not None:
            embedding = embedding + extra.to(embedding.dtype)
        return self.linear_out(F.silu(embedding))

    def token_embedding(
        self, modulation: Modulation, is_noisy: Bool[Tensor, "batch length"]
    ) -> Float[Tensor, "batch length width"]:
        """What `additive` adds: the embedding on noisy tokens, zero elsewhere."""
        return F.embedding(modulation.rows, modulation.features) * is_noisy.unsqueeze(-1)
