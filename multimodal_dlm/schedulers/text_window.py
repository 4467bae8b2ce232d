"""The length rule: a finished window is content, one `<eos>`, then `<fill>`.

`<eos>` and `<fill>` are ordinary tokens to the model; this file says where they may stand. What the
caller's `allowed` forbids is never written, even where the rule would write it.
"""

from dataclasses import dataclass, replace
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
        may_be_eos: The caller allows `<eos>` at this position.
        may_be_fill: The caller allows `<fill>` at this position.
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
        return any_right((self.sample != self.mask_column) & (self.sample != self.fill))

    @property
    def is_end(self) -> Bool[Tensor, "batch seq"]:
        """The last place for an `<eos>` in rows that have none: content may not stand here."""
        if not self.ends_window:
            return torch.zeros_like(self.is_masked)
        is_void = (self.sample == self.mask_column) & ~self.is_masked
        is_known_fill = self.sample == self.fill
        may_end = ~(is_void | is_known_fill | any_left(is_known_fill))
        has_no_eos = ~(self.sample == self.eos).any(dim=1, keepdim=True)
        is_end = may_end & ~any_right(may_end) & has_no_eos
        return is_end & self.is_masked & ~self.is_before_text

    def filled(self) -> "TextWindow":
        """The window with `<fill>` at every mask right of the first known `<eos>` or `<fill>`."""
        is_closed = any_left((self.sample == self.eos) | (self.sample == self.fill))
        is_filled = self.is_masked & is_closed & self.may_be_fill
        return replace(
            self,
            sample=self.sample.masked_fill(is_filled, self.fill),
            is_masked=self.is_masked & ~is_filled,
        )

    def restrict(
        self,
        logits: Float[Tensor, "masked columns"],
        allowed: Bool[Tensor, "masked columns"] | None,
    ) -> tuple[Float[Tensor, "masked columns"], Float[Tensor, "masked columns"]]:
        """Logits of the columns that are possible, and of those that may be drawn.

        Neither `<eos>` nor `<fill>` is possible left of known text, and nothing else is drawn at
        the end; both only where something `allowed` is left.

        Args:
            logits: At the masked positions, -inf in columns that are not allowed.
            allowed: Columns the caller allows there; None for all.
        """
        is_content = logits.new_ones(logits.shape[1], dtype=torch.bool)
        closers = torch.tensor([self.eos, self.fill], device=logits.device)
        is_content[closers] = False
        is_before, is_end = self.is_before_text[self.is_masked], self.is_end[self.is_masked]
        if allowed is not None:
            is_before = is_before & (allowed & is_content).any(dim=1)
            is_end = is_end & allowed[:, closers].any(dim=1)
        closing = logits[:, closers].masked_fill(is_before[:, None], -torch.inf)
        possible = logits.index_copy(1, closers, closing)
        return possible, possible.masked_fill(is_end[:, None] & is_content, -torch.inf)

    def commit(
        self,
        columns: Int[Tensor, "batch seq"],
        scores: Float[Tensor, "batch seq"],
        is_chosen: Bool[Tensor, "batch seq"],
        *,
        is_last: bool,
    ) -> "TextWindow":
        """Commit the chosen tokens the rule lets stand, at least one in each unfinished row.

        Args:
            columns: Drawn token of each masked position.
            scores: Confidence of each masked position; the higher the earlier.
            is_chosen: Positions the plan takes in this step, all of them at the last step.
            is_last: The run ends with this step: nothing may be held back.
        """
        is_fill, is_eos = columns == self.fill, columns == self.eos
        if is_last:
            is_closing = self.is_masked & (is_eos | (is_fill & self._may_close))
            columns = columns.masked_fill(first(is_closing), self.eos)
            return self._write(columns, self.is_masked & ~any_left(is_closing), is_last=True)
        is_standing = is_chosen & ~(is_fill | any_left(is_chosen & is_eos))
        is_stuck = self.is_masked.any(dim=1) > is_standing.any(dim=1)
        if bool(is_stuck.any()):
            columns, freed = self._free(columns, scores, self.is_masked & ~is_fill)
            is_standing = is_standing | (freed & is_stuck[:, None])
        return self._write(columns, is_standing, is_last=False)

    @property
    def _may_close(self) -> Bool[Tensor, "batch seq"]:
        """Positions that could take `<eos>`."""
        return self.may_be_eos & ~self.is_before_text

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
        is_place = self.is_masked & self._may_close
        is_closing = has_none & first(is_place)
        is_forced = has_none & ~is_place.any(dim=1, keepdim=True) & first(self.is_masked)
        freed = (is_best & is_content) | is_closing | is_forced
        return columns.masked_fill(is_closing, self.eos), freed

    def _write(
        self,
        columns: Int[Tensor, "batch seq"],
        is_written: Bool[Tensor, "batch seq"],
        *,
        is_last: bool,
    ) -> "TextWindow":
        """Write tokens, fill what is right of `<eos>`, and at the last step whatever is left."""
        written = replace(
            self,
            sample=torch.where(is_written, columns, self.sample),
            is_masked=self.is_masked & ~is_written,
        ).filled()
        if not is_last:
            return written
        return replace(
            written,
            sample=torch.where(written.is_masked, columns, written.sample),
            is_masked=torch.zeros_like(written.is_masked),
        )


def any_left(flags: Bool[Tensor, "batch seq"]) -> Bool[Tensor, "batch seq"]:
    """Positions with a flag strictly left of them."""
    return flags.cumsum(dim=1) > flags


def any_right(flags: Bool[Tensor, "batch seq"]) -> Bool[Tensor, "batch seq"]:
    """Positions with a flag strictly right of them."""
    count = flags.cumsum(dim=1)
    return count < count[:, -1:]


def first(flags: Bool[Tensor, "batch seq"]) -> Bool[Tensor, "batch seq"]:
    """Only the leftmost flag of each row."""
    return flags & ~any_left(flags)
