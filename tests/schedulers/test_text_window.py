"""The vectorised length rule against the same rule written row by row."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from multimodal_dlm.schedulers.text_window import TextWindow, any_left, any_right, first

EOS, FILL, COLUMNS = 0, 1, 5


def reference_commit(row, is_masked, columns, scores, is_chosen, is_last):
    """One step of the rule for one row, in the words of the specification."""
    row, masked = list(row), [p for p, flag in enumerate(is_masked) if flag]
    if not masked:
        return row
    chosen = masked if is_last else [p for p in masked if is_chosen[p]]
    ends = [p for p in chosen if columns[p] == EOS]
    end = min(ends, default=len(row))
    standing = [p for p in chosen if columns[p] != FILL and p <= end]
    held_fill = [p for p in chosen if columns[p] == FILL and p < end]
    written = {p: columns[p] for p in standing}
    if is_last and held_fill:
        written[held_fill[0]] = EOS
    elif not standing:
        others = [p for p in masked if columns[p] != FILL]
        if others:
            best = max(others, key=lambda p: (scores[p], -p))
            written = {best: columns[best]}
        else:
            written = {masked[0]: EOS}
    first_end = min((p for p, column in written.items() if column == EOS), default=len(row))
    for p in masked:
        if p in written and p <= first_end:
            row[p] = written[p]
        elif p > first_end:
            row[p] = FILL
    return row


@settings(max_examples=150, deadline=None)
@given(
    length=st.integers(1, 9),
    share_known=st.sampled_from([0.0, 0.3, 0.7]),
    share_chosen=st.sampled_from([0.0, 0.3, 0.8]),
    is_last=st.booleans(),
    seed=st.integers(0, 100_000),
)
def test_commit_equals_the_reference(length, share_known, share_chosen, is_last, seed):
    generator = torch.Generator().manual_seed(seed)
    shape = (8, length)
    is_masked = torch.rand(shape, generator=generator) >= share_known
    known = torch.randint(2, COLUMNS, shape, generator=generator)
    sample = torch.where(is_masked, COLUMNS, known)
    everywhere = torch.ones(shape, dtype=torch.bool)
    window = TextWindow(
        sample=sample,
        is_masked=is_masked,
        eos=EOS,
        fill=FILL,
        mask_column=COLUMNS,
        may_be_eos=everywhere,
        may_be_fill=everywhere,
    )
    columns = torch.randint(0, COLUMNS, shape, generator=generator)
    # The draw leaves no `<eos>` and no `<fill>` left of known text, no content at the last place.
    columns = columns.masked_fill(window.is_before_text & (columns < 2), 2)
    columns = columns.masked_fill(window.is_end & (columns >= 2), FILL)
    scores = torch.rand(shape, generator=generator, dtype=torch.float64)
    scores = scores.masked_fill(~is_masked, -torch.inf)
    is_chosen = (torch.rand(shape, generator=generator) < share_chosen) & is_masked
    if is_last:
        is_chosen = is_masked
    committed = window.commit(columns, scores, is_chosen, is_last=is_last)
    for row in range(len(sample)):
        expected = reference_commit(
            sample[row].tolist(), is_masked[row].tolist(), columns[row].tolist(),
            scores[row].tolist(), is_chosen[row].tolist(), is_last,
        )  # fmt: skip
        assert committed[row].tolist() == expected
    if is_last:
        assert not bool((committed == COLUMNS).any())


def test_flags_to_the_left_and_to_the_right():
    flags = torch.tensor([[False, True, True], [False, False, False], [True, False, False]])
    assert any_left(flags).tolist() == [[False, False, True], [False] * 3, [False, True, True]]
    assert any_right(flags).tolist() == [[True, True, False], [False] * 3, [False] * 3]
    assert first(flags).tolist() == [[False, True, False], [False] * 3, [True, False, False]]
    assert any_right(flags[:, :0]).shape == any_left(flags[:, :0]).shape == (3, 0)
