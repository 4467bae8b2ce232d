"""Key-value caches for denoising, one interface; the exact prefix cache.

A token's keys and values are final iff its id, noise level and position are final and everything it
may attend to is final, recursively. So columns whose order lies below every free position's order
(in every row) may be computed once: they never see anything that still changes.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from multimodal_dlm.errors import ConfigError
from multimodal_dlm.models.attention_plan import AttentionPlan


@dataclass(frozen=True)
class PrefixCacheConfig:
    """Asks for the exact prefix cache: `transformer.enable_cache(PrefixCacheConfig())`."""


class PrefixCache:
    """Exact cache of the closed columns of one canvas.

    Args:
        plan: Plan of the canvas.
        is_free: Positions the sampler may write, (batch, length).
    """

    def __init__(self, plan: AttentionPlan, is_free: Bool[Tensor, "batch length"]) -> None:
        lowest = torch.where(is_free, plan.order, plan.order.max() + 1).amin(dim=1, keepdim=True)
        is_closed = ((plan.order < lowest) | plan.is_padding).all(dim=0)
        self.closed = is_closed.nonzero().flatten()
        self.open = (~is_closed).nonzero().flatten()
        self.plan = plan.select(self.open, self.closed)
        self.keys_values: list[tuple[Tensor, Tensor]] = []
        self.closed_states: Tensor | None = None

    @property
    def is_filled(self) -> bool:
        """True once the first forward has stored the closed columns."""
        return self.closed_states is not None

    def store(self, keys: Tensor, values: Tensor) -> None:
        """Keep the closed columns of one layer, called layer by layer in the first forward."""
        self.keys_values.append((keys[:, self.closed].detach(), values[:, self.closed].detach()))

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the closed columns followed by those of the open ones."""
        closed_keys, closed_values = self.keys_values[layer]
        return torch.cat([closed_keys, keys], dim=1), torch.cat([closed_values, values], dim=1)

    def finish(self, hidden_states: Tensor) -> Tensor:
        """Hidden states of the whole canvas, whichever columns were computed."""
        if self.closed_states is None:
            self.closed_states = hidden_states[:, self.closed].detach()
            return hidden_states
        length = len(self.closed) + len(self.open)
        whole = hidden_states.new_empty(hidden_states.shape[0], length, hidden_states.shape[-1])
        whole[:, self.closed] = self.closed_states.to(whole.dtype)
        whole[:, self.open] = hidden_states
        return whole

    def invalidate(self) -> None:
        """Forget everything; the next forward computes the whole canvas again."""
        self.keys_values.clear()
        self.closed_states = None


def build_cache(
    config: object, plan: AttentionPlan, is_free: Bool[Tensor, "batch length"]
) -> PrefixCache:
    """The cache that a config asks for."""
    if isinstance(config, PrefixCacheConfig):
        return PrefixCache(plan, is_free)
    raise ConfigError(
        f"Unknown cache config `{type(config).__name__}`. Available: `PrefixCacheConfig`."
    )
