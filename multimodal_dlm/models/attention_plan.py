"""Which token sees which: one visibility rule, filled in differently by every mode.

Query q sees key k iff they are in the same document, k is not padding and order(k) <= order(q).
`order` all 0 is full attention; condition 0 and the rest 1 is prefix attention; block numbers are
block-causal attention; the index is causal attention. With dual-stream training rows (Arriola et
al. 2025, arXiv 2503.09573, section 4) a noisy query sees noisy keys of its own block and clean keys
of earlier blocks, a clean query sees clean keys up to its own order. A padding query sees itself.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from multimodal_dlm.canvas import Canvas
from multimodal_dlm.errors import ConfigError


@dataclass(frozen=True)
class Side:
    """What the rule asks of the queries, or of the keys.

    Args:
        column: Column of each token in its canvas.
        order: Attention order.
        document_ids: Document of each token.
        is_padding: Padding.
        is_noisy: Dual-stream rows: the noisy copy of each token; None for rows of one stream.
        block: Dual-stream rows: block of each token, in both copies.
    """

    column: Int[Tensor, " length"]
    order: Int[Tensor, "batch length"]
    document_ids: Int[Tensor, "batch length"]
    is_padding: Bool[Tensor, "batch length"]
    is_noisy: Bool[Tensor, "batch length"] | None = None
    block: Int[Tensor, "batch length"] | None = None

    def select(self, columns: Int[Tensor, " columns"]) -> "Side":
        """Some columns, in the order given."""
        return replace(
            self,
            column=self.column[columns],
            order=self.order[:, columns],
            document_ids=self.document_ids[:, columns],
            is_padding=self.is_padding[:, columns],
            is_noisy=None if self.is_noisy is None else self.is_noisy[:, columns],
            block=None if self.block is None else self.block[:, columns],
        )

    def select_rows(self, rows: Int[Tensor, " rows"]) -> "Side":
        """Some rows."""
        return replace(
            self,
            order=self.order[rows],
            document_ids=self.document_ids[rows],
            is_padding=self.is_padding[rows],
            is_noisy=None if self.is_noisy is None else self.is_noisy[rows],
            block=None if self.block is None else self.block[rows],
        )


@dataclass(frozen=True)
class AttentionPlan:
    """The orders of a canvas; the mask between queries and keys is made when it is asked for.

    Args:
        queries: Tokens that see.
        keys: Tokens that are seen.
    """

    queries: Side
    keys: Side

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
        """The plan of all tokens of some rows.

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
        if document_ids is None:
            document_ids = torch.zeros_like(order)
        column = torch.arange(order.shape[1], device=order.device)
        side = Side(column, order, document_ids, is_padding, is_noisy, block)
        return cls(side, side)

    @property
    def order(self) -> Int[Tensor, "batch queries"]:
        """Attention order of the queries."""
        return self.queries.order

    @property
    def document_ids(self) -> Int[Tensor, "batch queries"]:
        """Document of the queries."""
        return self.queries.document_ids

    @property
    def is_padding(self) -> Bool[Tensor, "batch queries"]:
        """Padding among the queries."""
        return self.queries.is_padding

    @cached_property
    def mask(self) -> Bool[Tensor, "batch 1 queries keys"] | None:
        """True where a query sees a key; None when all is visible."""
        if self._sees_everything():
            return None
        visible = self._visible()
        return None if bool(visible.all()) else visible.unsqueeze(1)

    @cached_property
    def is_causal(self) -> bool:
        """True where every token sees itself and all tokens left of it: kernels need no mask."""
        side, order = self.queries, self.queries.order
        return (
            order.shape[1] > 1
            and torch.equal(side.column, self.keys.column)
            and side.is_noisy is None
            and not bool(side.is_padding.any())
            and bool((side.document_ids == side.document_ids[:, :1]).all())
            and bool((order[:, 1:] > order[:, :-1]).all())
        )

    def prepare(self) -> None:
        """Make what attention needs ahead of code that may be compiled."""
        if not self.is_causal:
            self.mask  # noqa: B018

    def _sees_everything(self) -> bool:
        """True where it takes no mask to tell: one document, no padding, no later key."""
        queries, keys = self.queries, self.keys
        if queries.is_noisy is not None or not keys.order.numel() or not queries.order.numel():
            return False
        return (
            not bool(keys.is_padding.any())
            and not bool(queries.is_padding.any())
            and bool((keys.document_ids == queries.document_ids[:, :1]).all())
            and bool((queries.document_ids == queries.document_ids[:, :1]).all())
            and bool((keys.order.amax(dim=1) <= queries.order.amin(dim=1)).all())
        )

    def _visible(self) -> Bool[Tensor, "batch queries keys"]:
        """The rule, for every pair."""
        queries, keys = self.queries, self.keys
        visible = keys.order.unsqueeze(1) <= queries.order.unsqueeze(2)
        if queries.is_noisy is not None and keys.is_noisy is not None:
            assert queries.block is not None
            assert keys.block is not None
            key_noisy, query_noisy = keys.is_noisy.unsqueeze(1), queries.is_noisy.unsqueeze(2)
            key_block, query_block = keys.block.unsqueeze(1), queries.block.unsqueeze(2)
            from_noisy = torch.where(key_noisy, key_block == query_block, key_block < query_block)
            visible = torch.where(query_noisy, from_noisy, visible & ~key_noisy)
        visible &= keys.document_ids.unsqueeze(1) == queries.document_ids.unsqueeze(2)
        visible &= ~keys.is_padding.unsqueeze(1) & ~queries.is_padding.unsqueeze(2)
        if bool(queries.is_padding.any()):
            itself = queries.column[:, None] == keys.column[None, :]
            visible |= itself & queries.is_padding.unsqueeze(2)
        return visible

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
        keys = torch.cat([closed_columns, open_columns])
        return AttentionPlan(self.queries.select(open_columns), self.keys.select(keys))

    def select_rows(self, rows: Int[Tensor, " rows"]) -> "AttentionPlan":
        """The plan of some rows."""
        return AttentionPlan(self.queries.select_rows(rows), self.keys.select_rows(rows))

    def restrict(self, columns: Int[Tensor, " columns"]) -> "AttentionPlan":
        """The plan of some columns that see nothing but each other."""
        return self.select(columns, columns[:0])

    def queries_at(self, columns: Int[Tensor, " columns"]) -> "AttentionPlan":
        """The plan of some queries against the keys of the whole canvas, in canvas order."""
        return AttentionPlan(self.queries.select(columns), self.keys)

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
