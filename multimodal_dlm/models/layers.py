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
from multimodal_dlm.models.noise_conditioning import Modulation


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
        modulation: Modulation | None = None,
        shift: Float[Tensor, "rows width"] | None = None,
        scale: Float[Tensor, "rows width"] | None = None,
    ) -> Float[Tensor, "batch length width"]:
        """Same shape and dtype in and out."""
        dtype = hidden_states.dtype
        if use_fused(hidden_states):
            rows, one_hot, factor = None, None, self.weight[None].to(dtype)
            if modulation is not None and scale is not None and shift is not None:
                rows, one_hot = modulation.flat_rows, modulation.one_hot
                factor = (self.weight * (1 + scale.float())).to(dtype)
                shift = shift.to(dtype)
            flat = hidden_states.flatten(0, 1)
            normed = NormModulate.apply(flat, factor, shift, rows, one_hot, self.eps)
            return normed.view_as(hidden_states)
        weight = self.weight.to(dtype)
        normed = F.rms_norm(hidden_states, weight.shape, weight, self.eps)
        if modulation is None or scale is None or shift is None:
            return normed
        rows = modulation.rows
        return normed * F.embedding(rows, (1 + scale).to(dtype)) + F.embedding(
            rows, shift.to(dtype)
        )


def add_gated(
    hidden_states: Float[Tensor, "batch length width"],
    update: Float[Tensor, "batch length width"],
    modulation: Modulation,
    gate: Float[Tensor, "rows width"],
) -> Float[Tensor, "batch length width"]:
    """hidden_states + update x (1 + gate of the token's level)."""
    gate = (1 + gate).to(hidden_states.dtype)
    if use_fused(hidden_states) and update.dtype == hidden_states.dtype:
        rows, one_hot = modulation.flat_rows, modulation.one_hot
        flat = hidden_states.flatten(0, 1), update.flatten(0, 1)
        return GatedAdd.apply(*flat, gate, rows, one_hot).view_as(hidden_states)
    return hidden_states + update * F.embedding(modulation.rows, gate)


class SwiGLU(nn.Module):
    """down(silu(gate x) * up x) (Shazeer 2020, arXiv 2002.05202, Eq. 6), gate and up in one."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(hidden_size, 2 * intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Same shape in and out."""
        return wide_linear(self.down_proj, gated_linear(self.gate_up_proj, hidden_states))
