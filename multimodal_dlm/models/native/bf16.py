"""The two halves of a transformer block in bf16 on AMX tiles, with and without gradients.

Activations are read and written once for each half: the norm is applied while a product's left
matrix is laid out, SwiGLU, rotary, gate and residual while its result leaves the tiles, and the
scores of a row never leave the cache. Products are bf16 with float32 sums; everything between two
products is float32. Weight gradients are summed over all tokens in float32, each part by one thread
in a fixed order, and table gradients thread by thread: the same inputs and thread count give the
same bits.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.library import custom_op
from torch.utils.flop_counter import register_flop_formula

from multimodal_dlm.models.fused import is_replaceable
from multimodal_dlm.models.native import Kernels, kernels, num_threads
from multimodal_dlm.models.native.weights import Layout, PackedWeights, Tables, are_bare, weights_of
from multimodal_dlm.models.positions import Rotary

EDGE = 32


def _library() -> Kernels:
    library = kernels("amx")
    assert library is not None
    return library


def _strips(size: int) -> int:
    return -(-size // EDGE) * EDGE


def pack(weight: Float[Tensor, "out inner"]) -> tuple[Tensor, Tensor]:
    """The weight in bf16, laid out for x W^T and for x W."""
    backward = torch.empty(weight.shape, dtype=torch.bfloat16, device=weight.device)
    return pack_forward(weight, backward), backward


def pack_forward(weight: Float[Tensor, "out inner"], backward: Tensor | None = None) -> Tensor:
    """The weight in bf16, laid out for x W^T, and into `backward` for x W."""
    weight = weight.detach().contiguous()
    forward = torch.empty(weight.shape, dtype=torch.bfloat16, device=weight.device)
    name = "pack_float" if weight.dtype == torch.float32 else "pack_bf16"
    _library()(name, weight, forward, backward, *weight.shape, num_threads())
    return forward


LAYOUT = Layout(pack_forward, itemsize=2)


@custom_op("multimodal_dlm::mlp_forward", mutates_args=(), device_types="cpu")
def mlp_forward(
    x: Tensor, factor: Tensor, shift: Tensor, gate: Tensor, rows: Tensor,
    w_in: Tensor, w_out: Tensor, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """x + gate x down(swiglu(gate_up(norm(x)))) of (tokens, width), and what backward needs."""
    tokens, width = x.shape
    inner = w_out.shape[1]
    out, update = torch.empty_like(x), torch.empty_like(x)
    scales = torch.empty(tokens, dtype=torch.float32)
    saved = x.new_empty(_strips(tokens), 2 * inner)
    _library().with_workspace(
        "mlp_forward", x, factor, shift, gate, rows, w_in, w_out, out, scales, saved, update,
        tokens, width, inner, eps, num_threads(),
    )  # fmt: skip
    return out, scales, saved, update


@custom_op("multimodal_dlm::mlp_backward", mutates_args=(), device_types="cpu")
def mlp_backward(
    grad: Tensor, x: Tensor, factor: Tensor, shift: Tensor, gate: Tensor, rows: Tensor,
    w_in: Tensor, w_out: Tensor, scales: Tensor, saved: Tensor, update: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, of the three tables, and of the two weights."""
    (tokens, width), inner = x.shape, w_out.shape[1]
    dx = torch.empty_like(x)
    tables = factor.new_empty(3, *factor.shape)
    d_in, d_out = tables.new_empty(w_in.shape), tables.new_empty(w_out.shape)
    _library().with_workspace(
        "mlp_backward", grad, x, factor, shift, gate, rows, w_in, w_out, scales, saved, update,
        dx, tables, d_in, d_out, tokens, len(factor), width, inner, num_threads(),
    )  # fmt: skip
    return dx, tables, d_in, d_out


@custom_op("multimodal_dlm::attention_forward", mutates_args=(), device_types="cpu")
def attention_forward(
    x: Tensor, factor: Tensor, shift: Tensor, gate: Tensor, rows: Tensor,
    w_in: Tensor, w_out: Tensor, cos: Tensor, sin: Tensor, bias: Tensor | None, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """x + gate x to_out(attention(to_qkv(norm(x)))) of (batch, length, width), and the rest."""
    batch, length, width = x.shape
    dim, inner = cos.shape[-1], w_out.shape[1]
    padded = _strips(length)
    out, update = torch.empty_like(x), torch.empty_like(x)
    scales = torch.empty(batch * length, dtype=torch.float32)
    saved, attended = x.new_empty(batch, padded, 3 * inner), x.new_empty(batch, padded, inner)
    logsumexp = scales.new_empty(batch, inner // dim, padded)
    _library().with_workspace(
        "attention_forward", x, factor, shift, gate, rows, w_in, w_out, cos, sin, bias, out, scales,
        saved, attended, logsumexp, update, batch, length, width, inner // dim, dim, eps,
        num_threads(),
    )  # fmt: skip
    return out, scales, saved, attended, logsumexp, update


@custom_op("multimodal_dlm::attention_backward", mutates_args=(), device_types="cpu")
def attention_backward(
    grad: Tensor, x: Tensor, factor: Tensor, shift: Tensor, gate: Tensor, rows: Tensor,
    w_in: Tensor, w_out: Tensor, cos: Tensor, sin: Tensor, bias: Tensor | None, scales: Tensor,
    saved: Tensor, attended: Tensor, logsumexp: Tensor, update: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, of the three tables, and of the two weights."""
    batch, length, width = x.shape
    dim, inner = cos.shape[-1], w_out.shape[1]
    dx = torch.empty_like(x)
    tables = factor.new_empty(3, *factor.shape)
    d_in, d_out = tables.new_empty(w_in.shape), tables.new_empty(w_out.shape)
    _library().with_workspace(
        "attention_backward", grad, x, factor, shift, gate, rows, w_in, w_out, cos, sin, bias,
        scales, saved, attended, logsumexp, update, dx, tables, d_in, d_out, batch, length,
        len(factor), width, inner // dim, dim, num_threads(),
    )  # fmt: skip
    return dx, tables, d_in, d_out


@custom_op("multimodal_dlm::mlp_inference", mutates_args=(), device_types="cpu")
def mlp_inference(
    x: Tensor, factor: Tensor, shift: Tensor, gate: Tensor, rows: Tensor,
    w_in: Tensor, w_out: Tensor, eps: float,
) -> Tensor:  # fmt: skip
    """The first result of `mlp_forward` alone."""
    tokens, width = x.shape
    out = torch.empty_like(x)
    _library().with_workspace(
        "mlp_forward", x, factor, shift, gate, rows, w_in, w_out, out, None, None, None,
        tokens, width, w_out.shape[1], eps, num_threads(),
    )  # fmt: skip
    return out


@custom_op("multimodal_dlm::attention_inference", mutates_args=(), device_types="cpu")
def attention_inference(
    x: Tensor, factor: Tensor, shift: Tensor, gate: Tensor, rows: Tensor,
    w_in: Tensor, w_out: Tensor, cos: Tensor, sin: Tensor, bias: Tensor | None, eps: float,
) -> Tensor:  # fmt: skip
    """The first result of `attention_forward` alone."""
    batch, length, width = x.shape
    dim, out = cos.shape[-1], torch.empty_like(x)
    _library().with_workspace(
        "attention_forward", x, factor, shift, gate, rows, w_in, w_out, cos, sin, bias, out, None,
        None, None, None, None, batch, length, width, w_out.shape[1] // dim, dim, eps,
        num_threads(),
    )  # fmt: skip
    return out


def _linear_flops(x: Sequence[int], *weights: Sequence[int]) -> int:
    """Of x W^T for each weight; x is (..., width)."""
    return 2 * math.prod(x[:-1]) * sum(math.prod(weight) for weight in weights)


@register_flop_formula(
    [torch.ops.multimodal_dlm.mlp_forward, torch.ops.multimodal_dlm.mlp_inference]
)
def _mlp_flops(x: Any, *shapes: Any, **_: Any) -> int:
    return _linear_flops(x, shapes[4], shapes[5])


@register_flop_formula(torch.ops.multimodal_dlm.mlp_backward)
def _mlp_backward_flops(grad: Any, x: Any, *shapes: Any, **_: Any) -> int:
    return 2 * _linear_flops(x, shapes[4], shapes[5])


@register_flop_formula(
    [torch.ops.multimodal_dlm.attention_forward, torch.ops.multimodal_dlm.attention_inference]
)
def _attention_flops(x: Any, *shapes: Any, **_: Any) -> int:
    """Scores and their product with the values."""
    attention = 2 * 2 * x[0] * x[1] * x[1] * shapes[5][1]
    return _linear_flops(x, shapes[4], shapes[5]) + attention


@register_flop_formula(torch.ops.multimodal_dlm.attention_backward)
def _attention_backward_flops(grad: Any, x: Any, *shapes: Any, **_: Any) -> int:
    """Five products of the size of the scores: themselves once more, dP, dV, dQ and dK."""
    attention = 5 * 2 * x[0] * x[1] * x[1] * shapes[5][1]
    return 2 * _linear_flops(x, shapes[4], shapes[5]) + attention


class GatedMLP(Function):
    """x + gate[row] x down(swiglu(gate_up(norm(x) factor[row] + shift[row])))."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: Float[Tensor, "tokens width"],
        factor: Float[Tensor, "levels width"],
        shift: Float[Tensor, "levels width"],
        gate: Float[Tensor, "levels width"],
        rows: Int[Tensor, " tokens"],
        gate_up: Float[Tensor, "two_inner width"],
        down: Float[Tensor, "width inner"],
        eps: float,
    ) -> Float[Tensor, "tokens width"]:
        """Weights in float32 or bf16; tables in float32."""
        (w_in, back_in), (w_out, back_out) = pack(gate_up), pack(down)
        inputs = hidden_states, factor, shift, gate, rows
        out, *saved = mlp_forward(*inputs, w_in, w_out, eps)
        ctx.save_for_backward(*inputs, back_in, back_out, *saved)
        ctx.dtypes = gate_up.dtype, down.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Of the states, the tables and the weights."""
        dx, tables, d_in, d_out = mlp_backward(grad.contiguous(), *ctx.saved_tensors)
        weights = d_in.to(ctx.dtypes[0]), d_out.to(ctx.dtypes[1])
        return dx, *tables.unbind(), None, *weights, None


class GatedAttention(Function):
    """x + gate[row] x to_out(attention(to_qkv(norm(x) factor[row] + shift[row])))."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: Float[Tensor, "batch length width"],
        factor: Float[Tensor, "levels width"],
        shift: Float[Tensor, "levels width"],
        gate: Float[Tensor, "levels width"],
        rows: Int[Tensor, " tokens"],
        to_qkv: Float[Tensor, "three_inner width"],
        to_out: Float[Tensor, "width inner"],
        cos: Float[Tensor, "batch length dim"],
        sin: Float[Tensor, "batch length dim"],
        bias: Float[Tensor, "batch 1 length length"] | None,
        eps: float,
    ) -> Float[Tensor, "batch length width"]:
        """Weights in float32 or bf16; tables in float32; the rest in bf16."""
        (w_in, back_in), (w_out, back_out) = pack(to_qkv), pack(to_out)
        inputs = hidden_states, factor, shift, gate, rows
        out, *saved = attention_forward(*inputs, w_in, w_out, cos, sin, bias, eps)
        ctx.save_for_backward(*inputs, back_in, back_out, cos, sin, bias, *saved)
        ctx.dtypes = to_qkv.dtype, to_out.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Of the states, the tables and the weights."""
        dx, tables, d_in, d_out = attention_backward(grad.contiguous(), *ctx.saved_tensors)
        weights = d_in.to(ctx.dtypes[0]), d_out.to(ctx.dtypes[1])
        return dx, *tables.unbind(), None, *weights, None, None, None, None


def can_run(hidden_states: Tensor, layers: tuple[nn.Module, ...], *sizes: int) -> bool:
    """True where a half of a block may run natively.

    Args:
        hidden_states: Its input; in bf16 on the CPU.
        layers: Its linear layers, which must be only their weights, in float32 or bf16; without
            gradients also small enough to be kept a second time.
        sizes: Widths that must be whole blocks.
    """
    return (
        is_replaceable(hidden_states, torch.bfloat16)
        and all(size % EDGE == 0 for size in sizes)
        and are_bare(layers, torch.float32, torch.bfloat16)
        and (torch.is_grad_enabled() or all(map(LAYOUT.can_keep, weights_of(layers))))
        and kernels("amx") is not None
    )


def gated_mlp(
    hidden_states: Float[Tensor, "batch length width"],
    tables: Tables,
    layers: tuple[nn.Module, nn.Module],
    eps: float,
    packed: PackedWeights,
) -> Float[Tensor, "batch length width"]:
    """The second half of a block; `layers` are gate_up and down."""
    weights = weights_of(layers)
    flat = hidden_states.contiguous().flatten(0, 1)
    if torch.is_grad_enabled():
        return GatedMLP.apply(flat, *tables, *weights, eps).view_as(hidden_states)
    return mlp_inference(flat, *tables, *packed(weights, LAYOUT), eps).view_as(hidden_states)


def gated_attention(
    hidden_states: Float[Tensor, "batch length width"],
    tables: Tables,
    layers: tuple[nn.Module, nn.Module],
    eps: float,
    rotary: Rotary,
    bias: Float[Tensor, "batch 1 length length"] | None,
    packed: PackedWeights,
) -> Float[Tensor, "batch length width"]:
    """The first half of a block; `layers` are to_qkv and to_out."""
    weights = weights_of(layers)
    states, turns = hidden_states.contiguous(), (rotary.cos, rotary.sin, bias)
    if torch.is_grad_enabled():
        return GatedAttention.apply(states, *tables, *weights, *turns, eps)
    return attention_inference(states, *tables, *packed(weights, LAYOUT), *turns, eps)
