"""From logits to tokens: temperature, top-k, top-p and one uniform number per token.

All functions take rows of logits, shape (rows, columns), and treat each row alone, so the same row
gives the same token whatever else is in the batch.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

_BLOCK = 64  # Columns summed at once when a column is drawn.


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

    One number per token keeps the draws few and of fixed shape; sums over many columns are float64,
    so that thousands of them lose nothing (arXiv 2409.02908 shows what low precision does). First a
    block of columns is found, then the column in it: only sums of blocks and one block a row take
    float64.
    """
    shares = shaped.softmax(dim=-1)
    count = shares.shape[-1]
    num_whole = count // _BLOCK
    whole = shares[:, : num_whole * _BLOCK]
    sums = whole.unflatten(-1, (num_whole, _BLOCK)).sum(dim=-1)
    if count % _BLOCK:
        rest = shares[:, num_whole * _BLOCK :].sum(dim=-1, keepdim=True)
        sums = torch.cat([sums, rest], dim=-1)
    ends = sums.cumsum(dim=-1, dtype=torch.float64)
    level = uniforms[:, None] * ends[:, -1:]
    block = _first_above(ends, level)
    before = torch.nn.functional.pad(ends[:, :-1], (1, 0)).gather(-1, block)
    columns = block * _BLOCK + torch.arange(_BLOCK, device=block.device)
    if count % _BLOCK:
        inside = shares.gather(-1, columns.clamp(max=count - 1)).masked_fill(columns >= count, 0.0)
    else:
        inside = shares.gather(-1, columns)
    place = _first_above(inside.cumsum(dim=-1, dtype=torch.float64), level - before)
    return columns.gather(-1, place).squeeze(-1)


def _first_above(
    cumulative: Float[Tensor, "rows columns"], level: Float[Tensor, "rows 1"]
) -> Int[Tensor, "rows 1"]:
    """First column whose cumulative sum, float64, is above the level.

    The level is kept below the total, so that a column of probability 0 at the end is never found.
    """
    next_below_total = cumulative[:, -1:] * (1.0 - 2.0**-53)
    return torch.searchsorted(cumulative, torch.minimum(level, next_below_total), right=True)


def gumbel_noise(uniforms: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Standard Gumbel numbers -log(-log(u)) from float64 numbers u in [0, 1)."""
    return -torch.log(-torch.log(uniforms.clamp(min=2.0**-60)))


def rank_descending(scores: Float[Tensor, "batch seq"]) -> Int[Tensor, "batch seq"]:
    """Rank of each score in its row, 0 the highest; the left one of equals comes first."""
    return scores.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
