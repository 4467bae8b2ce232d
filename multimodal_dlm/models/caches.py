"""Which cache a config asks for."""

from typing import Any

from jaxtyping import Bool
from torch import Tensor

from multimodal_dlm.models.approximate_cache import ApproximateCacheConfig
from multimodal_dlm.models.attention_plan import AttentionPlan
from multimodal_dlm.models.cache_base import KeyValueCache
from multimodal_dlm.models.kv_cache import ExactCache, ExactCacheConfig
from multimodal_dlm.models.prefix_memory import PrefixMemory

CACHE_CONFIGS: tuple[type, ...] = (ExactCacheConfig, ApproximateCacheConfig)


class CacheChoice:
    """The config given to `enable_cache`, and what is kept between the canvases it serves."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self.memory = PrefixMemory(config.num_prefixes if _is_exact(config) else 0)

    def build(
        self, model: Any, plan: AttentionPlan, is_free: Bool[Tensor, "batch length"]
    ) -> KeyValueCache | None:
        """The cache of one canvas; None where an exact one could keep nothing (full attention)."""
        if not _is_exact(self.config):
            return self.config.build(model, plan, is_free)
        if not bool((plan.order != plan.order[:, :1]).any()):
            return None
        memory = None
        if self.memory.capacity and _has_fixed_weights(model):
            self.memory.check(model)
            memory = self.memory
        shift = int(model.config["logits_shift"])
        return ExactCache(plan, is_free, logits_shift=shift, memory=memory)


def _has_fixed_weights(model: Any) -> bool:
    """False with adapters, which are switched without a trace, and where weights are elsewhere."""
    return (
        not getattr(model, "_hf_peft_config_loaded", False)
        and not any(parameter.is_meta for parameter in model.parameters())
        and not any(hasattr(m, "active_adapters") for m in model.modules() if m is not model)
    )


def _is_exact(config: Any) -> bool:
    return isinstance(config, ExactCacheConfig)
