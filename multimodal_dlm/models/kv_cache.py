"""Key-value caches for denoising, one interface; the exact prefix cache.

A token's keys and values are final iff its id, noise level and position are final and everything it
may attend to is final, recursively. So columns whose order lies below every free position's order
(in every row) may be computed once: they never see anything that still changes.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from multimodal_dlm.errors import ConfigError
from multimodal_dlm.models.attention_plan import AttentionPlan


@dataclass(frozen=True)
class PrefixCacheConfig:
    """Asks for the exact prefix cache: `transformer.enable_cache(PrefixCacheConfig())`."""


class PrefixCache:
    """Exact cache of the closed columns of one canvas.

    The first forward computes every column and keeps the closed ones; later forwards compute the
    open ones. Tensors are kept without gradients.

    Args:
        plan: Plan of the canvas.
        is_free: Positions the sampler may write, (batch, length).
    """

    def __init__(self, plan: AttentionPlan, is_free: Bool[Tensor, "batch length"]) -> None:
        if is_free.shape != plan.order.shape:
            raise ConfigError(
                f"`is_free` must have the plan's shape {tuple(plan.order.shape)}; got"
                f" {tuple(is_free.shape)}."
            )
        beyond = plan.order.max() + 1
        lowest = torch.where(is_free, plan.order, beyond).amin(dim=1, keepdim=True)
        is_closed = ((plan.order < lowest) | plan.is_padding).all(dim=0)
        self.closed: Int[Tensor, " closed"] = is_closed.nonzero().flatten()
        self.open: Int[Tensor, " open"] = (~is_closed).nonzero().flatten()
        self.plan = plan.select(self.open, self.closed)
        self._keys_values: dict[int, tuple[Tensor, Tensor]] = {}
        self._closed_states: Tensor | None = None

    @property
    def length(self) -> int:
        """Columns of the canvas."""
        return len(self.closed) + len(self.open)

    @property
    def is_filled(self) -> bool:
        """True once a forward has stored the closed columns."""
        return self._closed_states is not None

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values one layer attends to, (batch, columns, heads, dim).

        In the first forward the closed columns are kept and the arguments come back; later the
        kept columns come first, followed by the arguments.
        """
        if not self.is_filled:
            self._keys_values[layer] = (
                keys[:, self.closed].detach(),
                values[:, self.closed].detach(),
            )
            return keys, values
        closed_keys, closed_values = self._keys_values[layer]
        return torch.cat([closed_keys, keys], dim=1), torch.cat([closed_values, values], dim=1)

    def finish(self, hidden_states: Tensor) -> Tensor:
        """Hidden states of the whole canvas, whichever columns were computed."""
        if self._closed_states is None:
            self._closed_states = hidden_states[:, self.closed].detach()
            return hidden_states
        shape = (hidden_states.shape[0], self.length, hidden_states.shape[-1])
        whole = hidden_states.new_empty(shape)
        whole[:, self.closed] = self._closed_states.to(whole.dtype)
        whole[:, self.open] = hidden_states
        return whole

    def invalidate(self, rows: Tensor | None = None, start: int = 0) -> None:
        """Forget what a changed canvas made stale; the next forward computes all columns again.

        Args:
            rows: Rows that changed; None for all. Columns are shared by rows, so one changed row
                makes the forward whole.
            start: First column that changed; nothing is forgotten when every closed column lies
                before it and the canvas kept its length.
        """
        has_rows = rows is None or rows.numel() > 0
        if has_rows and bool((self.closed >= start).any()):
            self._keys_values.clear()
            self._closed_states = None


def build_cache(
    config: object, plan: AttentionPlan, is_free: Bool[Tensor, "batch length"]
) -> PrefixCache:
    """The cache that a config asks for."""
    if isinstance(config, PrefixCacheConfig):
        return PrefixCache(plan, is_free)
    raise ConfigError(
        f"Unknown cache config `{type(config).__name__}`. Available: `PrefixCacheConfig`."
    )
