"""Losses per position and per row: cross-entropy without the full logits, NELBO weights and rates.

Everything is in nats. Softmax and logarithm run in float32, or in float64 for float64 input, also
under autocast. Averages over positions, rows or noise levels belong to the caller; estimators with
confidence intervals are in `likelihood`.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from multimodal_dlm.diffusion.mask_schedules import MaskSchedule
from multimodal_dlm.diffusion.masking import exact_count_weight
from multimodal_dlm.errors import ConfigError

CHUNK_ELEMENTS = 2**25  # 128 MiB of float32 logits
# Where t is within rounding of 0 or 1 a rate is a ratio of vanishing numbers; with these floors
# its gradient, of order 1 / floor^3, stays finite.
FLOORS = {torch.float32: 1e-10, torch.float64: 1e-30}

Head = Callable[[Tensor], Tensor]


class WeightedCrossEntropy(NamedTuple):
    """A weighted sum of cross-entropies and its parts.

    Attributes:
        loss: Sum of weight x nll, the scalar to differentiate.
        nll: -log p(target) of each position, float32 or better.
    """

    loss: Float[Tensor, ""]
    nll: Float[Tensor, " count"]


def token_nll(
    hidden_states: Float[Tensor, "count width"],
    head: Head | None,
    targets: Int[Tensor, " count"],
    *,
    num_columns: int,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> Float[Tensor, " count"]:
    """Negative log-probability of each target; logits exist for one chunk of positions at a time.

    With one chunk this is plain cross-entropy. With several, each chunk's logits are dropped after
    the forward and recomputed in backward: memory for `chunk_elements` logits instead of count x
    num_columns, for one more product with the head. The result is the same either way.

    Args:
        hidden_states: States of the positions that carry loss; gather them first.
        head: States -> logits over `num_columns` columns; None when the states are the logits.
        targets: Column of each position.
        num_columns: Width of the logits.
        chunk_elements: Most logits held at once, at least one position's.

    Raises:
        ConfigError: When `chunk_elements` is below 1.
    """
    if chunk_elements < 1:
        raise ConfigError(
            f"`chunk_elements` must be at least 1; got {chunk_elements}. Use {CHUNK_ELEMENTS}."
        )
    count, rows = len(targets), max(1, chunk_elements // num_columns)
    if head is None or count <= rows:
        return _nll(hidden_states, targets, head)
    parts = []
    for start in range(0, count, rows):
        part = slice(start, start + rows)
        parts.append(
            checkpoint(
                _nll,
                hidden_states[part],
                targets[part],
                head,
                use_reentrant=False,
                preserve_rng_state=False,
            )
        )
    return torch.cat(parts)


def weighted_cross_entropy(
    hidden_states: Float[Tensor, "count width"],
    head: Head | None,
    targets: Int[Tensor, " count"],
    weights: Float[Tensor, " count"],
    *,
    num_columns: int,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> WeightedCrossEntropy:
    """Sum of weight x -log p(target), with each position's nll beside it for reports.

    With the weights of a forward process the sum is the batch's NELBO estimate in nats.

    Args:
        hidden_states: States of the positions that carry loss.
        head: States -> logits; None when the states are the logits.
        targets: Column of each position.
        weights: Weight of each position.
        num_columns: Width of the logits.
        chunk_elements: Most logits held at once.

    Raises:
        ConfigError: When `chunk_elements` is below 1.
    """
    nll = token_nll(
        hidden_states, head, targets, num_columns=num_columns, chunk_elements=chunk_elements
    )
    return WeightedCrossEntropy((nll * weights.to(nll.dtype)).sum(), nll)


def exact_count_nelbo(
    nll: Float[Tensor, "batch length"],
    is_masked: Bool[Tensor, "batch length"],
    is_free: Bool[Tensor, "batch length"],
) -> Float[Tensor, " batch"]:
    """One-draw NELBO of each row: (L / k) x the sum of the nll at the k masked of L free positions.

    Unbiased for the any-order bound when k is uniform on 1..L and the k positions are a uniform
    subset (Uria et al. 2014, arXiv 1310.1757; Ou et al. 2024, arXiv 2406.03736). 0 without masks.

    Args:
        nll: -log p(clean token) at the masked positions; ignored elsewhere.
        is_masked: Masked positions of one window.
        is_free: Free positions of that window.
    """
    weight = exact_count_weight(is_masked, is_free, dtype=nll.dtype)
    return weight * nll.masked_fill(~is_masked, 0.0).sum(dim=1)


def nelbo_by_modality(
    nll: Float[Tensor, "batch length"],
    weights: Float[Tensor, "batch length"],
    modality_ids: Int[Tensor, "batch length"],
    num_modalities: int,
) -> Float[Tensor, "batch modalities"]:
    """Weighted nll of each row, summed within each modality; empty modalities are 0.

    Their sum over modalities is a joint bound for a chain or a diagonal draw only, never when two
    modalities were masked at independent levels (see `likelihood.enumerated_square`).

    Args:
        nll: -log p(clean token) of each position.
        weights: Of the forward process, 0 where there is no target.
        modality_ids: Modality of each position.
        num_modalities: Width of the result.
    """
    result = nll.new_zeros(len(nll), num_modalities)
    return result.scatter_add(1, modality_ids, nll * weights.to(nll.dtype))


def absorbing_nelbo_rate(
    nll: Float[Tensor, "batch length"],
    is_masked: Bool[Tensor, "batch length"],
    t: Float[Tensor, " batch"],
    *,
    mask_schedule: MaskSchedule,
) -> Float[Tensor, "batch length"]:
    """NELBO density in t for Bernoulli masks: -alpha'(t) / (1 - alpha(t)) x nll at the masks.

    The integral over t in (0, 1) of its expectation is the NELBO, the same for every mask schedule
    (Sahoo et al. 2024, arXiv 2406.07524, Eq. 10; Shi et al. 2024, arXiv 2406.04329, Eq. 4). Exact
    counts estimate the same number with less variance: use this where t must be continuous.

    Args:
        nll: -log p(clean token) at the masks; ignored elsewhere.
        is_masked: Masks drawn with probability 1 - alpha(t).
        t: Time of each row, in (0, 1).
        mask_schedule: Gives alpha.
    """
    times = t.double()
    weight = -mask_schedule.alpha_derivative(times) / mask_schedule.mask_rate(times).clamp(
        min=1e-30
    )
    return weight.to(nll.dtype)[:, None] * nll.masked_fill(~is_masked, 0.0)


def uniform_nelbo_rate(
    logits: Float[Tensor, "batch length columns"],
    columns: Int[Tensor, "batch length"],
    input_ids: Int[Tensor, "batch length"],
    t: Float[Tensor, " batch"],
    *,
    mask_schedule: MaskSchedule,
) -> Float[Tensor, "batch length"]:
    """NELBO density in t of the uniform process, per position, never negative.

    The reverse process jumps from z to v at rate (beta / V) r(v) with beta = -alpha' / alpha and
    r(v) = E[q(v | x_0) / q(z | x_0)] over the denoiser's law of x_0 given x_t (z's own value
    included). With r* the same for the true x_0, the relative entropy of the two jump processes has
    the density

        (beta / V) sum over v != z of r(v) - r*(v) + r*(v) log(r*(v) / r(v))

    (Campbell et al. 2022, arXiv 2205.14987; Lou et al. 2023, arXiv 2310.16834, theorem 3.6; Schiff
    et al. 2024, arXiv 2412.10193). Its integral over t in (0, 1) of the expectation over x_t bounds
    -log p(x_0), with equality for the exact posterior. One draw of t ~ U(0, 1) estimates it; summed
    over the free positions it is the row's NELBO. Departs from Schiff et al. in that the denoiser
    is a law of x_0 mixed over, not a mean that q is evaluated at.

    Args:
        logits: Of x_0 given x_t, over the V columns.
        columns: Clean tokens x_0.
        input_ids: Corrupted tokens x_t = z.
        t: Time of each row, in (0, 1).
        mask_schedule: Gives alpha.
    """
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    probs = logits.to(dtype).softmax(dim=-1)
    num_columns = logits.shape[-1]
    times = t.double()
    alpha = mask_schedule.alpha(times).clamp(min=FLOORS[dtype])
    beta = -mask_schedule.alpha_derivative(times) / alpha
    # q(v | x_0) is `other` for v != x_0 and `other + alpha` for v = x_0.
    other = (mask_schedule.mask_rate(times) / num_columns).clamp(min=FLOORS[dtype])
    alpha, beta, other = (value.to(dtype)[:, None] for value in (alpha, beta, other))

    probs_moved = probs.scatter(-1, input_ids[..., None], 0.0)
    p_same = probs.gather(-1, input_ids[..., None])
    p_moved = probs_moved.sum(dim=-1, keepdim=True)
    is_clean = (input_ids == columns)[..., None]
    is_target = F.one_hot(columns, num_columns).bool()
    alpha, other = alpha[..., None], other[..., None]
    back = other / (alpha + other)
    # For v != z: r, r*, and r - r* from the closed form of both, without cancellation.
    ratio = p_moved + p_same * back + alpha * probs_moved / other
    true_ratio = torch.where(is_clean, back, torch.where(is_target, 1 + alpha / other, 1.0))
    excess_if_clean = alpha * (probs_moved / other + p_moved / (alpha + other))
    missing = torch.where(is_target, probs - 1, probs)
    excess_if_moved = alpha * (missing / other - p_same / (alpha + other))
    relative = torch.where(is_clean, excess_if_clean, excess_if_moved) / true_ratio
    # Near a ratio of 1 log1p is accurate; near 0, where 1 + relative rounds to 0, the ratio itself.
    is_small = relative < -0.5
    log_ratio = torch.log1p(relative.masked_fill(is_small, 0.0))
    log_ratio = torch.where(is_small, ratio.log() - true_ratio.log(), log_ratio)
    terms = true_ratio * (relative - log_ratio)
    terms = terms.scatter(-1, input_ids[..., None], 0.0)
    return beta / num_columns * terms.sum(dim=-1)


def _nll(hidden_states: Tensor, targets: Tensor, head: Head | None) -> Float[Tensor, " count"]:
    logits = hidden_states if head is None else head(hidden_states)
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return F.cross_entropy(logits.to(dtype), targets, reduction="none")
