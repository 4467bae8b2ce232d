"""From logits to tokens: temperature, top-k, top-p and one uniform number per token.

All functions take rows of logits, shape (rows, columns), and treat each row alone, so the same row
gives the same token whatever else is in the batch.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def shape_logits(
    logits: Float[Tensor, "rows columns"],
    *,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Float[Tensor, "rows columns"]:
    """Divide by the temperature, then keep the top-k columns, then the top-p columns.

    Returns:
        Logits of the distribution to draw from; excluded columns hold -inf. Temperature 0 leaves
        the most likely column alone (the first of equals).
    """
    if temperature == 0.0:
        best = logits.argmax(dim=-1, keepdim=True)
        return torch.full_like(logits, -torch.inf).scatter_(-1, best, 0.0)
    shaped = logits if temperature == 1.0 else logits / temperature
    if top_k is not None and top_k < shaped.shape[-1]:
        smallest = shaped.topk(top_k, dim=-1).values[:, -1:]
        shaped = shaped.masked_fill(shaped < smallest, -torch.inf)
    if top_p is not None and top_p < 1.0:
        ranked, columns = shaped.sort(dim=-1, descending=True, stable=True)
        probabilities = ranked.softmax(dim=-1)
        before = probabilities.cumsum(dim=-1) - probabilities
        ranked = ranked.masked_fill(before >= top_p, -torch.inf)
        shaped = torch.empty_like(shaped).scatter_(-1, columns, ranked)
    return shaped


def draw_columns(
    shaped: Float[Tensor, "rows columns"], uniforms: Float[Tensor, " rows"]
) -> Int[Tensor, " rows"]:
    """Draw one column per row by inverting the cumulative distribution at u in [0, 1).

    One number per token keeps the draws few and of fixed shape; the cumulative sum is float64, so
    that thousands of columns lose nothing (arXiv 2409.02908 shows what low precision does).
    """
    cumulative = shaped.softmax(dim=-1).to(torch.float64).cumsum(dim=-1)
    total = cumulative[:, -1:]
    # Below the total, so that a column of probability zero at the end is never reached.
    level = torch.minimum(uniforms[:, None] * total, torch.nextafter(total, total.new_zeros(())))
    return torch.searchsorted(cumulative, level, right=True).squeeze(-1)


def gumbel_noise(uniforms: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Standard Gumbel numbers -log(-log(u)) from float64 numbers u in [0, 1)."""
    return -torch.log(-torch.log(uniforms.clamp(min=2.0**-60)))


def rank_descending(scores: Float[Tensor, "batch seq"]) -> Int[Tensor, "batch seq"]:
    """Rank of each score in its row, 0 the highest; the left one of equals comes first."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    ranks = torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, ranks)
