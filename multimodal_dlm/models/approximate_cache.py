"""Approximate caches for models whose tokens all see each other (`condition_attention: full`).

Under full attention every token's keys depend on every other token, so none is ever final. These
caches compute some columns of a forward and let them attend to the keys the others had when they
were last computed. What they differ in is which columns: one class each says it in `_columns`. All
of them refresh what has grown old: a column is computed again once more than `refresh_share` of the
free tokens changed since its key was computed, and everything every `refresh_interval` forwards.
`evaluation.cache_divergence` measures what that costs.
"""

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from multimodal_dlm.errors import ConfigError
from multimodal_dlm.models.attention_plan import AttentionPlan
from multimodal_dlm.models.cache_base import Compute, KeyValueCache, Tokens, previous_columns


@dataclass(frozen=True, kw_only=True)
class ApproximateCacheConfig:
    """What all approximate caches have in common.

    Args:
        refresh_share: Share of the free tokens, in (0, 1], that may change before a key that was
            computed earlier is computed again.
        refresh_interval: Forwards after which everything is computed again; None for never.

    Raises:
        ConfigError: When an option is out of range.
    """

    refresh_share: float = 0.25
    refresh_interval: int | None = None
    cache: ClassVar[type["ApproximateCache"]]

    def __post_init__(self) -> None:
        if not 0.0 < self.refresh_share <= 1.0:
            raise ConfigError(
                f"`refresh_share` must be in (0, 1]; got {self.refresh_share}. Use 1.0 to let"
                " everything change."
            )
        if self.refresh_interval is not None and self.refresh_interval < 1:
            raise ConfigError(
                f"`refresh_interval` must be 1 or more; got {self.refresh_interval}. Use None for"
                " no regular refresh."
            )


class ApproximateCache(KeyValueCache):
    """Keys, values and states of all columns as they were last computed.

    Args:
        config: Options.
        plan: Plan of the canvas.
        is_free: Positions the sampler may write.
        logits_shift: 1 where a token is read from the state of the one before it.
    """

    def __init__(
        self,
        config: Any,
        plan: AttentionPlan,
        is_free: Bool[Tensor, "batch length"],
        *,
        logits_shift: int = 0,
    ) -> None:
        self.config = config
        self.is_free = is_free
        self.num_columns_computed = 0
        self._whole = plan
        self._shift = logits_shift
        self._read: Bool[Tensor, " length"] = torch.ones_like(is_free[0])
        self._open = torch.arange(self.length, device=is_free.device)
        self._ids: Int[Tensor, "batch length"] | None = None
        self._states: Tensor | None = None
        self._keys_values: dict[int, tuple[Tensor, Tensor]] = {}
        self._num_forwards = 0
        # Tokens changed in the run so far, and how many had when each key was computed.
        self._num_changed = torch.zeros(len(is_free), dtype=torch.long, device=is_free.device)
        self._changed_before = torch.zeros_like(is_free, dtype=torch.long)

    @property
    def length(self) -> int:
        """Columns of the canvas."""
        return self._whole.order.shape[1]

    def read(self, columns: Sequence[int] | slice) -> None:
        """Say which columns' logits the next forwards are for."""
        is_read = torch.zeros_like(self._read)
        is_read[columns] = True
        if self._shift:  # What is read is the state of the token before.
            sources = previous_columns(self._whole.is_padding)[:, is_read]
            is_read[sources.flatten()] = True
        self._read = is_read

    def run(self, compute: Compute, tokens: Tokens) -> Float[Tensor, "batch length width"]:
        """States of the whole canvas, those not computed now as they were last computed.

        The next forward writes into them.
        """
        if tokens.noise_levels.shape[1] != self.length:
            raise ConfigError(
                f"`kv_cache` was made for {self.length} columns; got"
                f" {tokens.noise_levels.shape[1]}. Make a new one with `new_cache`."
            )
        is_masked = self.is_free & (tokens.noise_levels > 0)
        is_changed = self._note_changes(tokens.input_ids)
        interval = self.config.refresh_interval
        is_due = interval is not None and self._num_forwards % interval == 0
        if self._states is None or is_due:
            is_open = torch.ones_like(self._read)
        else:
            is_open = self._columns(is_masked, is_changed) | self._old()
        is_open &= ~self._whole.is_padding.all(dim=0)
        self._open = is_open.nonzero().flatten()
        plan = self._whole.queries_at(self._open)
        states = compute(tokens.select(self._open), plan, self).detach()
        if self._states is None:
            self._states = states.new_zeros((len(states), self.length, states.shape[-1]))
        self._states[:, self._open] = states
        self._changed_before[:, self._open] = self._num_changed[:, None]
        self._num_forwards += 1
        self.num_columns_computed += len(self._open)
        return self._states

    def _note_changes(self, input_ids: Tensor | None) -> Bool[Tensor, "batch length"]:
        """Which tokens are not what they were at the last forward."""
        if input_ids is None or self._ids is None:
            is_changed = torch.zeros_like(self.is_free)
        else:
            is_changed = input_ids != self._ids
        self._ids = None if input_ids is None else input_ids.clone()
        self._num_changed = self._num_changed + is_changed.sum(dim=1)
        return is_changed

    def _old(self) -> Bool[Tensor, " length"]:
        """Columns whose keys were computed too many changes ago, in some row."""
        age = self._num_changed[:, None] - self._changed_before
        limit = self.config.refresh_share * self.is_free.sum(dim=1, keepdim=True)
        return ((age > limit) & ~self._whole.is_padding).any(dim=0)

    @abstractmethod
    def _columns(
        self, is_masked: Bool[Tensor, "batch length"], is_changed: Bool[Tensor, "batch length"]
    ) -> Bool[Tensor, " length"]:
        """The columns to compute in a forward that is not a refresh."""

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write the new keys and values in their places; all of them are attended to."""
        if layer not in self._keys_values:
            shape = (keys.shape[0], self.length, *keys.shape[2:])
            self._keys_values[layer] = (keys.new_zeros(shape), values.new_zeros(shape))
        whole_keys, whole_values = self._keys_values[layer]
        whole_keys[:, self._open] = keys.detach()
        whole_values[:, self._open] = values.detach()
        return whole_keys, whole_values

    def select_rows(self, rows: Int[Tensor, " rows"]) -> None:
        """Go on with some of the rows."""
        self._whole = self._whole.select_rows(rows)
        for name in ("is_free", "_num_changed", "_changed_before", "_ids", "_states"):
            value = getattr(self, name)
            setattr(self, name, None if value is None else value[rows])
        self._keys_values = {
            layer: (keys[rows], values[rows]) for layer, (keys, values) in self._keys_values.items()
        }


class PrefixCache(ApproximateCache):
    """Keeps what stands left of the window that is written; see `PrefixCacheConfig`."""

    def _columns(self, is_masked: Tensor, is_changed: Tensor) -> Tensor:
        first = int(self._read.to(torch.int8).argmax())
        return torch.arange(self.length, device=self._read.device) >= first


class DualCache(ApproximateCache):
    """Keeps everything but the window that is written; see `DualCacheConfig`."""

    def _columns(self, is_masked: Tensor, is_changed: Tensor) -> Tensor:
        return self._read


class DelayedCache(ApproximateCache):
    """Keeps a token from one forward after it was written; see `DelayedCacheConfig`."""

    def _columns(self, is_masked: Tensor, is_changed: Tensor) -> Tensor:
        return (is_masked | is_changed).any(dim=0)


class FeatureCache(ApproximateCache):
    """Computes the tokens whose surroundings moved most; see `FeatureCacheConfig`."""

    def _columns(self, is_masked: Tensor, is_changed: Tensor) -> Tensor:
        is_response = self.is_free.any(dim=0)
        interval = self.config.prompt_interval
        is_prompt_due = interval is not None and self._num_forwards % interval == 0
        count = math.ceil(self.config.share * int(is_response.sum()))
        age = (self._num_changed[:, None] - self._changed_before).amax(dim=0)
        # The oldest first; of equals a written token goes before a mask.
        rank = age * 2 + (~is_masked).all(dim=0)
        chosen = rank.masked_fill(~is_response, -1).topk(count).indices
        is_open = is_changed.any(dim=0)
        is_open[chosen] = True
        return is_open | (~is_response & is_prompt_due)


@dataclass(frozen=True, kw_only=True)
class PrefixCacheConfig(ApproximateCacheConfig):
    """Keep the columns left of the window that is written (Wu et al. 2025, arXiv 2505.22618)."""

    cache = PrefixCache


@dataclass(frozen=True, kw_only=True)
class DualCacheConfig(ApproximateCacheConfig):
    """Keep the columns on both sides of the window that is written (the same, section 3.2)."""

    cache = DualCache


@dataclass(frozen=True, kw_only=True)
class DelayedCacheConfig(ApproximateCacheConfig):
    """Keep a token one forward after it was written (dKV-Cache, Ma et al. 2025, arXiv 2505.15781).

    A token's keys move most in the forward after it is written, so that one still computes it.
    """

    refresh_interval: int | None = 8
    cache = DelayedCache


@dataclass(frozen=True, kw_only=True)
class FeatureCacheConfig(ApproximateCacheConfig):
    """Partial refresh of the response, rare refresh of the prompt (dLLM-Cache, arXiv 2506.06295).

    The paper picks tokens by how far their values moved; here they are picked by how many tokens
    changed since theirs were computed, which needs no forward to find out.

    Args:
        prompt_interval: Forwards between refreshes of what is not free; None for never.
        share: Share of the free columns computed at least, in (0, 1].
    """

    prompt_interval: int | None = 25
    share: float = 0.25
    refresh_share: float = 1.0
    refresh_interval: int | None = 8
    cache = FeatureCache

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_share(self.share)


def _check_share(share: float) -> None:
    if not 0.0 < share <= 1.0:
        raise ConfigError(f"`share` must be in (0, 1]; got {share}. Use 1.0 to compute all.")
