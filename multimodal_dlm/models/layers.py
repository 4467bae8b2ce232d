"""Layers of a block: modulated normalisation, gated residual, gated MLP."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from multimodal_dlm.models.fused import (
    GatedAdd,
    NormModulate,
    gated_linear,
    use_fused,
    wide_linear,
)
from multimodal_dlm.models.native.weights import Tables
from multimodal_dlm.models.noise_conditioning import Gating, level_tables, token_tables


class RMSNorm(nn.Module):
    """x / rms(x) x weight (Zhang and Sennrich 2019, arXiv 1910.07467, Eq. 4).

    With a modulation the normalised token also takes its level's (1 + scale) and shift. Weight and
    tables are cast to the dtype of x, or autocast would leave the low-precision kernels.

    Args:
        size: Size of the last dimension.
        eps: Added to the mean square.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(
        self,
        hidden_states: Float[Tensor, "batch length width"],
        gating: Gating | None = None,
    ) -> Float[Tensor, "batch length width"]:
        """Same shape and dtype in and out."""
        dtype = hidden_states.dtype
        if use_fused(hidden_states):
            rows, one_hot, shift, factor = None, None, None, self.weight[None].to(dtype)
            if gating is not None:
                rows, one_hot = gating.modulation.flat_rows, gating.modulation.one_hot
                factor = (self.weight * (1 + gating.scale.float())).to(dtype)
                shift = gating.shift.to(dtype)
            flat = hidden_states.flatten(0, 1)
            normed = NormModulate.apply(flat, factor, shift, rows, one_hot, self.eps)
            return normed.view_as(hidden_states)
        if gating is None:
            return F.rms_norm(hidden_states, self.weight.shape, self.weight.to(dtype), self.eps)
        shift, factor, _ = token_tables(gating, self.weight, dtype)
        normed = F.rms_norm(hidden_states, self.weight.shape, None, self.eps)
        return torch.addcmul(shift, normed, factor)

    def tables(self, hidden_states: Tensor, gating: Gating | None) -> Tables:
        """This norm and the gating of its half as the native kernels take them."""
        weight = self.weight.float()
        if gating is None:
            count = hidden_states.shape[:-1].numel()
            rows = torch.zeros(count, dtype=torch.int32, device=hidden_states.device)
            return Tables(
                weight[None], torch.zeros_like(weight[None]), torch.ones_like(weight[None]), rows
            )
        return Tables(*level_tables(gating, weight), gating.modulation.short_rows)


def add_gated(
    hidden_states: Float[Tensor, "batch length width"],
    update: Float[Tensor, "batch length width"],
    gating: Gating | None,
    norm: RMSNorm,
) -> Float[Tensor, "batch length width"]:
    """hidden_states + update x (1 + gate of the token's level); `norm` is that of the same half."""
    if gating is None:
        return hidden_states + update
    if use_fused(hidden_states) and update.dtype == hidden_states.dtype:
        gate = (1 + gating.gate).to(hidden_states.dtype)
        rows, one_hot = gating.modulation.flat_rows, gating.modulation.one_hot
        flat = hidden_states.flatten(0, 1), update.flatten(0, 1)
        return GatedAdd.apply(*flat, gate, rows, one_hot).view_as(hidden_states)
    *_, gate = token_tables(gating, norm.weight, hidden_states.dtype)
    return torch.addcmul(hidden_states, update, gate)


class SwiGLU(nn.Module):
    """down(silu(gate x) * up x) (Shazeer 2020, arXiv 2002.05202, Eq. 6), gate and up in one."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.inner_size = intermediate_size
        self.gate_up_proj = nn.Linear(hidden_size, 2 * intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Same shape in and out."""
        return wide_linear(self.down_proj, gated_linear(self.gate_up_proj, hidden_states))
