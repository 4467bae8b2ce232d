"""The length rule: a finished window is content, one `<eos>`, then `<fill>`.

`<eos>` and `<fill>` are ordinary tokens to the model; this file says where they may stand. What the
caller's `allowed` forbids is never written, even where the rule would write it.
"""

from dataclasses import dataclass, replace

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

    @property
    def positions(self) -> Int[Tensor, " seq"]:
        """0..n-1."""
        return torch.arange(self.sample.shape[1], device=self.sample.device)

    @property
    def is_before_text(self) -> Bool[Tensor, "batch seq"]:
        """Left of a known token that is not `<fill>`: neither `<eos>` nor `<fill>` may stand here.

        Left of a known `<eos>` a second one, or a `<fill>`, would break the window as well.
        """
        is_text = (self.sample != self.mask_column) & (self.sample != self.fill)
        return self.positions < last_true(is_text)[:, None]

    @property
    def is_end(self) -> Bool[Tensor, "batch seq"]:
        """The last place for an `<eos>` in rows that have none: content may not stand here."""
        if not self.ends_window:
            return torch.zeros_like(self.is_masked)
        is_known_fill = self.sample == self.fill
        is_void = (self.sample == self.mask_column) & ~self.is_masked
        is_before_fill = self.positions < first_true(is_known_fill)[:, None]
        end = last_true(~is_void & is_before_fill)
        has_no_eos = ~(self.sample == self.eos).any(dim=1)
        is_end = (self.positions == end[:, None]) & has_no_eos[:, None]
        return is_end & self.is_masked & ~self.is_before_text

    def filled(self) -> "TextWindow":
        """The window with `<fill>` at every mask right of the first known `<eos>` or `<fill>`."""
        is_closer = (self.sample == self.eos) | (self.sample == self.fill)
        is_after = self.positions > first_true(is_closer)[:, None]
        is_filled = self.is_masked & is_after & self.may_be_fill
        return replace(
            self,
            sample=self.sample.masked_fill(is_filled, self.fill),
            is_masked=self.is_masked & ~is_filled,
        )

    def possible_columns(self, num_columns: int) -> Bool[Tensor, "batch seq columns"]:
        """Columns each position may take: no `<eos>` and no `<fill>` left of known text."""
        possible = self.is_masked.new_ones((*self.sample.shape, num_columns))
        possible[..., self.eos] = ~self.is_before_text
        possible[..., self.fill] = ~self.is_before_text
        return possible

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
        is_fill = self.is_masked & (columns == self.fill)
        is_eos = self.is_masked & (columns == self.eos)
        may_close = self.may_be_eos & ~self.is_before_text
        if is_last:
            is_closing = is_eos | (is_fill & may_close)
            columns = columns.masked_fill(self._first(is_closing), self.eos)
            return self._write(columns, self.is_masked & self._up_to(is_closing), is_last=True)
        is_standing = is_chosen & ~is_fill & self._up_to(is_chosen & is_eos)
        is_stuck = self.is_masked.any(dim=1, keepdim=True) & ~is_standing.any(dim=1, keepdim=True)
        is_other = self.is_masked & ~is_fill
        best = scores.masked_fill(~is_other, -torch.inf).argmax(dim=1)
        is_best = is_other & (self.positions == best[:, None])
        is_all_fill = is_stuck & ~is_other.any(dim=1, keepdim=True)
        can_close = is_all_fill & (self.is_masked & may_close).any(dim=1, keepdim=True)
        is_closing = can_close & self._first(self.is_masked & may_close)
        is_forced = is_all_fill & ~can_close & self._first(self.is_masked)
        columns = columns.masked_fill(is_closing, self.eos)
        is_standing = is_standing | (is_stuck & is_best) | is_closing | is_forced
        return self._write(columns, is_standing, is_last=False)

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

    def _first(self, flags: Bool[Tensor, "batch seq"]) -> Bool[Tensor, "batch seq"]:
        """Only the leftmost flag of each row."""
        return flags & (self.positions == first_true(flags)[:, None])

    def _up_to(self, flags: Bool[Tensor, "batch seq"]) -> Bool[Tensor, "batch seq"]:
        """Positions up to and with the leftmost flag of each row; all where there is none."""
        return self.positions <= first_true(flags)[:, None]


def first_true(flags: Bool[Tensor, "batch seq"]) -> Int[Tensor, " batch"]:
    """Position of the first flag of each row; the row's length where there is none."""
    length = flags.shape[1]
    positions = torch.arange(length, device=flags.device).expand(flags.shape)
    return torch.where(flags, positions, length).amin(dim=1)


def last_true(flags: Bool[Tensor, "batch seq"]) -> Int[Tensor, " batch"]:
    """Position of the last flag of each row; -1 where there is none."""
    positions = torch.arange(flags.shape[1], device=flags.device).expand(flags.shape)
    return torch.where(flags, positions, -1).amax(dim=1)
