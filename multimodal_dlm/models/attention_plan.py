"""Which token sees which: one visibility rule, filled in differently by every mode.

Query q sees key k iff they are in the same document, k is not padding and order(k) <= order(q).
`order` all 0 is full attention; condition 0 and the rest 1 is prefix attention; block numbers are
block-causal attention; the index is causal attention. With dual-stream training rows (Arriola et
al. 2025, arXiv 2503.09573, section 4) a noisy query sees noisy keys of its own block and clean keys
of earlier blocks, a clean query sees clean keys up to its own order. A padding query sees itself.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from multimodal_dlm.canvas import Canvas
from multimodal_dlm.errors import ConfigError


@dataclass(frozen=True)
class AttentionPlan:
    """The dense mask of a canvas, built once, and the orders it came from.

    Args:
        mask: True where a query sees a key, (batch, 1, queries, keys); None when all is visible.
        order: Attention order of each token, (batch, length).
        is_padding: Padding of each token, (batch, length).
    """

    mask: Bool[Tensor, "batch 1 queries keys"] | None
    order: Int[Tensor, "batch length"]
    is_padding: Bool[Tensor, "batch length"]

    @classmethod
    def from_canvas(cls, canvas: Canvas) -> "AttentionPlan":
        """The plan of a canvas."""
        return cls.build(
            order=canvas.order, document_ids=canvas.document_ids, is_padding=canvas.is_padding
        )

    @classmethod
    def build(
        cls,
        *,
        order: Int[Tensor, "batch length"],
        document_ids: Int[Tensor, "batch length"] | None = None,
        is_padding: Bool[Tensor, "batch length"] | None = None,
        is_noisy: Bool[Tensor, "batch length"] | None = None,
        block: Int[Tensor, "batch length"] | None = None,
    ) -> "AttentionPlan":
        """Fill in the rule.

        Args:
            order: Attention order; only its comparisons matter.
            document_ids: Document of each token; None for one document a row.
            is_padding: Padding; None for none.
            is_noisy: Dual-stream rows: the noisy copy of each token. Needs `block`.
            block: Dual-stream rows: block of each token, in both copies.
        """
        if (is_noisy is None) != (block is None):
            raise ConfigError("`is_noisy` and `block` go together; got only one of them.")
        if is_padding is None:
            is_padding = torch.zeros_like(order, dtype=torch.bool)
        visible = order.unsqueeze(1) <= order.unsqueeze(2)
        if is_noisy is not None and block is not None:
            key_noisy, query_noisy = is_noisy.unsqueeze(1), is_noisy.unsqueeze(2)
            key_block, query_block = block.unsqueeze(1), block.unsqueeze(2)
            from_noisy = torch.where(key_noisy, key_block == query_block, key_block < query_block)
            visible = torch.where(query_noisy, from_noisy, visible & ~key_noisy)
        if document_ids is not None:
            visible = visible & (document_ids.unsqueeze(1) == document_ids.unsqueeze(2))
        visible = visible & ~is_padding.unsqueeze(1) & ~is_padding.unsqueeze(2)
        itself = torch.eye(order.shape[1], dtype=torch.bool, device=order.device)
        visible = visible | (itself & is_padding.unsqueeze(2))
        mask = None if bool(visible.all()) else visible.unsqueeze(1)
        return cls(mask, order, is_padding)

    def select(
        self,
        open_columns: Int[Tensor, " open"],
        closed_columns: Int[Tensor, " closed"] | None = None,
    ) -> "AttentionPlan":
        """The plan of cached queries: open queries, keys in the order [closed, open].

        Args:
            open_columns: Columns that are computed.
            closed_columns: Columns whose keys are cached; None for all others, in canvas order.
        """
        if closed_columns is None:
            is_closed = torch.ones(self.order.shape[1], dtype=torch.bool, device=self.order.device)
            is_closed[open_columns] = False
            closed_columns = is_closed.nonzero().flatten()
        order, padding = self.order[:, open_columns], self.is_padding[:, open_columns]
        if self.mask is None:
            return AttentionPlan(None, order, padding)
        keys = torch.cat([closed_columns, open_columns])
        mask = self.mask[:, :, open_columns][:, :, :, keys]
        return AttentionPlan(None if bool(mask.all()) else mask, order, padding)

    def select_rows(self, rows: Int[Tensor, " rows"]) -> "AttentionPlan":
        """The plan of some rows."""
        mask = None if self.mask is None else self.mask[rows]
        if mask is not None and bool(mask.all()):
            mask = None
        return AttentionPlan(mask, self.order[rows], self.is_padding[rows])

    def restrict(self, columns: Int[Tensor, " columns"]) -> "AttentionPlan":
        """The plan of some columns that see nothing but each other."""
        return self.select(columns, columns[:0])

    def queries(self, columns: Int[Tensor, " columns"]) -> "AttentionPlan":
        """The plan of some queries against the keys of the whole canvas, in canvas order."""
        mask = None if self.mask is None else self.mask[:, :, columns]
        if mask is not None and bool(mask.all()):
            mask = None
        return AttentionPlan(mask, self.order[:, columns], self.is_padding[:, columns])

    def bias(self, dtype: torch.dtype) -> Float[Tensor, "batch 1 queries keys"] | None:
        """0 where visible, -inf elsewhere, to be added to scores; made once per dtype."""
        if self.mask is None:
            return None
        if dtype not in self._biases:
            zeros = torch.zeros(self.mask.shape, dtype=dtype, device=self.mask.device)
            self._biases[dtype] = zeros.masked_fill_(~self.mask, float("-inf"))
        return self._biases[dtype]

    @cached_property
    def _biases(self) -> dict[torch.dtype, Tensor]:
        return {}
