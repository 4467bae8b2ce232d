"""Self-attention and its processor: the dispatcher of Diffusers, or plain matrix products.

`auto` chooses by device, dtype and length. Measured on two CPU cores: in bf16, for rows of up to
320 tokens, plain matmul + softmax trains 1.6 times faster than scaled_dot_product_attention, which
wins in float32 and on long rows. Every call names its backend, because Diffusers' setter also
changes a process-wide default.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from jaxtyping import Float
from torch import Tensor, nn

from multimodal_dlm.errors import BackendError, unknown_name
from multimodal_dlm.models.attention_plan import AttentionPlan
from multimodal_dlm.models.cache_base import LayerStore
from multimodal_dlm.models.fused import RotaryAttention, use_fused, wide_linear
from multimodal_dlm.models.positions import Rotary, apply_rotary

EAGER_MAX_LENGTH = 320
OWN_BACKENDS = ("auto", "eager")
CPU_BACKENDS = ("eager", "native", "_native_flash", "_native_math", "flex")
MASKED_BACKENDS = ("eager", "native", "_native_math", "_native_efficient", "flex", "xformers")


def available_backends() -> tuple[str, ...]:
    """Names that `set_attention_backend` takes."""
    return OWN_BACKENDS + tuple(backend.value for backend in AttentionBackendName)


def check_backend(name: str, device: torch.device, *, needs_mask: bool = False) -> str:
    """Return the name of a backend that can run.

    Args:
        name: A backend, `auto` included.
        device: Where it would run.
        needs_mask: The attention plan is not mask-free.

    Raises:
        ConfigError: When the name is unknown.
        BackendError: When it cannot take the device, the mask or gradients.
    """
    if name not in available_backends():
        raise unknown_name("attention backend", name, available_backends())
    if name == "auto":
        return name
    able: tuple[str, ...] = CPU_BACKENDS if device.type == "cpu" else available_backends()
    if name not in able:
        raise BackendError(
            f"Attention backend `{name}` does not run on the CPU, where the model is. Move the"
            f" model to a GPU first, or use one of: {_quoted(able)}."
        )
    masked = [backend for backend in able if backend in MASKED_BACKENDS]
    if needs_mask and name not in masked:
        raise BackendError(
            f"Attention backend `{name}` takes no mask, and this canvas needs one (padding, packed"
            f" documents or an attention order). Use one of: {_quoted(masked)}."
        )
    if name == "flex" and device.type == "cpu" and needs_mask and torch.is_grad_enabled():
        raise BackendError(
            "Attention backend `flex` has no gradient on the CPU. Use `eager` or `native` to train,"
            " or call the model under `torch.no_grad()`."
        )
    return name


def _quoted(names: Any) -> str:
    return ", ".join(f"`{name}`" for name in names)


class UnifiedAttnProcessor:
    """Computes attention for `UnifiedAttention` through a named backend (None is `auto`)."""

    _attention_backend: "str | AttentionBackendName | None" = None
    _parallel_config = None

    def __call__(
        self,
        attn: "UnifiedAttention",
        hidden_states: Float[Tensor, "batch length width"],
        rotary: Rotary,
        plan: AttentionPlan,
        kv_cache: LayerStore | None,
    ) -> Float[Tensor, "batch length width"]:
        """Queries of `hidden_states` against its own keys, and the cached ones if there are any."""
        qkv = wide_linear(attn.to_qkv, hidden_states)
        is_plain = kv_cache is None and attn.is_plain and rotary.cos.shape[-1] == attn.head_dim
        if is_plain and use_fused(qkv) and self.choose(qkv, plan, kv_cache) == "eager":
            parts = qkv.view(*qkv.shape[:2], -1, attn.head_dim)
            out = RotaryAttention.apply(parts, rotary.cos, rotary.sin, plan.bias(qkv.dtype))
            return attn.to_out(out)
        queries_keys, value = attn.split_heads(qkv)
        turned = apply_rotary(queries_keys, rotary)
        query, key = turned.split([attn.num_heads, attn.num_key_value_heads], dim=2)
        return attn.to_out(self.attend(attn, query, key, value, plan, kv_cache))

    def attend(
        self,
        attn: "UnifiedAttention",
        query: Float[Tensor, "batch length heads dim"],
        key: Float[Tensor, "batch length kv_heads dim"],
        value: Float[Tensor, "batch length kv_heads dim"],
        plan: AttentionPlan,
        kv_cache: LayerStore | None,
    ) -> Float[Tensor, "batch length inner"]:
        """Queries against the keys of their own forward, and the cached ones if there are any."""
        backend = self.choose(query, plan, kv_cache)
        if kv_cache is not None:
            key, value = kv_cache.update(attn.layer, key, value)
        if backend == "eager":
            out = eager_attention(query, key, value, plan.bias(query.dtype))
        elif backend == "native" and self._parallel_config is None:
            out = F.scaled_dot_product_attention(
                query.transpose(1, 2),
                key.transpose(1, 2),
                value.transpose(1, 2),
                attn_mask=None if plan.is_causal else plan.mask,
                is_causal=plan.is_causal,
                enable_gqa=attn.num_heads != attn.num_key_value_heads,
            ).transpose(1, 2)
        else:
            out = dispatch_attention_fn(
                query,
                key,
                value,
                attn_mask=plan.mask,
                enable_gqa=attn.num_heads != attn.num_key_value_heads,
                backend=AttentionBackendName(backend),
                parallel_config=self._parallel_config,
            )
        return out.flatten(2)

    def choose(self, states: Tensor, plan: AttentionPlan, kv_cache: LayerStore | None) -> str:
        """The name of the backend to use; `auto` resolved by device, dtype and length."""
        name = self._attention_backend
        if name is not None and name != "auto":
            chosen = name.value if isinstance(name, AttentionBackendName) else name
            return check_backend(chosen, states.device, needs_mask=plan.mask is not None)
        length = states.shape[1] if kv_cache is None else kv_cache.length
        is_short = length <= EAGER_MAX_LENGTH and self._parallel_config is None
        is_low = states.device.type == "cpu" and states.dtype == torch.bfloat16
        return "eager" if is_low and is_short else "native"


class UnifiedAttention(nn.Module, AttentionModuleMixin):
    """Grouped-query self-attention with rotary positions and one projection for Q, K and V.

    Args:
        hidden_size: Width of the model.
        num_heads: Query heads.
        num_key_value_heads: Key and value heads; divides `num_heads`.
        head_dim: Width of a head.
        qk_norm: RMS-normalise queries and keys per head.
        qkv_bias: Bias on the projection.
        eps: Of the normalisation.
        layer: Index of the block, the cache's key.
    """

    _default_processor_cls = UnifiedAttnProcessor
    _available_processors = [UnifiedAttnProcessor]
    _supports_qkv_fusion = False

    def __init__(
        self,
        *,
        hidden_size: int,
        num_heads: int,
        num_key_value_heads: int,
        head_dim: int,
        qk_norm: bool,
        qkv_bias: bool,
        eps: float,
        layer: int,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.layer = layer
        projected = (num_heads + 2 * num_key_value_heads) * head_dim
        self.to_qkv = nn.Linear(hidden_size, projected, bias=qkv_bias)
        self.to_out = nn.Linear(num_heads * head_dim, hidden_size, bias=False)
        self.norm_q = nn.RMSNorm(head_dim, eps=eps) if qk_norm else None
        self.norm_k = nn.RMSNorm(head_dim, eps=eps) if qk_norm else None
        self.set_processor(cast(Any, UnifiedAttnProcessor()))

    @property
    def is_plain(self) -> bool:
        """True without grouped queries and without query and key norms."""
        return self.norm_q is None and self.num_heads == self.num_key_value_heads

    def is_whole(self, rotary: Rotary) -> bool:
        """True where heads are only rotated, over their whole width, by the usual processor."""
        return (
            self.norm_q is None
            and rotary.cos.shape[-1] == self.head_dim
            and type(self.processor) is UnifiedAttnProcessor
        )

    def is_plain_eager(self, hidden_states: Tensor, rotary: Rotary, plan: AttentionPlan) -> bool:
        """True where this layer is plain and fully rotated, and its processor chooses `eager`."""
        processor = cast("UnifiedAttnProcessor", self.processor)
        return (
            self.is_plain
            and self.is_whole(rotary)
            and processor.choose(hidden_states, plan, None) == "eager"
        )

    def use_backend(self, name: str) -> None:
        """Choose the backend of this layer, see `check_backend`."""
        cast("UnifiedAttnProcessor", self.processor)._attention_backend = name

    def split_heads(self, qkv: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys side by side, normalised if asked for; values.

        Both are (batch, length, heads, head_dim).
        """
        heads = qkv.view(*qkv.shape[:2], -1, self.head_dim)
        count = self.num_heads + self.num_key_value_heads
        queries_keys, value = heads.split([count, self.num_key_value_heads], dim=2)
        if self.norm_q is not None and self.norm_k is not None:
            query, key = queries_keys.split([self.num_heads, self.num_key_value_heads], dim=2)
            normed = _cast_norm(self.norm_q, query), _cast_norm(self.norm_k, key)
            queries_keys = torch.cat(normed, dim=2)
        return queries_keys, value

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        plan: AttentionPlan,
        kv_cache: LayerStore | None,
    ) -> Tensor:
        """What the processor does between the projections; (batch, length, heads, dim) in."""
        processor = cast("UnifiedAttnProcessor", self.processor)
        return processor.attend(self, query, key, value, plan, kv_cache)

    def forward(
        self,
        hidden_states: Tensor,
        rotary: Rotary,
        plan: AttentionPlan,
        kv_cache: LayerStore | None = None,
    ) -> Tensor:
        """Attend under the plan; (batch, length, width) in and out."""
        processor = cast("UnifiedAttnProcessor", self.processor)
        return processor(self, hidden_states, rotary, plan, kv_cache)


def _cast_norm(norm: nn.RMSNorm, values: Tensor) -> Tensor:
    """RMSNorm with its weight in the dtype of `values`: float32 weights would leave bf16."""
    weight = norm.weight.to(values.dtype)
    return nn.functional.rms_norm(values, weight.shape, weight, norm.eps)


def eager_attention(
    query: Float[Tensor, "batch queries heads dim"],
    key: Float[Tensor, "batch keys kv_heads dim"],
    value: Float[Tensor, "batch keys kv_heads dim"],
    bias: Float[Tensor, "batch 1 queries keys"] | None,
) -> Float[Tensor, "batch queries heads dim"]:
    """softmax(Q K^T / sqrt(dim) + bias) V; the softmax kernel works in float32 or better."""
    groups = query.shape[2] // key.shape[2]
    if groups > 1:
        key = key.repeat_interleave(groups, dim=2)
        value = value.repeat_interleave(groups, dim=2)
    scaled = query.transpose(1, 2) * query.shape[-1] ** -0.5
    scores = scaled @ key.permute(0, 2, 3, 1)
    if bias is not None:
        scores = scores + bias
    weights = torch.softmax(scores, dim=-1)
    return (weights @ value.transpose(1, 2)).transpose(1, 2)
