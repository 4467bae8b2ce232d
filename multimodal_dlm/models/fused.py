"""Autograd functions with few passes over memory, for bf16 training on the CPU.

Each has a plain counterpart that computes the same formula through autograd; the plain one runs in
every other dtype, on every other device, under `torch.compile` and whenever no gradient is wanted.
On two AMX cores the fused ones cut the elementwise part of a training step by more than half,
because the CPU has no fused backward for RMSNorm and accumulates embedding gradients in bf16.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd import Function

_IS_PLAIN: ContextVar[bool] = ContextVar("is_plain", default=False)


@contextmanager
def plain_functions() -> Iterator[None]:
    """Inside, a forward is plain PyTorch, fused and native functions left out: to compare with."""
    token = _IS_PLAIN.set(True)
    try:
        yield
    finally:
        _IS_PLAIN.reset(token)


def is_replaceable(hidden_states: Tensor, dtype: torch.dtype) -> bool:
    """True where plain PyTorch may be replaced: in this dtype on the CPU, not being compiled."""
    return (
        not _IS_PLAIN.get()
        and hidden_states.dtype == dtype
        and hidden_states.device.type == "cpu"
        and not torch.compiler.is_compiling()
    )


def use_fused(hidden_states: Tensor) -> bool:
    """True where the fused functions of this module pay: in bf16, with gradients."""
    return torch.is_grad_enabled() and is_replaceable(hidden_states, torch.bfloat16)


def _pick(table: Tensor, rows: Tensor) -> Tensor:
    """`table[rows]` with the kernel that copies whole rows."""
    return table.index_select(0, rows)


class NormModulate(Function):
    """x / rms(x) x factor[row] + shift[row], each token with its own row of two small tables."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: Float[Tensor, "tokens width"],
        factor: Float[Tensor, "rows width"],
        shift: Float[Tensor, "rows width"] | None,
        rows: Int[Tensor, " tokens"] | None,
        one_hot: Float[Tensor, "rows tokens"] | None,
        eps: float,
    ) -> Float[Tensor, "tokens width"]:
        """`rows`, `one_hot` and `shift` are None together: one row for all tokens, no shift."""
        norm = torch.linalg.vector_norm(hidden_states, dim=-1, keepdim=True)
        norm = norm.to(torch.promote_types(norm.dtype, torch.float32))
        scale = norm.square_().div_(hidden_states.shape[-1]).add_(eps).rsqrt_()
        scale = scale.to(hidden_states.dtype)
        normed = hidden_states * scale
        ctx.save_for_backward(normed, scale, factor, rows, one_hot)
        if rows is None or shift is None:
            return normed * factor
        return torch.addcmul(_pick(shift, rows), normed, _pick(factor, rows))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Equals scale x (g - normed x mean(g x normed)) with g = grad x factor."""
        normed, scale, factor, rows, one_hot = ctx.saved_tensors
        grad_shift = None
        product = grad * normed
        if one_hot is None:
            ones = product.new_ones(1, product.shape[0])
            grad_factor = ones @ product
            gained = grad * factor
        else:
            grad_factor, grad_shift = one_hot @ product, one_hot @ grad
            gained = grad * _pick(factor, rows)
        mean = torch.linalg.vecdot(gained, normed).unsqueeze(-1).div_(-normed.shape[-1])
        return gained.addcmul_(normed, mean).mul_(scale), grad_factor, grad_shift, None, None, None


class GatedAdd(Function):
    """x + y x gate[row]."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: Float[Tensor, "tokens width"],
        update: Float[Tensor, "tokens width"],
        gate: Float[Tensor, "rows width"],
        rows: Int[Tensor, " tokens"],
        one_hot: Float[Tensor, "rows tokens"],
    ) -> Float[Tensor, "tokens width"]:
        """One pass."""
        ctx.save_for_backward(update, gate, rows, one_hot)
        return torch.addcmul(hidden_states, update, _pick(gate, rows))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The table's gradient is a matrix product: accumulated in float32, not row by row."""
        update, gate, rows, one_hot = ctx.saved_tensors
        grad_gate = one_hot @ (grad * update)
        return grad, grad * _pick(gate, rows), grad_gate, None, None


class GatedLinear(Function):
    """silu(x W_gate^T) * (x W_up^T), the two matrices being the halves of one weight.

    Two products instead of one wide one: rows of two halves side by side collide in the cache (a
    row stride of 4,096 bytes at width 1,024) and make every later pass three times slower.
    """

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Float[Tensor, "tokens inner"],
        weight: Float[Tensor, "two_width inner"],
    ) -> Float[Tensor, "tokens width"]:
        """`weight` may be float32; it is cast to the dtype of `inputs`."""
        low = weight.to(inputs.dtype)
        gate_weight, up_weight = low.chunk(2)
        gate, up = inputs @ gate_weight.t(), inputs @ up_weight.t()
        activated = torch.nn.functional.silu(gate)
        ctx.save_for_backward(inputs, low, gate, up, activated)
        ctx.weight_dtype = weight.dtype
        return activated * up

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of inputs and weight."""
        inputs, low, gate, up, activated = ctx.saved_tensors
        grad_up = grad * activated
        grad_gate = torch.ops.aten.silu_backward(grad * up, gate)
        gate_weight, up_weight = low.chunk(2)
        grad_inputs = torch.addmm(grad_gate @ gate_weight, grad_up, up_weight)
        dtype = ctx.weight_dtype
        grad_weight = torch.empty(low.shape, dtype=dtype, device=low.device)
        flipped = inputs.t().contiguous()
        for part, grad_part in zip(grad_weight.chunk(2), (grad_gate, grad_up), strict=True):
            part.copy_((flipped @ grad_part).t())
        return grad_inputs, grad_weight


def _copy_heads(target: Tensor, source: Tensor) -> Tensor:
    """Copy between head layouts, four bf16 values at a time where heads allow it."""
    if source.element_size() == 2 and source.shape[-1] % 4 == 0:
        target.view(torch.int64).copy_(source.view(torch.int64))
    else:
        target.copy_(source)
    return target


def _rotate_(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn (batch, length, heads, dim) in place by the tables (batch, length, 1, dim)."""
    half = cos.shape[-1] // 2
    swapped = torch.cat([heads[..., half:], heads[..., :half]], dim=-1)
    return heads.mul_(cos).addcmul_(swapped, sin)


class RotaryAttention(Function):
    """softmax(rotary(Q) rotary(K)^T / sqrt(dim) + bias) V from one fused projection.

    Scores are accumulated in float32 and stored in bf16; the softmax kernel works in float32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        qkv: Float[Tensor, "batch length three_heads dim"],
        cos: Float[Tensor, "batch length dim"],
        sin: Float[Tensor, "batch length dim"],
        bias: Float[Tensor, "batch 1 length length"] | None,
    ) -> Float[Tensor, "batch length width"]:
        """Heads are laid out (three, batch x heads, length, dim) once."""
        batch, length, three_heads, dim = qkv.shape
        heads = three_heads // 3
        cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
        half = dim // 2
        queries_keys = qkv[:, :, : 2 * heads]
        swapped = torch.cat([queries_keys[..., half:], queries_keys[..., :half]], dim=-1)
        turned = (queries_keys * cos).addcmul_(swapped, sin)
        parts = qkv.new_empty(3, batch, heads, length, dim)
        _copy_heads(parts[:2], turned.view(batch, length, 2, heads, dim).permute(2, 0, 3, 1, 4))
        _copy_heads(parts[2], qkv[:, :, 2 * heads :].transpose(1, 2))
        query, key, value = parts.view(3, batch * heads, length, dim)
        if bias is None:
            scores = torch.baddbmm(query.new_zeros(1), query, key.mT, beta=0, alpha=dim**-0.5)
        else:
            start = bias.expand(-1, heads, -1, -1).reshape(batch * heads, length, length)
            scores = torch.baddbmm(start, query, key.mT, alpha=dim**-0.5)
        weights = torch.softmax(scores, dim=-1)
        ctx.save_for_backward(query, key, value, weights, cos, sin)
        out = torch.bmm(weights, value).view(batch, heads, length, dim).transpose(1, 2)
        return _copy_heads(qkv.new_empty(batch, length, heads, dim), out).flatten(2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """With dS = P x (dP - rowsum(dP x P)); the rotary is undone by the opposite angle."""
        query, key, value, weights, cos, sin = ctx.saved_tensors
        batch, length = grad.shape[:2]
        dim, scale = query.shape[-1], query.shape[-1] ** -0.5
        heads = query.shape[0] // batch
        by_head = (batch, heads, length, dim)
        grad = grad.reshape(batch, length, heads, dim).transpose(1, 2)
        grad = _copy_heads(query.new_empty(by_head), grad).view_as(query)
        grad_weights = torch.bmm(grad, value.mT)
        grad_scores = torch.ops.aten._softmax_backward_data(
            grad_weights, weights, -1, weights.dtype
        )
        result = query.new_empty(batch, length, 3, heads, dim)
        parts = result.permute(2, 0, 3, 1, 4)
        _copy_heads(parts[0], torch.bmm(grad_scores, key).view(by_head))
        _copy_heads(parts[1], torch.bmm(grad_scores.mT, query).view(by_head))
        _copy_heads(parts[2], torch.bmm(weights.mT, grad).view(by_head))
        result = result.view(batch, length, 3 * heads, dim)
        _rotate_(result[:, :, : 2 * heads], cos * scale, sin * -scale)
        return result, None, None, None


class WideLinear(Function):
    """x W^T, whose weight gradient transposes the narrow factor first.

    oneDNN multiplies a transposed tall bf16 matrix at half the rate of a contiguous one.
    """

    @staticmethod
    def forward(
        ctx: Any, inputs: Float[Tensor, "tokens inner"], weight: Float[Tensor, "out inner"]
    ) -> Float[Tensor, "tokens out"]:
        """`weight` may be float32; it is cast to the dtype of `inputs`."""
        low = weight.to(inputs.dtype)
        ctx.save_for_backward(inputs, low)
        ctx.weight_dtype = weight.dtype
        return inputs @ low.t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of inputs and weight."""
        inputs, low = ctx.saved_tensors
        if inputs.shape[1] <= grad.shape[1]:
            grad_weight = (inputs.t().contiguous() @ grad).t()
        else:
            grad_weight = grad.t().contiguous() @ inputs
        dtype = ctx.weight_dtype
        result = torch.empty(low.shape, dtype=dtype, device=low.device).copy_(grad_weight)
        return grad @ low, result


def is_bare_linear(layer: nn.Module) -> bool:
    """True for an `nn.Linear` that is only its weight: no bias, adapter, quantisation or hook.

    Where gradients are wanted the weight must want one: they always compute it.
    """
    return (
        type(layer) is nn.Linear
        and layer.bias is None
        and type(layer.weight) is nn.Parameter
        and (layer.weight.requires_grad or not torch.is_grad_enabled())
        and is_unhooked(layer)
    )


def is_unhooked(module: nn.Module) -> bool:
    """True for a module whose call is its class's forward and nothing else."""
    return "forward" not in module.__dict__ and not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def wide_linear(layer: nn.Module, inputs: Tensor) -> Tensor:
    """`layer(inputs)`, through `WideLinear` where that is the same and pays."""
    if use_fused(inputs) and is_bare_linear(layer):
        out = WideLinear.apply(inputs.reshape(-1, inputs.shape[-1]), layer.weight)
        return out.view(*inputs.shape[:-1], -1)
    return layer(inputs)


def gated_linear(layer: nn.Module, inputs: Tensor) -> Tensor:
    """silu(gate) * up of the two halves of `layer(inputs)`."""
    if use_fused(inputs) and is_bare_linear(layer):
        out = GatedLinear.apply(inputs.reshape(-1, inputs.shape[-1]), layer.weight)
        return out.view(*inputs.shape[:-1], -1)
    gate, up = layer(inputs).chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up
