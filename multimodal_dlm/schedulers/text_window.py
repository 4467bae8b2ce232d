"""The length rule: a finished window is content, one `<eos>`, then `<fill>`.

`<eos>` and `<fill>` are ordinary tokens to the model; this file says where they may stand. What the
caller's `allowed` forbids is never written, even where the rule would write it.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class TextWindow:
    """A window under the length rule, as one step sees it.

    Args:
        sample: Columns; V where masked, and where the position is void (padding, a frozen mask).
        is_masked: Masked and free.
        eos: Column of `<eos>`.
        fill: Column of `<fill>`.
        mask_column: V.
        may_be_eos: Masked positions where the caller allows `<eos>`.
        may_be_fill: Masked positions where the caller allows `<fill>`.
        ends_window: False where a later block goes on with the window: it need not end here.
    """

    sample: Int[Tensor, "batch seq"]
    is_masked: Bool[Tensor, "batch seq"]
    eos: int
    fill: int
    mask_column: int
    may_be_eos: Bool[Tensor, "batch seq"]
    may_be_fill: Bool[Tensor, "batch seq"]
    ends_window: bool = True

    @cached_property
    def is_before_text(self) -> Bool[Tensor, "batch seq"]:
        """Left of a known token that is not `<fill>`: neither `<eos>` nor `<fill>` may stand here.

        Left of a known `<eos>` a second one, or a `<fill>`, would break the window as well.
        """
        return any_right(self._is_text)

    @property
    def is_end(self) -> Bool[Tensor, "batch seq"]:
        """The last place for an `<eos>` in rows that have none: content may not stand here."""
        is_open = without(self.is_masked, self._is_closed)
        return without(is_open, any_right(is_open | self._is_text))

    @cached_property
    def is_waiting(self) -> Bool[Tensor, "batch seq"]:
        """Masks that stay when those right of the first known `<eos>` or `<fill>` are filled."""
        return without(self.is_masked, self._is_closed & self.may_be_fill)

    @cached_property
    def filled(self) -> Int[Tensor, "batch seq"]:
        """Columns with `<fill>` at every mask that is not waiting."""
        return self.sample.masked_fill(without(self.is_masked, self.is_waiting), self.fill)

    def restrict(
        self,
        logits: Float[Tensor, "masked columns"],
        allowed: Bool[Tensor, "masked columns"] | None,
    ) -> tuple[Float[Tensor, "waiting columns"], Float[Tensor, "waiting columns"]]:
        """Logits of the columns that are possible, and of those that may be drawn, where waiting.

        Neither `<eos>` nor `<fill>` is possible left of known text, and nothing else is drawn at
        the end; both only where something `allowed` is left.

        Args:
            logits: At the masked positions, -inf in columns that are not allowed.
            allowed: Columns the caller allows there; None for all.
        """
        low, high = sorted((self.eos, self.fill))
        closers = slice(low, high + 1, high - low)  # These two columns.
        rows = self.is_waiting[self.is_masked].nonzero().flatten()
        is_before, is_end = self.is_before_text[self.is_waiting], self.is_end[self.is_waiting]
        if allowed is not None:
            num_allowed = allowed[rows].sum(dim=1)
            num_closing = allowed[rows, closers].sum(dim=1)
            is_before, is_end = is_before & (num_allowed > num_closing), is_end & (num_closing > 0)
        possible = logits.index_select(0, rows)
        possible[:, closers].masked_fill_(is_before[:, None], -torch.inf)
        if not self.ends_window:
            return possible, possible
        drawable = possible.index_fill(0, is_end.nonzero().flatten(), -torch.inf)
        drawable[:, closers] = possible[:, closers]
        return possible, drawable

    def commit(
        self,
        columns: Int[Tensor, "batch seq"],
        scores: Float[Tensor, "batch seq"],
        is_chosen: Bool[Tensor, "batch seq"],
        *,
        is_last: bool,
    ) -> Int[Tensor, "batch seq"]:
        """Commit the chosen tokens the rule lets stand, at least one in each unfinished row.

        Args:
            columns: Drawn token of each waiting position.
            scores: Confidence of each waiting position; the higher the earlier.
            is_chosen: Positions the plan takes in this step, all that wait at the last step.
            is_last: The run ends with this step: nothing may be held back.

        Returns:
            Columns after the step, with `<fill>` at the masks right of a committed `<eos>`.
        """
        is_fill, is_eos = columns == self.fill, columns == self.eos
        if is_last:
            is_closing = self.is_waiting & (is_eos | (is_fill & self._may_close))
            columns = columns.masked_fill(first(is_closing), self.eos)
            is_written, is_closed = self.is_waiting, any_left(is_closing)
        else:
            is_closed = any_left(is_chosen & is_eos)
            is_written = without(is_chosen, is_fill | is_closed)
            is_stuck = without(self.is_waiting.any(dim=1), is_written.any(dim=1))
            if any(is_stuck.tolist()):
                columns, freed = self._free(columns, scores, without(self.is_waiting, is_fill))
                is_written = is_written | (freed & is_stuck[:, None])
                is_closed = any_left(is_written & self._closes(columns))
        written = torch.where(is_written, columns, self.filled)
        return written.masked_fill(self.is_waiting & is_closed & self.may_be_fill, self.fill)

    @cached_property
    def _is_text(self) -> Bool[Tensor, "batch seq"]:
        """Known tokens that are not `<fill>`."""
        return (self.sample != self.mask_column) & (self.sample != self.fill)

    @cached_property
    def _is_closed(self) -> Bool[Tensor, "batch seq"]:
        """Right of the first known `<eos>` or `<fill>`."""
        return any_left(self._closes(self.sample))

    @property
    def _may_close(self) -> Bool[Tensor, "batch seq"]:
        """Positions that could take `<eos>`."""
        return without(self.may_be_eos, self.is_before_text)

    def _closes(self, columns: Int[Tensor, "batch seq"]) -> Bool[Tensor, "batch seq"]:
        """Where `<eos>` or `<fill>` stands."""
        return (columns == self.eos) | (columns == self.fill)

    def _free(
        self,
        columns: Int[Tensor, "batch seq"],
        scores: Float[Tensor, "batch seq"],
        is_content: Bool[Tensor, "batch seq"],
    ) -> tuple[Int[Tensor, "batch seq"], Bool[Tensor, "batch seq"]]:
        """What a row commits that would otherwise commit nothing, and the columns with it.

        The best token that is not `<fill>`; without one `<eos>` at the first place for it; without
        a place the first token.
        """
        best = scores.masked_fill(~is_content, -torch.inf).argmax(dim=1, keepdim=True)
        is_best = torch.zeros_like(is_content).scatter_(1, best, True)
        has_none = ~is_content.any(dim=1, keepdim=True)
        is_place = self.is_waiting & self._may_close
        is_closing = has_none & first(is_place)
        is_forced = has_none & ~is_place.any(dim=1, keepdim=True) & first(self.is_waiting)
        freed = (is_best & is_content) | is_closing | is_forced
        return columns.masked_fill(is_closing, self.eos), freed


def without(
    flags: Bool[Tensor, "*shape"], others: Bool[Tensor, "*shape"]
) -> Bool[Tensor, "*shape"]:
    """The flags that are not among the others."""
    return flags > others


def any_left(flags: Bool[Tensor, "batch seq"]) -> Bool[Tensor, "batch seq"]:
    """Positions with a flag strictly left of them."""
    return flags.cumsum(dim=1) > flags


def any_right(flags: Bool[Tensor, "batch seq"]) -> Bool[Tensor, "batch seq"]:
    """Positions with a flag strictly right of them."""
    count = flags.cumsum(dim=1)
    return count < count[:, -1:]


def first(flags: Bool[Tensor, "batch seq"]) -> Bool[Tensor, "batch seq"]:
    """Only the leftmost flag of each row."""
    return without(flags, any_left(flags))
