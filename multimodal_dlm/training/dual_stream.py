"""Two streams in a row: noisy blocks, and the clean copies that later blocks see.

A block is written when those before it are finished, so in training it must see them clean while
they are noisy themselves (Arriola et al. 2025, arXiv 2503.09573, section 4). The copies stand
behind the row, with the positions, orders and documents of their originals. Rows in which no block
follows another have no copies and one stream.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Self

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from multimodal_dlm.canvas import Canvas
from multimodal_dlm.models.attention_plan import AttentionPlan


@dataclass(frozen=True)
class Streams:
    """The rows of a forward pass.

    Args:
        canvas: Rows, then their clean copies; for the backbone alone.
        levels: Noise level of each token.
        is_noisy: Tokens of blocks with noise; None where there are no copies.
    """

    canvas: Canvas
    levels: Float[Tensor, "batch length"]
    is_noisy: Bool[Tensor, "batch length"] | None = None

    @classmethod
    def of(
        cls, canvas: Canvas, levels: Float[Tensor, "batch length"], clean: Canvas | None
    ) -> Self:
        """Add what later blocks see.

        Args:
            canvas: Noisy rows.
            levels: Their noise levels.
            clean: The same rows without noise; None adds nothing.
        """
        if clean is None:
            return cls(canvas, levels)
        is_noisy = _has_free_order(canvas)
        last = canvas.order.masked_fill(~canvas.is_free, -1).amax(dim=1, keepdim=True)
        is_seen = is_noisy & (canvas.order < last) & ~canvas.is_padding
        columns = is_seen.any(dim=0).nonzero().flatten()
        if not len(columns):
            return cls(canvas, levels)
        copies = clean.select_columns(columns)
        copies = copies.replace(
            is_free=torch.zeros_like(copies.is_free), is_padding=~is_seen[:, columns]
        )
        parts = {
            part.name: torch.cat([getattr(canvas, part.name), getattr(copies, part.name)], dim=1)
            for part in fields(Canvas)
        }
        zeros = levels.new_zeros(copies.input_ids.shape)
        return cls(
            Canvas(**parts),
            torch.cat([levels, zeros], dim=1),
            torch.cat([is_noisy, torch.zeros_like(copies.is_free)], dim=1),
        )

    def map(self, function: Callable[[Tensor], Tensor], canvas: Canvas) -> Self:
        """The same tokens elsewhere, such as packed; the canvas is given as it is there."""
        is_noisy = None if self.is_noisy is None else function(self.is_noisy)
        return replace(self, canvas=canvas, levels=function(self.levels), is_noisy=is_noisy)

    def plan(self) -> AttentionPlan:
        """Who sees whom."""
        if self.is_noisy is None:
            return AttentionPlan.from_canvas(self.canvas)
        return AttentionPlan.build(
            order=self.canvas.order,
            document_ids=self.canvas.document_ids,
            is_padding=self.canvas.is_padding,
            is_noisy=self.is_noisy,
            block=self.canvas.order,
        )


def _has_free_order(canvas: Canvas) -> Bool[Tensor, "batch length"]:
    """Tokens that share their order with a free token of the row."""
    num_orders = int(canvas.order.max()) + 1 if canvas.order.numel() else 1
    is_free = torch.zeros(canvas.batch_size, num_orders, device=canvas.device)
    is_free.scatter_reduce_(1, canvas.order, canvas.is_free.float(), "amax")
    return is_free.gather(1, canvas.order) > 0
