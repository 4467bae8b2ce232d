"""The visibility rule against brute force, in every mode."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from multimodal_dlm.errors import ConfigError
from multimodal_dlm.models.attention_plan import AttentionPlan

LENGTH = 12
MODES = {
    "full": [0] * LENGTH,
    "prefix": [0] * 5 + [1] * 7,
    "prefix_at_the_end": [1] * 5 + [0] * 7,
    "block_causal": [index // 4 for index in range(LENGTH)],
    "causal": list(range(LENGTH)),
}


def brute_force(order, documents, padding, noisy=None, block=None):
    """The rule written out for one row, query by query."""
    length = len(order)
    visible = torch.zeros(length, length, dtype=torch.bool)
    for query in range(length):
        for key in range(length):
            if padding[query]:
                seen = key == query
            elif padding[key] or documents[query] != documents[key]:
                seen = False
            elif noisy is None or (not noisy[query] and not noisy[key]):
                seen = order[key] <= order[query]
            elif not noisy[query]:
                seen = False
            elif noisy[key]:
                seen = block[key] == block[query]
            else:
                seen = block[key] < block[query]
            visible[query, key] = seen
    return visible


def dense(plan: AttentionPlan) -> torch.Tensor:
    """The mask, all True where the plan has none."""
    batch, length = plan.order.shape
    return (
        torch.ones(batch, 1, length, length, dtype=torch.bool) if plan.mask is None else plan.mask
    )


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_equals_brute_force(mode):
    order = torch.tensor([MODES[mode], MODES[mode]])
    padding = torch.zeros(2, LENGTH, dtype=torch.bool)
    padding[1, [3, 11]] = True
    documents = torch.tensor([[0] * LENGTH, [0] * 6 + [1] * 6])
    plan = AttentionPlan.build(order=order, document_ids=documents, is_padding=padding)
    for row in range(2):
        expected = brute_force(order[row], documents[row], padding[row])
        assert torch.equal(dense(plan)[row, 0], expected)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_any_order_document_and_padding_equals_brute_force(data):
    length = data.draw(st.integers(1, 7))
    draw = lambda top: data.draw(st.lists(st.integers(0, top), min_size=length, max_size=length))  # noqa: E731
    order, documents = torch.tensor([draw(3)]), torch.tensor([draw(1)])
    padding = torch.tensor([draw(1)]).bool()
    plan = AttentionPlan.build(order=order, document_ids=documents, is_padding=padding)
    assert torch.equal(dense(plan)[0, 0], brute_force(order[0], documents[0], padding[0]))


def test_dual_stream_equals_brute_force():
    block = torch.tensor([[0, 0, 1, 1, 2, 2] * 2])
    noisy = torch.tensor([[False] * 6 + [True] * 6])
    padding = torch.zeros(1, 12, dtype=torch.bool)
    padding[0, [5, 11]] = True
    plan = AttentionPlan.build(order=block, is_padding=padding, is_noisy=noisy, block=block)
    expected = brute_force(block[0], [0] * 12, padding[0], noisy[0], block[0])
    assert torch.equal(dense(plan)[0, 0], expected)


def test_a_noisy_token_never_sees_its_own_clean_copy():
    block = torch.tensor([[0, 1, 2, 0, 1, 2]])
    noisy = torch.tensor([[False] * 3 + [True] * 3])
    plan = AttentionPlan.build(order=block, is_noisy=noisy, block=block)
    for position in range(3):
        assert not dense(plan)[0, 0, 3 + position, position]


def test_no_mask_when_everything_is_visible():
    assert AttentionPlan.build(order=torch.zeros(2, 5, dtype=torch.long)).mask is None
    assert AttentionPlan.build(order=torch.tensor([[0, 1]])).mask is not None


def test_half_of_a_dual_stream_is_refused():
    order = torch.zeros(1, 4, dtype=torch.long)
    with pytest.raises(ConfigError, match="go together"):
        AttentionPlan.build(order=order, block=order)


def test_select_reads_open_queries_and_keys_closed_first():
    order = torch.tensor([[1, 1, 0, 0, 1]])
    padding = torch.tensor([[False, False, False, True, False]])
    plan = AttentionPlan.build(order=order, is_padding=padding)
    open_columns, closed = torch.tensor([0, 1, 4]), torch.tensor([2, 3])
    selected = plan.select(open_columns)
    keys = torch.cat([closed, open_columns])
    assert torch.equal(selected.mask, plan.mask[:, :, open_columns][..., keys])
    assert torch.equal(selected.order, order[:, open_columns])


def test_select_is_mask_free_when_the_open_queries_see_all():
    plan = AttentionPlan.build(order=torch.tensor([[1, 1, 0, 0]]))
    assert plan.mask is not None
    assert plan.select(torch.tensor([0, 1])).mask is None


def test_bias_is_zero_where_visible_and_minus_infinity_elsewhere():
    plan = AttentionPlan.build(order=torch.tensor([[0, 1]]))
    bias = plan.bias(torch.float32)
    assert bias[0, 0].tolist() == [[0.0, float("-inf")], [0.0, 0.0]]
    assert plan.bias(torch.float32) is bias


def test_causal_rows_are_known_without_a_mask():
    order = torch.tensor([[0, 1, 2, 3]])
    assert AttentionPlan.build(order=order).is_causal
    assert not AttentionPlan.build(order=torch.tensor([[0, 1, 1, 3]])).is_causal
    assert not AttentionPlan.build(order=torch.tensor([[1, 0, 2, 3]])).is_causal
    padding = torch.tensor([[False, False, False, True]])
    assert not AttentionPlan.build(order=order, is_padding=padding).is_causal
    documents = torch.tensor([[0, 0, 1, 1]])
    assert not AttentionPlan.build(order=order, document_ids=documents).is_causal
    assert not AttentionPlan.build(order=order).select(torch.tensor([2, 3])).is_causal
