"""Parts of a transformer block in float32 on AVX2 or AVX-512, without gradients.

The norm is applied as a product's left matrix is written, SwiGLU, rotary, gate and residual as its
result is: what lies between two products is neither stored nor read again. Keys and values come out
on their own, so the same parts serve forwards with a cache and without. A token's result is a sum
in one order, whatever is beside it in the batch.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.library import custom_op
from torch.utils.flop_counter import register_flop_formula

from multimodal_dlm.models.fused import is_replaceable
from multimodal_dlm.models.native import Kernels, kernels, num_threads
from multimodal_dlm.models.native.weights import Layout, PackedWeights, Tables, are_bare, weights_of
from multimodal_dlm.models.positions import Rotary

PANEL = 16


def _kernels() -> Kernels | None:
    has_avx512 = torch.cpu._is_avx512_supported()
    return (kernels("avx512") if has_avx512 else None) or kernels("avx2")


def _library() -> Kernels:
    library = _kernels()
    assert library is not None
    return library


def pack(weight: Float[Tensor, "out inner"]) -> Float[Tensor, "out inner"]:
    """The weight laid out for x W^T: `[out / 16][inner][16]`."""
    weight = weight.detach().contiguous()
    panels = torch.empty_like(weight)
    _library()("pack", weight, panels, *weight.shape)
    return panels


LAYOUT = Layout(pack, itemsize=4)


@custom_op("multimodal_dlm::float_mlp", mutates_args=(), device_types="cpu")
def float_mlp(
    x: Tensor, factor: Tensor, shift: Tensor, gate: Tensor, rows: Tensor,
    w_in: Tensor, w_out: Tensor, eps: float,
) -> Tensor:  # fmt: skip
    """x + gate down(silu(g) u), (g, u) = in(norm(x) factor + shift), of (tokens, width)."""
    tokens, width = x.shape
    out = torch.empty_like(x)
    _library().with_workspace(
        "mlp", x, factor, shift, gate, rows, w_in, w_out, out, tokens, width, w_out.shape[1], eps,
        num_threads(),
    )  # fmt: skip
    return out


@custom_op("multimodal_dlm::float_project", mutates_args=(), device_types="cpu")
def float_project(
    x: Tensor, factor: Tensor, shift: Tensor, rows: Tensor, weight: Tensor, cos: Tensor,
    sin: Tensor, num_turned: int, eps: float,
) -> Tensor:  # fmt: skip
    """Heads of norm(x) factor + shift, the first `num_turned` rotated: (tokens, heads, dim)."""
    (tokens, width), dim = x.shape, cos.shape[-1]
    heads = len(weight) // dim
    out = x.new_empty(tokens, heads, dim)
    _library().with_workspace(
        "project", x, factor, shift, rows, weight, cos, sin, out, tokens, width, heads, num_turned,
        dim, cos.numel() // dim, eps, num_threads(),
    )  # fmt: skip
    return out


@custom_op("multimodal_dlm::float_add_projected", mutates_args=(), device_types="cpu")
def float_add_projected(
    x: Tensor, gate: Tensor, rows: Tensor, attended: Tensor, weight: Tensor
) -> Tensor:
    """x + gate to_out(attended), of (tokens, width)."""
    tokens, width = x.shape
    out = torch.empty_like(x)
    _library().with_workspace(
        "add_projected", x, gate, rows, attended, weight, out, tokens, width, weight.shape[1],
        num_threads(),
    )  # fmt: skip
    return out


def _linear_flops(x: Sequence[int], *weights: Sequence[int]) -> int:
    return 2 * x[0] * sum(math.prod(weight) for weight in weights)


@register_flop_formula(torch.ops.multimodal_dlm.float_mlp)
def _mlp_flops(x: Any, *shapes: Any, **_: Any) -> int:
    return _linear_flops(x, shapes[4], shapes[5])


@register_flop_formula(
    [torch.ops.multimodal_dlm.float_project, torch.ops.multimodal_dlm.float_add_projected]
)
def _projection_flops(x: Any, *shapes: Any, **_: Any) -> int:
    return _linear_flops(x, shapes[3])


def can_run(hidden_states: Tensor, layers: tuple[nn.Module, ...], *sizes: int) -> bool:
    """True where a half of a block may run on these kernels.

    Args:
        hidden_states: Its input; in float32 on the CPU, no gradient wanted.
        layers: Its linear layers, which must be only their weights, in float32 and small enough to
            be kept a second time.
        sizes: Widths that must be whole panels.
    """
    return (
        is_replaceable(hidden_states, torch.float32)
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and all(size % PANEL == 0 for size in sizes)
        and are_bare(layers, torch.float32)
        and all(map(LAYOUT.can_keep, weights_of(layers)))
        and _kernels() is not None
    )


def gated_mlp(
    hidden_states: Float[Tensor, "batch length width"],
    tables: Tables,
    layers: tuple[nn.Module, nn.Module],
    eps: float,
    packed: PackedWeights,
) -> Float[Tensor, "batch length width"]:
    """The second half of a block; `layers` are gate_up and down."""
    flat = hidden_states.contiguous().flatten(0, 1)
    panels = packed(weights_of(layers), LAYOUT)
    return float_mlp(flat, *tables, *panels, eps).view_as(hidden_states)


class GatedAttention:
    """The first half of a block around its attention; `layers` are to_qkv and to_out."""

    def __init__(
        self,
        hidden_states: Float[Tensor, "batch length width"],
        tables: Tables,
        layers: tuple[nn.Module, nn.Module],
        packed: PackedWeights,
    ) -> None:
        self._shape = hidden_states.shape
        self._flat = hidden_states.contiguous().flatten(0, 1)
        self._tables = tables
        self._in, self._out = packed(weights_of(layers), LAYOUT)

    def heads(
        self, rotary: Rotary, num_turned: int, eps: float
    ) -> Float[Tensor, "batch length heads dim"]:
        """Queries, keys and values side by side; the first `num_turned` heads are rotated."""
        factor, shift, _, rows = self._tables
        turns = rotary.cos.contiguous(), rotary.sin.contiguous()
        found = float_project(self._flat, factor, shift, rows, self._in, *turns, num_turned, eps)
        return found.view(*self._shape[:2], *found.shape[1:])

    def finish(
        self, attended: Float[Tensor, "batch length inner"]
    ) -> Float[Tensor, "batch length width"]:
        """The block's states with the gated output added."""
        flat, (_, _, gate, rows) = attended.contiguous().flatten(0, 1), self._tables
        return float_add_projected(self._flat, gate, rows, flat, self._out).view(self._shape)
