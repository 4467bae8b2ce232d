"""The backbone: one bidirectional transformer over the unified vocabulary, whole in this file.

It knows no mask schedule, no task and no modality by name. It receives ids, the noise level of each
token, positions and an attention plan, and returns hidden states; logits are computed for the
positions and the modality that the caller asks for, never for everything.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _check_attention_backend_requirements,
    _maybe_download_kernel_for_backend,
)
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from multimodal_dlm.errors import BackendError, ConfigError
from multimodal_dlm.models.attention import OWN_BACKENDS, UnifiedAttention, check_backend
from multimodal_dlm.models.attention_plan import AttentionPlan
from multimodal_dlm.models.cache_base import (
    FRESH,
    KeyValueCache,
    LayerStore,
    Tokens,
    previous_columns,
)
from multimodal_dlm.models.caches import CACHE_CONFIGS, CacheChoice
from multimodal_dlm.models.fused import is_unhooked
from multimodal_dlm.models.layers import RMSNorm, SwiGLU, add_gated
from multimodal_dlm.models.native import bf16, float32
from multimodal_dlm.models.native.weights import PackedWeights
from multimodal_dlm.models.noise_conditioning import Gating, Modulation, NoiseConditioning
from multimodal_dlm.models.positions import Rotary, check_axes, rotary_tables
from multimodal_dlm.vocabulary import UnifiedVocabulary

LORA_TARGETS = ("to_qkv", "to_out", "gate_up_proj", "down_proj")


@dataclass
class UnifiedTransformerOutput(BaseOutput):
    """What the backbone returns.

    Args:
        hidden_states: Normalised final states of the whole canvas, (batch, length, width).
        token_quality: Reserved for a quality head, (batch, length); None without one.
        auxiliary_loss: Scalar added to the training loss; None for dense layers.
    """

    hidden_states: Tensor
    token_quality: Tensor | None = None
    auxiliary_loss: Tensor | None = None


class UnifiedTransformerBlock(nn.Module):
    """Pre-norm attention and MLP; the modulation starts as the identity, bit for bit."""

    def __init__(
        self, *, hidden_size: int, intermediate_size: int, eps: float, modulated: bool, **attn: Any
    ) -> None:
        super().__init__()
        self.norm1 = RMSNorm(hidden_size, eps)
        self.attn = UnifiedAttention(hidden_size=hidden_size, eps=eps, **attn)
        self.norm2 = RMSNorm(hidden_size, eps)
        self.mlp = SwiGLU(hidden_size, intermediate_size)
        self.scale_shift_table = nn.Parameter(torch.zeros(6, hidden_size)) if modulated else None
        self._packed = PackedWeights(), PackedWeights()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Moved or cast; the kernels' copies of the old weights are let go."""
        self._packed = PackedWeights(), PackedWeights()
        return super()._apply(fn, recurse)

    def forward(
        self,
        hidden_states: Tensor,
        rotary: Rotary,
        plan: AttentionPlan,
        modulation: Modulation | None = None,
        kv_cache: LayerStore | None = None,
    ) -> Tensor:
        """(batch, length, width) in and out."""
        first = second = None
        if modulation is not None and self.scale_shift_table is not None:
            first, second = modulation.gatings(self.scale_shift_table)
        hidden_states = self._attend(hidden_states, first, rotary, plan, kv_cache)
        return self._transform(hidden_states, second)

    def _attend(
        self,
        hidden_states: Tensor,
        gating: Gating | None,
        rotary: Rotary,
        plan: AttentionPlan,
        kv_cache: LayerStore | None,
    ) -> Tensor:
        """The first half of the block."""
        attn, norm, layers = self.attn, self.norm1, (self.attn.to_qkv, self.attn.to_out)
        sizes = hidden_states.shape[-1], attn.head_dim
        batch = hidden_states.shape[0]
        is_usual = (
            is_unhooked(attn)
            and is_unhooked(norm)
            and rotary.cos.shape[0] == plan.order.shape[0] == batch
        )
        if is_usual and attn.is_whole(rotary) and float32.can_run(hidden_states, layers, *sizes):
            tables = norm.tables(hidden_states, gating)
            half = float32.GatedAttention(hidden_states, tables, layers, self._packed[0])
            parts = attn.num_heads, attn.num_key_value_heads, attn.num_key_value_heads
            query, key, value = half.heads(rotary, sum(parts[:2]), norm.eps).split(parts, dim=2)
            return half.finish(attn.attend(query, key, value, plan, kv_cache))
        if (
            is_usual
            and kv_cache is None
            and attn.is_plain_eager(hidden_states, rotary, plan)
            and bf16.can_run(hidden_states, layers, *sizes)
        ):
            tables, bias = norm.tables(hidden_states, gating), plan.bias(hidden_states.dtype)
            packed = self._packed[0]
            return bf16.gated_attention(
                hidden_states, tables, layers, norm.eps, rotary, bias, packed
            )
        attended = attn(norm(hidden_states, gating), rotary, plan, kv_cache)
        return add_gated(hidden_states, attended, gating, norm)

    def _transform(self, hidden_states: Tensor, gating: Gating | None) -> Tensor:
        """The second half of the block."""
        mlp, norm = self.mlp, self.norm2
        layers, sizes = (mlp.gate_up_proj, mlp.down_proj), (hidden_states.shape[-1], mlp.inner_size)
        if is_unhooked(mlp) and is_unhooked(norm):
            for native in (float32, bf16):
                if native.can_run(hidden_states, layers, *sizes):
                    tables = norm.tables(hidden_states, gating)
                    return native.gated_mlp(
                        hidden_states, tables, layers, norm.eps, self._packed[1]
                    )
        return add_gated(hidden_states, mlp(norm(hidden_states, gating)), gating, norm)


class Head(nn.Module):
    """Rows of the output matrix of one modality at a time, tied to the embedding or its own."""

    def __init__(self, vocab_size: int, hidden_size: int, *, tied: bool) -> None:
        super().__init__()
        self.weight = None if tied else nn.Parameter(torch.empty(vocab_size, hidden_size))

    def forward(self, hidden_states: Tensor, rows: range, tied_weight: Tensor) -> Tensor:
        """(..., width) -> (..., len(rows))."""
        weight = tied_weight if self.weight is None else self.weight
        return F.linear(hidden_states, weight[rows.start : rows.stop])


class UnifiedTransformerModel(
    ModelMixin, ConfigMixin, AttentionMixin, PeftAdapterMixin, CacheMixin
):
    """Bidirectional transformer over one vocabulary for every modality.

    Args:
        vocabulary: `UnifiedVocabulary.to_dict()`.
        layout: Layout of the canonical row, see `multimodal_dlm.layout.make_layout`.
        hidden_size: Width.
        num_layers: Blocks.
        num_attention_heads: Query heads.
        num_key_value_heads: Key and value heads; None for as many as query heads.
        head_dim: Width of a head; None for hidden_size / num_attention_heads.
        intermediate_size: Width of the MLP.
        norm_eps: Of every RMSNorm.
        rope_theta: Base of the rotary frequencies.
        axes_dims_rope: Rotary dimensions of each position axis; they sum to the rotary dimensions.
        partial_rotary_factor: Share of a head that is rotated.
        qk_norm: RMS-normalise queries and keys.
        qkv_bias: Bias on the attention projections.
        tie_word_embeddings: Share embedding and head.
        noise_conditioning: `ada_norm_single`, `additive` or `none`.
        logits_shift: 1 reads the state of the previous token of the row (autoregressive weights).
        mlp_type: `dense`.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["UnifiedTransformerBlock"]
    _repeated_blocks = ["UnifiedTransformerBlock"]
    _skip_layerwise_casting_patterns = ["embed_tokens", "head", "norm", "level_conditioning"]

    @register_to_config
    def __init__(
        self,
        *,
        vocabulary: Mapping[str, Any],
        layout: Mapping[str, Any] | None = None,
        hidden_size: int = 384,
        num_layers: int = 6,
        num_attention_heads: int = 6,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        intermediate_size: int = 1024,
        norm_eps: float = 1e-5,
        rope_theta: float = 10_000.0,
        axes_dims_rope: Sequence[int] = (16, 24, 24),
        partial_rotary_factor: float = 1.0,
        qk_norm: bool = False,
        qkv_bias: bool = False,
        tie_word_embeddings: bool = True,
        noise_conditioning: str = "ada_norm_single",
        logits_shift: int = 0,
        mlp_type: str = "dense",
    ) -> None:
        super().__init__()
        heads = num_attention_heads
        kv_heads = num_key_value_heads or heads
        width = head_dim or hidden_size // heads
        if heads % kv_heads:
            raise ConfigError(
                f"`num_key_value_heads` must divide `num_attention_heads`; got {kv_heads}, {heads}."
            )
        if head_dim is None and hidden_size % heads:
            raise ConfigError(
                f"`num_attention_heads` must divide `hidden_size`; got {heads} and {hidden_size}."
                " Change one or give `head_dim`."
            )
        if logits_shift not in (0, 1):
            raise ConfigError(f"`logits_shift` must be 0 or 1; got {logits_shift}.")
        if mlp_type != "dense":
            raise ConfigError(
                f"`mlp_type` must be `dense`; got `{mlp_type}`. Mixtures of experts are not built."
            )
        self.rotary_axes = check_axes(axes_dims_rope, int(width * partial_rotary_factor))
        vocab_size = UnifiedVocabulary.from_dict(vocabulary).vocab_size
        self.embed_tokens = nn.Embedding(vocab_size, hidden_size)
        self.level_conditioning = NoiseConditioning(
            kind=noise_conditioning, hidden_size=hidden_size
        )
        self.blocks = nn.ModuleList(
            UnifiedTransformerBlock(
                hidden_size=hidden_size,
                intermediate_size=intermediate_size,
                eps=norm_eps,
                modulated=noise_conditioning == "ada_norm_single",
                num_heads=heads,
                num_key_value_heads=kv_heads,
                head_dim=width,
                qk_norm=qk_norm,
                qkv_bias=qkv_bias,
                layer=layer,
            )
            for layer in range(num_layers)
        )
        self.norm = RMSNorm(hidden_size, norm_eps)
        self.head = Head(vocab_size, hidden_size, tied=tie_word_embeddings)
        self.gradient_checkpointing = False
        self._own_cache: CacheChoice | None = None
        self._init_weights(num_layers)

    def _init_weights(self, num_layers: int) -> None:
        """Normal(0, 0.02), residual outputs divided by sqrt(2 x layers)."""
        for name, weight in self.named_parameters():
            if weight.dim() < 2 or "level_conditioning" in name or "scale_shift" in name:
                continue
            is_residual = name.endswith(("to_out.weight", "down_proj.weight"))
            nn.init.normal_(weight, std=0.02 / math.sqrt(2 * num_layers) if is_residual else 0.02)

    # What the model was made for.

    @cached_property
    def vocabulary(self) -> UnifiedVocabulary:
        """The unified vocabulary stored in the config."""
        return UnifiedVocabulary.from_dict(self.config["vocabulary"])

    @property
    def layout(self) -> Mapping[str, Any] | None:
        """The layout of the canonical row stored in the config."""
        return self.config["layout"]

    # Forward.

    def embed(self, input_ids: Int[Tensor, "batch length"]) -> Float[Tensor, "batch length width"]:
        """Token embeddings."""
        return self.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: Int[Tensor, "batch length"] | None = None,
        *,
        inputs_embeds: Float[Tensor, "batch length width"] | None = None,
        noise_levels: Float[Tensor, "batch length"],
        modality_ids: Int[Tensor, "batch length"] | None = None,
        position_ids: Int[Tensor, "batch length axes"],
        attention_plan: AttentionPlan,
        kv_cache: KeyValueCache | None = None,
        conditioning_embeds: Float[Tensor, "batch width"] | None = None,
        shift_states: bool = True,
    ) -> UnifiedTransformerOutput:
        """Hidden states of a canvas.

        Args:
            input_ids: Unified ids; or give `inputs_embeds`.
            inputs_embeds: Embeddings in place of ids.
            noise_levels: Level of each token in [0, 1], from `canvas.noise_levels`.
            modality_ids: Which modality a shared mask id stands for; read by caches alone, as a
                mask id has one embedding.
            position_ids: Rotary coordinates.
            attention_plan: Who sees whom.
            kv_cache: From `new_cache`; computes what it does not keep.
            conditioning_embeds: Added to the noise embedding of every token of a row.
            shift_states: With `logits_shift` 1, give each token the state it is read from. False
                copies nothing and leaves that to a caller that picks few, by `previous_columns`.

        Returns:
            States of every column, computed now or kept by the cache; 0 in columns of an order
            that is not open yet.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ConfigError("Give exactly one of `input_ids` and `inputs_embeds`.")
        tokens = Tokens(
            input_ids, inputs_embeds, noise_levels, position_ids, conditioning_embeds, modality_ids
        )
        if kv_cache is None:
            hidden_states = self._states(tokens, attention_plan, None)
        else:
            hidden_states = kv_cache.run(self._states, tokens)
        if shift_states and self.config["logits_shift"]:
            hidden_states = previous_states(hidden_states, attention_plan.is_padding)
        return UnifiedTransformerOutput(hidden_states=hidden_states)

    def _states(self, tokens: Tokens, plan: AttentionPlan, kv_cache: LayerStore | None) -> Tensor:
        """Normalised final states of the tokens given."""
        ids, embeds = tokens.input_ids, tokens.inputs_embeds
        hidden_states = self.embed(ids) if ids is not None else embeds
        assert hidden_states is not None
        hidden_states = hidden_states.to(self._compute_dtype(hidden_states))
        if hidden_states.shape[1] == 0:
            return hidden_states
        noise_levels = tokens.noise_levels
        store = FRESH if kv_cache is None else kv_cache
        modulation = store.modulation(self.level_conditioning, tokens)
        if modulation is not None and self.level_conditioning.kind == "additive":
            added = self.level_conditioning.token_embedding(modulation, noise_levels > 0)
            hidden_states = hidden_states + added.to(hidden_states.dtype)
            modulation = None
        rotary = store.rotary(self._rotary, tokens.position_ids, hidden_states.dtype)
        plan.prepare()
        checkpoint = cast(Any, self._gradient_checkpointing_func)
        for block in self.blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = checkpoint(block, hidden_states, rotary, plan, modulation, kv_cache)
            else:
                hidden_states = block(hidden_states, rotary, plan, modulation, kv_cache)
        return self.norm(hidden_states)

    def _rotary(self, position_ids: Tensor, dtype: torch.dtype) -> Rotary:
        """Rotary tables of the tokens given."""
        theta = self.config["rope_theta"]
        return rotary_tables(position_ids, axes_dims=self.rotary_axes, theta=theta, dtype=dtype)

    def _compute_dtype(self, hidden_states: Tensor) -> torch.dtype:
        """bf16 activations under autocast, so that elementwise work is not done in float32."""
        device = hidden_states.device.type
        if torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
        return hidden_states.dtype

    def compute_logits(
        self, hidden_states: Float[Tensor, "*shape width"], modality: str
    ) -> Float[Tensor, "*shape columns"]:
        """Logits over the columns of one modality, for the states the caller has picked."""
        rows = self.vocabulary.columns(modality)
        return self.head(hidden_states, rows, self.embed_tokens.weight)

    # Attention backends.

    def set_attention_backend(self, backend: str) -> None:
        """Choose the backend of this model alone: `auto`, `eager` or one of Diffusers'.

        Unlike Diffusers' own setter it leaves the process-wide default alone.

        Raises:
            ConfigError: When the name is unknown.
            BackendError: When it cannot run on the model's device or its package is missing.
        """
        name = check_backend(backend.lower(), self.device)
        if name not in OWN_BACKENDS:
            try:
                _check_attention_backend_requirements(AttentionBackendName(name))
                _maybe_download_kernel_for_backend(AttentionBackendName(name))
            except (RuntimeError, ImportError) as error:
                raise BackendError(
                    f"Attention backend `{name}` is not usable here: {error} Install what it needs"
                    " or use `native`."
                ) from error
        for module in self.modules():
            if isinstance(module, UnifiedAttention):
                module.use_backend(name)

    def reset_attention_backend(self) -> None:
        """Back to the automatic choice."""
        self.set_attention_backend("auto")

    # Caches.

    def enable_cache(self, config: Any) -> None:
        """Choose a cache: ours is recorded and made per canvas, Diffusers' own are installed.

        Raises:
            ConfigError: When a cache is enabled already.
        """
        if self.is_cache_enabled:
            raise ConfigError(
                "A cache is enabled already; got a second one. Call `disable_cache()` first."
            )
        if isinstance(config, CACHE_CONFIGS):
            self._own_cache = CacheChoice(config)
            return
        TransformerBlockRegistry.register(
            UnifiedTransformerBlock, TransformerBlockMetadata(return_hidden_states_index=0)
        )
        super().enable_cache(config)

    def disable_cache(self) -> None:
        """No cache."""
        if self.has_foreign_cache:
            super().disable_cache()
            self._cache_config = None
        self._own_cache = None

    @property
    def is_cache_enabled(self) -> bool:
        """True after `enable_cache`."""
        return self._own_cache is not None or self._cache_config is not None

    @property
    def has_foreign_cache(self) -> bool:
        """True while a cache of Diffusers is installed, which keeps states of whole batches."""
        return self._own_cache is None and self._cache_config is not None

    def new_cache(
        self, plan: AttentionPlan, is_free: Bool[Tensor, "batch length"]
    ) -> KeyValueCache | None:
        """A cache for one canvas and one branch, or None when none of ours was chosen."""
        return None if self._own_cache is None else self._own_cache.build(self, plan, is_free)

    # Adapters.

    def add_adapter(self, adapter_config: Any, adapter_name: str = "default") -> None:
        """Add a LoRA adapter (peft).

        Raises:
            ConfigError: When the head or the embedding is a target: only rows of their weights are
                used, functionally, so an adapter on them would be ignored.
        """
        for option in ("target_modules", "modules_to_save"):
            targets = getattr(adapter_config, option, None) or ()
            for module in ("head", "embed_tokens"):
                if _is_target(module, targets):
                    raise ConfigError(
                        f"`{option}` may not hold `head` or `embed_tokens`; got {targets}. Use"
                        f" {', '.join(f'`{name}`' for name in LORA_TARGETS)}."
                    )
        super().add_adapter(adapter_config, adapter_name)


def _is_target(module: str, targets: Any) -> bool:
    """Whether peft would take `module` as a target: a regular expression, or names."""
    if isinstance(targets, str):
        return targets != "all-linear" and re.fullmatch(targets, module) is not None
    return any(name == module or name.endswith(f".{module}") for name in targets)


def previous_states(
    hidden_states: Float[Tensor, "batch length width"], is_padding: Bool[Tensor, "batch length"]
) -> Float[Tensor, "batch length width"]:
    """The state of the previous non-padding token of the row (of the token itself at the start)."""
    previous = previous_columns(is_padding)
    return hidden_states.gather(1, previous.unsqueeze(-1).expand_as(hidden_states))
