"""Exact key-value caches for denoising in any order.

A token's keys and values are final iff its id, noise level and position are final and everything it
may attend to is final, recursively. A token attends to orders up to its own, and a noise group
opens when every free group of lower order is closed. So the columns below the lowest order that
still has a free mask are final: the condition before the first step, then one block after the other
(Arriola et al. 2025, arXiv 2503.09573, section 3). Columns above the order that is being written
are neither seen nor written yet, and are not computed at all.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from multimodal_dlm.errors import ConfigError
from multimodal_dlm.models.attention_plan import AttentionPlan


@dataclass(frozen=True)
class ExactCacheConfig:
    """Asks for the exact cache: `transformer.enable_cache(ExactCacheConfig())`."""


class ExactCache:
    """Keys and values of the final columns of one canvas; nothing in it is approximate.

    A forward computes the open columns, and with them those that have become final since the last
    one: the forward that commits a block is the first forward of the next block. The ids of kept
    columns are compared at every forward, so a canvas that was changed behind the cache's back
    starts it anew. No gradients flow through a forward with the cache.

    Args:
        plan: Plan of the canvas.
        is_free: Positions the sampler may write, (batch, length).

    Raises:
        ConfigError: When the shapes differ.
    """

    def __init__(self, plan: AttentionPlan, is_free: Bool[Tensor, "batch length"]) -> None:
        if is_free.shape != plan.order.shape:
            raise ConfigError(
                f"`is_free` must have the plan's shape {tuple(plan.order.shape)}; got"
                f" {tuple(is_free.shape)}."
            )
        self.is_free = is_free
        self.plan = plan  # Of the present forward: open queries, kept keys first.
        self._whole = plan
        self._beyond = int(plan.order.max()) + 1 if plan.order.numel() else 0
        self._current: int | None = None
        self._reach = -1
        self._wanted = -1
        self.open: Int[Tensor, " open"] = torch.arange(self.length, device=is_free.device)
        self._forget()

    def _forget(self) -> None:
        self.kept: Int[Tensor, " kept"] = self._whole.order.new_zeros(0)
        self._kept_ids: Int[Tensor, "batch kept"] | None = None
        self._num_final = 0
        self._current = None
        self._keys_values: dict[int, tuple[Tensor, Tensor]] = {}
        self._states: Tensor | None = None

    @property
    def length(self) -> int:
        """Columns of the canvas."""
        return self._whole.order.shape[1]

    def reach(self, order: int) -> None:
        """Ask the next forwards for the columns up to an order, whatever waits below it.

        Without it they compute up to the lowest order with a free mask.
        """
        self._reach = order

    def begin(
        self,
        noise_levels: Float[Tensor, "batch length"],
        input_ids: Int[Tensor, "batch length"] | None = None,
    ) -> Int[Tensor, " open"]:
        """The columns this forward must compute, final ones first; sets `plan` to theirs.

        Args:
            noise_levels: Level of each token; above 0 where it is masked.
            input_ids: Ids, to notice a changed canvas; None with embeddings, whose caller must not
                change final columns.

        Raises:
            ConfigError: When the canvas has another length than the cache was made for.
        """
        if noise_levels.shape[1] != self.length:
            raise ConfigError(
                f"`kv_cache` was made for {self.length} columns; got {noise_levels.shape[1]}. Make"
                " a new one with `new_cache`."
            )
        order, padding = self._whole.order, self._whole.is_padding
        is_waiting = self.is_free & (noise_levels > 0)
        current = int(order.masked_fill(~is_waiting, self._beyond).min()) if order.numel() else 0
        if self._is_stale(current, input_ids):
            self._forget()
        wanted = max(current, self._reach)
        if (current, wanted) != (self._current, self._wanted):
            is_final = ((order < current) | padding).all(dim=0)
            is_open = ((order <= wanted) & ~padding).any(dim=0)
            is_open[self.kept] = False
            final = (is_final & is_open).nonzero().flatten()
            self.open = torch.cat([final, (is_open & ~is_final).nonzero().flatten()])
            self.plan = self._whole.select(self.open, self.kept)
            self._num_final, self._current, self._wanted = len(final), current, wanted
        if input_ids is not None and self._num_final:
            ids = input_ids[:, self.open[: self._num_final]]
            known = [] if self._kept_ids is None else [self._kept_ids]
            self._kept_ids = torch.cat([*known, ids], dim=1)
        return self.open

    def _is_stale(self, current: int, input_ids: Tensor | None) -> bool:
        """True when a kept column is no longer what it was."""
        if self._current is not None and current < self._current:
            return True
        if input_ids is None or self._kept_ids is None:
            return False
        return not torch.equal(input_ids[:, self.kept], self._kept_ids)

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values one layer attends to: the kept ones, then those of this forward.

        Args:
            layer: Index of the block.
            keys: Of the open columns, (batch, open, heads, dim).
            values: The same.
        """
        if layer not in self._keys_values:
            shape = (keys.shape[0], self.length, *keys.shape[2:])
            self._keys_values[layer] = (keys.new_empty(shape), values.new_empty(shape))
        first, last = len(self.kept), len(self.kept) + keys.shape[1]
        whole_keys, whole_values = self._keys_values[layer]
        whole_keys[:, first:last] = keys.detach()
        whole_values[:, first:last] = values.detach()
        return whole_keys[:, :last], whole_values[:, :last]

    def finish(self, hidden_states: Float[Tensor, "batch open width"]) -> Tensor:
        """States of the whole canvas, 0 in columns that have not been computed yet."""
        if self._states is None:
            shape = (hidden_states.shape[0], self.length, hidden_states.shape[-1])
            self._states = hidden_states.new_zeros(shape)
        self._states[:, self.open] = hidden_states.detach()
        if self._num_final:
            self.kept = torch.cat([self.kept, self.open[: self._num_final]])
            self.open = self.open[self._num_final :]
            self.plan = self._whole.select(self.open, self.kept)
            self._num_final = 0
        return self._states.clone()


def build_cache(
    config: object, plan: AttentionPlan, is_free: Bool[Tensor, "batch length"]
) -> ExactCache | None:
    """The cache that a config asks for; None where nothing can ever be kept (full attention)."""
    if isinstance(config, ExactCacheConfig):
        has_orders = bool((plan.order != plan.order[:, :1]).any())
        return ExactCache(plan, is_free) if has_orders else None
    raise ConfigError(
        f"Unknown cache config `{type(config).__name__}`. Available: `ExactCacheConfig`."
    )
