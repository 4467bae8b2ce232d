"""Runs that hypothesis draws, cached against uncached: plan, rows, padding, guidance, known tokens.

The plans are all those with one order a run of columns: prefix, blocks of any lengths, causal, and
what lies between. Every forward is compared, see `tests.pipelines.test_cached_runs.Checked`: logits
to 1e-10 in float64 and to 1e-5 x max(1, |logit|) in float32; ids are the same in both.
"""

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from multimodal_dlm.models.kv_cache import ExactCacheConfig
from tests.diffusion.oracle import EXAMPLES
from tests.models.tiny import tiny_model
from tests.pipelines.test_cached_runs import CONDITION, NOISY, Checked, make_canvas, run


class Drawn(NamedTuple):
    order: list[int]
    lengths: list[int]
    is_known: list[list[bool]]
    shift: int
    guidance: float
    steps: int
    temperature: float
    num_prefixes: int


@st.composite
def drawn_runs(draw):
    order = [1]
    for climb in draw(st.lists(st.sampled_from([0, 0, 1, 1, 2]), max_size=6)):
        order.append(order[-1] + climb)
    lengths = draw(st.lists(st.integers(1, CONDITION), min_size=1, max_size=3))
    row = st.lists(st.booleans(), min_size=len(order), max_size=len(order))
    return Drawn(
        order=order,
        lengths=lengths,
        is_known=[draw(row) for _ in lengths],
        shift=draw(st.sampled_from([0, 1])),
        guidance=draw(st.sampled_from([1.0, 2.5])),
        steps=draw(st.integers(1, len(order) + 1)),
        temperature=draw(st.sampled_from([0.0, 1.0])),
        num_prefixes=draw(st.sampled_from([0, 1, 8])),
    )


MODELS = {
    (shift, dtype): tiny_model(logits_shift=shift).to(dtype)
    for shift in (0, 1)
    for dtype in (torch.float32, torch.float64)
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@settings(EXAMPLES, max_examples=40)
@given(drawn=drawn_runs())
def test_every_step_equals_the_uncached_one(dtype, drawn):
    model = MODELS[drawn.shift, dtype]
    canvas = make_canvas(model.vocabulary, drawn.order, drawn.lengths)
    ids = canvas.input_ids.clone()
    is_known = torch.tensor(drawn.is_known)
    written = model.vocabulary.columns("text").start + 2 + torch.arange(len(drawn.order)) % 20
    ids[:, CONDITION:] = torch.where(is_known, written, ids[:, CONDITION:])
    canvas = canvas.replace(input_ids=ids)
    options = {
        "guidance": drawn.guidance,
        "steps": drawn.steps,
        "settings": {**NOISY, "temperature": drawn.temperature},
    }
    expected = run(model, canvas, **options)
    assert not bool(model.vocabulary.is_masked(expected.canvas.input_ids).any())
    model.enable_cache(ExactCacheConfig(num_prefixes=drawn.num_prefixes))
    try:
        for _ in range(2):  # The second call may find the prefixes of the first.
            checked = Checked(model)
            found = run(checked, canvas, **options)
            checked.hook.remove()
            assert checked.num_compared == found.num_forwards == expected.num_forwards
            assert torch.equal(found.canvas.input_ids, expected.canvas.input_ids)
    finally:
        model.disable_cache()
