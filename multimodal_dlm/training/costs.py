"""Arithmetic of a training step: FLOPs and bytes of a backbone, from its shape alone.

Matrix products only, a multiply-add counted as two (the convention of Kaplan et al. 2020, arXiv
2001.08361, appendix B, and of `torch.utils.flop_counter`). Bytes are those of the plain path, in
which autograd keeps what `docs/planning.md` lists; fused kernels keep less. Tests compare both with
what PyTorch counts and keeps.
"""

from dataclasses import dataclass
from typing import Any, Self

from torch import nn

from multimodal_dlm.diffusion.losses import CHUNK_ELEMENTS
from multimodal_dlm.models.noise_conditioning import NUM_FREQUENCIES

FLOAT32, BFLOAT16 = 4, 2
ADAM_BYTES = 8  # Two float32 moments.


@dataclass(frozen=True)
class BackboneShape:
    """What costs depend on.

    Args:
        hidden: Width.
        layers: Blocks.
        query: Query heads x head width.
        key_value: Key (or value) heads x head width.
        inner: Width of the MLP.
        heads: Query heads.
        has_qk_norm: Whether queries and keys are normalised.
        conditioning: `ada_norm_single`, `additive` or `none`.
        block_parameters: Parameters of all blocks.
        other_parameters: Embeddings, head, final norm, noise conditioning.
        embedding_parameters: Of the token embeddings.
    """

    hidden: int
    layers: int
    query: int
    key_value: int
    inner: int
    heads: int
    has_qk_norm: bool
    conditioning: str
    block_parameters: int
    other_parameters: int
    embedding_parameters: int

    @classmethod
    def of(cls, model: Any) -> Self:
        """The shape of a backbone, which may be on the meta device."""
        config, block = model.config, model.blocks[0]
        heads = config["num_attention_heads"]
        in_blocks = count(model.blocks)
        return cls(
            hidden=config["hidden_size"],
            layers=len(model.blocks),
            query=block.attn.num_heads * block.attn.head_dim,
            key_value=block.attn.num_key_value_heads * block.attn.head_dim,
            inner=block.mlp.down_proj.in_features,
            heads=heads,
            has_qk_norm=block.attn.norm_q is not None,
            conditioning=config["noise_conditioning"],
            block_parameters=in_blocks,
            other_parameters=count(model) - in_blocks,
            embedding_parameters=count(model.embed_tokens),
        )

    @property
    def parameters(self) -> int:
        """All parameters."""
        return self.block_parameters + self.other_parameters

    @property
    def block_matrices(self) -> int:
        """Entries of the matrices of one block."""
        attention = self.hidden * (self.query + 2 * self.key_value) + self.query * self.hidden
        return attention + 3 * self.hidden * self.inner

    @property
    def conditioning_matrices(self) -> int:
        """Entries of the matrices of the noise network."""
        if self.conditioning == "none":
            return 0
        out = 6 * self.hidden if self.conditioning == "ada_norm_single" else self.hidden
        return self.hidden * (2 * NUM_FREQUENCIES + self.hidden + out)


@dataclass(frozen=True)
class Work:
    """One micro-batch.

    Args:
        rows: Rows.
        length: Columns, padding included.
        targets: For each modality, the columns of its logits and its targets in the micro-batch.
        levels: Noise levels present in the micro-batch, at most 257.
        is_masked: Whether the attention needs a mask.
    """

    rows: float
    length: float
    targets: tuple[tuple[int, float], ...]
    levels: int = 1
    is_masked: bool = True

    @property
    def slots(self) -> float:
        """Tokens, padding included."""
        return self.rows * self.length


def count(module: nn.Module) -> int:
    """Parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters())


# FLOPs.


def block_flops(shape: BackboneShape, work: Work) -> float:
    """Forward of all blocks: 2 x matrices a token, and 4 x length x query width of attention."""
    attention = 4 * work.length * shape.query
    return work.slots * shape.layers * (2 * shape.block_matrices + attention)


def head_flops(shape: BackboneShape, work: Work) -> float:
    """Forward of the head, at the targets and over the columns of their modality only."""
    return sum(2 * shape.hidden * columns * number for columns, number in work.targets)


def forward_flops(shape: BackboneShape, work: Work) -> float:
    """Forward of a micro-batch."""
    conditioning = 2 * shape.conditioning_matrices * work.levels
    return block_flops(shape, work) + head_flops(shape, work) + conditioning


def training_flops(shape: BackboneShape, work: Work, *, checkpointing: bool = False) -> float:
    """Forward and backward: three times the forward, and the recomputed blocks and logits."""
    flops = 3 * forward_flops(shape, work)
    if checkpointing:
        flops += block_flops(shape, work)
    if any(is_chunked(columns, number) for columns, number in work.targets):
        flops += head_flops(shape, work)
    return flops


def is_chunked(columns: int, targets: float) -> bool:
    """Whether the logits of a modality are computed in several pieces, again in backward."""
    return columns * targets > CHUNK_ELEMENTS


# Bytes.


def saved_per_token(shape: BackboneShape, width: int, *, has_norm_kernel: bool = True) -> float:
    """Bytes that one block keeps of one token for its backward.

    Args:
        shape: Backbone.
        width: Bytes of an activation.
        has_norm_kernel: Whether the device has an RMSNorm kernel, as GPUs do. The CPU composes it
            and keeps input and normed value in float32.
    """
    hidden, query, key_value = shape.hidden, shape.query, shape.key_value
    # Inputs of both projections behind the norms.
    elements = 2 * hidden
    # Queries and keys as rotated, queries to values as projected, the attended values.
    elements += (query + key_value) + (query + 2 * key_value) + query
    # Gate and up as projected, silu(gate), their product.
    elements += 4 * shape.inner
    if shape.has_qk_norm:
        elements += query + key_value
    if shape.conditioning == "ada_norm_single":
        # Each norm: normed value and scale. Each gated sum: update and gate.
        elements += 8 * hidden
    statistics = FLOAT32 * (2 + shape.heads)
    return width * elements + 2 * _norm_input(shape, width, has_norm_kernel) + statistics


def _norm_input(shape: BackboneShape, width: int, has_norm_kernel: bool) -> float:
    return shape.hidden * (width if has_norm_kernel else 2 * FLOAT32)


def logits_bytes(work: Work, *, width: int) -> tuple[float, float]:
    """Log-probabilities kept until backward, and what the largest piece takes in passing.

    Args:
        work: Micro-batch.
        width: Bytes of a logit as the head gives it.
    """
    kept, largest = 0.0, 0.0
    for columns, number in work.targets:
        elements = columns * number
        if is_chunked(columns, number):
            largest = max(largest, FLOAT32 * CHUNK_ELEMENTS)
        else:
            kept += FLOAT32 * elements
        piece = min(elements, CHUNK_ELEMENTS)
        largest = max(largest, piece * (FLOAT32 + (width if width != FLOAT32 else 0)))
    return kept, largest


def batch_bytes(
    shape: BackboneShape,
    work: Work,
    *,
    mixed_precision: str,
    sharding: str = "none",
    checkpointing: bool = False,
    has_norm_kernel: bool = True,
) -> dict[str, float]:
    """Bytes of a device that a micro-batch takes at its worst moment, by what they are for.

    Without checkpointing that is the backward of the logits, or its end. With it, it may also be
    the end of forward (all weights cast to bf16), or the first block that is recomputed.

    Args:
        shape: Backbone.
        work: Micro-batch.
        mixed_precision: `bf16` or `no`.
        sharding: `none`, `zero2` or `fsdp`, over several devices.
        checkpointing: Recompute the blocks.
        has_norm_kernel: See `saved_per_token`.

    Returns:
        `activations`, `logits`, `embedding_gradients` (two modalities' of the head, and their sum)
        and `gathered_weights` (bf16 copies, or the weights of other devices' shards).
    """
    width = BFLOAT16 if mixed_precision == "bf16" else FLOAT32
    block = work.slots * saved_per_token(shape, width, has_norm_kernel=has_norm_kernel)
    # As booleans, and as what the kernel adds to the scores.
    mask = work.rows * work.length**2 * (1 + width) if work.is_masked else 0.0
    shared = mask + work.slots * 2 * width * shape.query / shape.heads  # Mask and rotary tables.
    norm = _norm_input(shape, width, has_norm_kernel)
    ends = work.slots * (width * shape.hidden + norm)
    ends += width * shape.hidden * sum(number for _, number in work.targets)
    kept, piece = logits_bytes(work, width=width)
    table = float(FLOAT32 * shape.embedding_parameters)
    all_weights, one_block = _gathered(shape, mixed_precision, sharding)
    names = ("activations", "logits", "embedding_gradients", "gathered_weights")
    if checkpointing:
        inputs = shape.layers * work.slots * width * shape.hidden + shared
        moments = (
            (inputs + ends, kept + piece, 0.0, all_weights),
            (inputs + ends, kept + piece, table, one_block),
            (inputs + ends, 0.0, 3 * table, one_block),
            (inputs + block, 0.0, 2 * table, one_block),
        )
    else:
        held = shape.layers * block + shared + ends
        moments = ((held, kept + piece, table, all_weights), (held, 0.0, 3 * table, all_weights))
    return dict(zip(names, max(moments, key=sum), strict=True))


def _gathered(shape: BackboneShape, mixed_precision: str, sharding: str) -> tuple[float, float]:
    """Weights beside the parameters: from forward to backward, and while a block is recomputed."""
    low = BFLOAT16 if mixed_precision == "bf16" else FLOAT32
    block = shape.block_parameters / shape.layers
    others = float(FLOAT32 * shape.other_parameters)
    if sharding == "fsdp":
        pair = low * block * min(2, shape.layers) + others
        return pair, pair
    if sharding == "zero2":
        whole = low * shape.block_parameters + others
        return whole, whole
    if mixed_precision != "bf16":
        return 0.0, 0.0
    copies = shape.layers * shape.block_matrices + shape.conditioning_matrices
    return float(BFLOAT16 * copies), float(BFLOAT16 * shape.block_matrices)


def state_bytes(
    shape: BackboneShape, *, sharding: str, devices: int, mixed_precision: str, has_ema: bool
) -> dict[str, float]:
    """Bytes of a device that do not depend on the batch, by what they are for.

    Args:
        shape: Backbone.
        sharding: `none`, `zero2` or `fsdp`.
        devices: Devices that train together.
        mixed_precision: `bf16` or `no`.
        has_ema: Whether averaged weights are kept.

    Returns:
        `parameters`, `gradients`, `optimizer`, `averaged_weights`, and `exchange_buffers`: DDP's
        buckets, or the whole gradients of one block and of what is in no block.
    """
    own = shape.parameters
    exchanged = FLOAT32 * own if devices > 1 else 0
    if sharding != "none" and devices > 1:
        own = shape.parameters / devices
        low = BFLOAT16 if mixed_precision == "bf16" else FLOAT32
        block = shape.block_parameters / shape.layers
        exchanged = (low + FLOAT32) * block + FLOAT32 * shape.other_parameters
    return {
        "parameters": FLOAT32 * own,
        "gradients": FLOAT32 * own,
        "optimizer": ADAM_BYTES * own,
        "averaged_weights": FLOAT32 * own if has_ema else 0.0,
        "exchange_buffers": exchanged,
    }
