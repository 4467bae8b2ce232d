"""Autograd functions with few passes over memory, for bf16 training on the CPU.

Each has a plain counterpart that computes the same formula through autograd; the plain one runs in
every other dtype, on every other device, under `torch.compile` and whenever no gradient is wanted.
On two AMX cores the fused ones cut the elementwise part of a training step by more than half,
because the CPU has no fused backward for RMSNorm and accumulates embedding gradients in bf16.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx


def use_fused(hidden_states: Tensor) -> bool:
    """True where the fused functions pay: bf16 on the CPU, with gradients, not being compiled."""
    return (
        hidden_states.dtype == torch.bfloat16
        and hidden_states.device.type == "cpu"
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
    )


class NormModulate(Function):
    """x / rms(x) x factor[row] + shift[row], each token with its own row of two small tables."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden_states: Float[Tensor, "tokens width"],
        factor: Float[Tensor, "rows width"],
        shift: Float[Tensor, "rows width"] | None,
        rows: Int[Tensor, " tokens"] | None,
        one_hot: Float[Tensor, "tokens rows"] | None,
        eps: float,
    ) -> Float[Tensor, "tokens width"]:
        """`rows`, `one_hot` and `shift` are None together: one row for all tokens, no shift."""
        norm = torch.linalg.vector_norm(hidden_states, dim=-1, keepdim=True, dtype=torch.float32)
        scale = norm.square_().div_(hidden_states.shape[-1]).add_(eps).rsqrt_()
        normed = torch.empty_like(hidden_states)
        torch.mul(hidden_states, scale, out=normed)
        ctx.save_for_backward(normed, scale, factor, rows, one_hot)
        if rows is None or shift is None:
            return normed * factor
        return torch.addcmul(shift[rows], normed, factor[rows])

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Equals scale x (g - normed x mean(g x normed)) with g = grad x factor."""
        normed, scale, factor, rows, one_hot = ctx.saved_tensors
        grad_shift = None
        product = grad * normed
        if one_hot is None:
            ones = product.new_ones(1, product.shape[0])
            grad_factor = ones @ product
            gained = grad * factor
        else:
            grad_factor, grad_shift = one_hot.t() @ product, one_hot.t() @ grad
            gained = grad * factor[rows]
        mean = torch.linalg.vecdot(gained, normed).unsqueeze(-1).div_(-normed.shape[-1])
        grad_hidden = gained.addcmul_(normed, mean)
        torch.mul(grad_hidden, scale, out=grad_hidden)
        return grad_hidden, grad_factor, grad_shift, None, None, None


class GatedAdd(Function):
    """x + y x gate[row]."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden_states: Float[Tensor, "tokens width"],
        update: Float[Tensor, "tokens width"],
        gate: Float[Tensor, "rows width"],
        rows: Int[Tensor, " tokens"],
        one_hot: Float[Tensor, "tokens rows"],
    ) -> Float[Tensor, "tokens width"]:
        """One pass."""
        ctx.save_for_backward(update, gate, rows, one_hot)
        return torch.addcmul(hidden_states, update, gate[rows])

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The table's gradient is a matrix product: accumulated in float32, not row by row."""
        update, gate, rows, one_hot = ctx.saved_tensors
        grad_gate = one_hot.t() @ (grad * update)
        return grad, grad * gate[rows], grad_gate, None, None


class GatedUnit(Function):
    """silu(first half) x second half."""

    @staticmethod
    def forward(ctx: FunctionCtx, both: Float[Tensor, "*shape two_width"]) -> Tensor:
        """Saves the input and silu(first half)."""
        gate, up = both.chunk(2, dim=-1)
        activated = torch.nn.functional.silu(gate)
        ctx.save_for_backward(both, activated)
        return activated * up

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> Tensor:
        """Writes both halves of the gradient in place."""
        both, activated = ctx.saved_tensors
        gate, up = both.chunk(2, dim=-1)
        result = torch.empty_like(both)
        grad_gate, grad_up = result.chunk(2, dim=-1)
        torch.mul(grad, activated, out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
        return result


def _rotate(source: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    """Write rotary(source) into `out`; dimensions beyond the tables are copied."""
    dim = cos.shape[-1]
    half = dim // 2
    torch.mul(source[..., :dim], cos, out=out[..., :dim])
    out[..., :half].addcmul_(source[..., half:dim], sin[..., :half])
    out[..., half:dim].addcmul_(source[..., :half], sin[..., half:])
    if dim < source.shape[-1]:
        out[..., dim:].copy_(source[..., dim:])


class RotaryAttention(Function):
    """softmax(rotary(Q) rotary(K)^T / sqrt(dim) + bias) V from one fused projection.

    Scores are accumulated in float32 and stored in bf16; the softmax kernel works in float32.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        qkv: Float[Tensor, "batch length three heads dim"],
        cos: Float[Tensor, "batch length rotary"],
        sin: Float[Tensor, "batch length rotary"],
        bias: Float[Tensor, "batch 1 length length"] | None,
    ) -> Float[Tensor, "batch length width"]:
        """Heads are laid out (batch x heads, length, dim) once."""
        batch, length, _, heads, dim = qkv.shape
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        turned = qkv.new_empty(2, batch, heads, length, dim)
        parts = qkv.permute(2, 0, 3, 1, 4)
        _rotate(parts[:2], cos, sin, turned)
        query, key = turned.view(2, batch * heads, length, dim)
        value = parts[2].reshape(batch * heads, length, dim)
        scale = dim**-0.5
        if bias is None:
            scores = torch.bmm(query, key.transpose(1, 2)).mul_(scale)
        else:
            start = bias.expand(-1, heads, -1, -1).reshape(batch * heads, length, length)
            scores = start.baddbmm_(query, key.transpose(1, 2), alpha=scale)
        weights = torch.softmax(scores, dim=-1)
        ctx.save_for_backward(query, key, value, weights, cos, sin)
        out = torch.bmm(weights, value).view(batch, heads, length, dim)
        return out.transpose(1, 2).reshape(batch, length, heads * dim)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        """With dS = P x (dP - rowsum(dP x P)); the rotary is undone by the opposite angle."""
        query, key, value, weights, cos, sin = ctx.saved_tensors
        batch, length = grad.shape[:2]
        dim = query.shape[-1]
        heads = query.shape[0] // batch
        grad = grad.view(batch, length, heads, dim).transpose(1, 2).reshape(-1, length, dim)
        grad_weights = torch.bmm(grad, value.transpose(1, 2))
        grad_scores = torch.ops.aten._softmax_backward_data(
            grad_weights, weights, -1, weights.dtype
        ).mul_(dim**-0.5)
        turned = query.new_empty(2, batch * heads, length, dim)
        torch.bmm(grad_scores, key, out=turned[0])
        torch.bmm(grad_scores.transpose(1, 2), query, out=turned[1])
        result = query.new_empty(batch, length, 3, heads, dim)
        parts = result.permute(2, 0, 3, 1, 4)
        _rotate(turned.view(2, batch, heads, length, dim), cos, -sin, parts[:2])
        grad_value = torch.bmm(weights.transpose(1, 2), grad)
        parts[2].copy_(grad_value.view(batch, heads, length, dim))
        return result, None, None, None
