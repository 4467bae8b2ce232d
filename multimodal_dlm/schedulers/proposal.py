"""Drawing a token for every masked position, and how confident the model is of it."""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from multimodal_dlm.schedulers.settings import ModalitySettings
from multimodal_dlm.schedulers.shaping import draw_columns, shape_logits


@dataclass(frozen=True)
class Proposal:
    """Drawn tokens before any is committed.

    Args:
        is_masked: Positions that were drawn for.
        columns: Drawn token at masked positions, the sample elsewhere.
        confidence: Log-probability of the drawn token under the softmax over its possible columns
            at temperature 1, before top-k and top-p; 0 at positions that are not masked.
        log_probabilities: The distributions of the confidence at the masked positions, in the
            order of `is_masked`.
        drawable: Logits the tokens were drawn from, before temperature, top-k and top-p.
        settings: Temperature, top-k and top-p.
    """

    is_masked: Bool[Tensor, "batch seq"]
    columns: Int[Tensor, "batch seq"]
    confidence: Float[Tensor, "batch seq"]
    log_probabilities: Float[Tensor, "masked columns"]
    drawable: Float[Tensor, "masked columns"]
    settings: ModalitySettings

    @cached_property
    def shaped_logits(self) -> Float[Tensor, "masked columns"]:
        """Logits of the law the tokens were drawn from, made when first asked for."""
        return _shaped(self.drawable, self.settings)


def propose(
    sample: Int[Tensor, "batch seq"],
    is_masked: Bool[Tensor, "batch seq"],
    possible: Float[Tensor, "masked columns"],
    drawable: Float[Tensor, "masked columns"],
    *,
    settings: ModalitySettings,
    uniforms: Float[Tensor, "batch seq 2"],
) -> Proposal:
    """Draw one token for every masked position.

    Args:
        sample: Columns, V where masked.
        is_masked: Positions to draw for.
        possible: Logits at these positions, -inf in columns that are not possible; the confidence
            is taken from them.
        drawable: The same for the draw, which may be narrower.
        settings: Temperature, top-k and top-p.
        uniforms: Numbers in [0, 1), of which each position's first is used.
    """
    log_probabilities = possible.log_softmax(dim=-1)
    if settings.temperature == 0.0:
        drawn = drawable.max(dim=-1, keepdim=True).indices  # As argmax, but faster.
    else:
        drawn = draw_columns(_shaped(drawable, settings), uniforms[..., 0][is_masked])[:, None]
    chosen = log_probabilities.gather(-1, drawn)
    confidence = torch.zeros_like(sample, dtype=chosen.dtype)
    return Proposal(
        is_masked=is_masked,
        columns=sample.masked_scatter(is_masked, drawn.to(sample.dtype)),
        confidence=confidence.masked_scatter_(
            is_masked, chosen.clamp(min=torch.finfo(torch.float32).min)
        ),
        log_probabilities=log_probabilities,
        drawable=drawable,
        settings=settings,
    )


def _shaped(
    logits: Float[Tensor, "masked columns"], settings: ModalitySettings
) -> Float[Tensor, "masked columns"]:
    return shape_logits(
        logits, temperature=settings.temperature, top_k=settings.top_k, top_p=settings.top_p
    )


def restrict(
    logits: Float[Tensor, "masked columns"], allowed: Bool[Tensor, "masked columns"] | None
) -> Float[Tensor, "masked columns"]:
    """Logits with -inf where a column is not allowed."""
    return logits if allowed is None else logits.masked_fill(~allowed, -torch.inf)
