"""Drawing a token for every masked position, and how confident the model is of it."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from multimodal_dlm.schedulers.base import StepInput
from multimodal_dlm.schedulers.shaping import draw_columns, shape_logits


@dataclass(frozen=True)
class Proposal:
    """Drawn tokens before any is committed.

    Args:
        columns: Drawn token at masked positions, the sample elsewhere.
        confidence: Log-probability of the drawn token under the softmax over its possible columns
            at temperature 1, before top-k and top-p; 0 at positions that are not masked.
        log_probabilities: The distributions of the confidence at the masked positions, in the
            order of `is_masked`.
        pred_logits: Shaped logits at masked positions, the logits as given elsewhere.
    """

    columns: Int[Tensor, "batch seq"]
    confidence: Float[Tensor, "batch seq"]
    log_probabilities: Float[Tensor, "masked columns"]
    pred_logits: Float[Tensor, "batch seq columns"]


def propose(
    step: StepInput,
    sample: Int[Tensor, "batch seq"],
    is_masked: Bool[Tensor, "batch seq"],
    possible: Bool[Tensor, "batch seq columns"] | None,
    drawable: Bool[Tensor, "batch seq columns"] | None = None,
) -> Proposal:
    """Draw one token for every masked position.

    Args:
        step: Logits, random numbers and settings.
        sample: Columns, V where masked.
        is_masked: Positions to draw for.
        possible: Columns the confidence is restricted to; None for all.
        drawable: Columns the draw is restricted to, where narrower than `possible`.
    """
    logits = step.logits[is_masked]
    if possible is not None:
        logits = logits.masked_fill(~possible[is_masked], -torch.inf)
    log_probabilities = logits.log_softmax(dim=-1)
    if drawable is not None:
        logits = logits.masked_fill(~drawable[is_masked], -torch.inf)
    settings = step.settings
    shaped = shape_logits(
        logits, temperature=settings.temperature, top_k=settings.top_k, top_p=settings.top_p
    )
    if settings.temperature == 0.0:
        drawn = shaped.argmax(dim=-1)
    else:
        drawn = draw_columns(shaped, step.uniforms[..., 0][is_masked])
    chosen = log_probabilities.gather(-1, drawn[:, None]).squeeze(-1)
    columns = sample.clone()
    columns[is_masked] = drawn.to(sample.dtype)
    confidence = torch.zeros_like(sample, dtype=chosen.dtype)
    confidence[is_masked] = chosen.clamp(min=torch.finfo(torch.float32).min)
    pred_logits = step.logits.clone()
    pred_logits[is_masked] = shaped
    return Proposal(
        columns=columns,
        confidence=confidence,
        log_probabilities=log_probabilities,
        pred_logits=pred_logits,
    )
