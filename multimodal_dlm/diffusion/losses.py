"""Cross-entropy without the full logits."""

import torch
import torch.nn.functional as F
from collections.abc import Callable

from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK_ELEMENTS = 2**25


def token_nll(
    hidden_states: Float[Tensor, "count width"],
    head: Callable[[Tensor], Tensor],
    targets: Int[Tensor, " count"],
    *,
    num_columns: int,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> Float[Tensor, " count"]:
    """-log p(target) of each position, float32; logits exist for one chunk at a time.

    Args:
        hidden_states: States of the positions that carry loss.
        head: States -> logits over `num_columns` columns.
        targets: Columns.
        num_columns: Width of the logits.
        chunk_elements: Logits held at once; a single chunk is not recomputed in backward.
    """
    count = len(targets)
    rows = max(1, chunk_elements // num_columns)
    if count <= rows:
        return _nll(hidden_states, targets, head)
    parts = []
    for start in range(0, count, rows):
        part = slice(start, start + rows)
        parts.append(
            checkpoint(_nll, hidden_states[part], targets[part], head, use_reentrant=False)
        )
    return torch.cat(parts)


def _nll(hidden_states: Tensor, targets: Tensor, head: Callable[[Tensor], Tensor]) -> Tensor:
    logits = head(hidden_states)
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return F.cross_entropy(logits.to(dtype), targets, reduction="none")
