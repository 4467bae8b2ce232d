"""What plans lose: against the divergence of their laws, enumerated with a perfect denoiser."""

import itertools

import pytest
import torch

from multimodal_dlm.errors import ConfigError
from multimodal_dlm.evaluation.plan_errors import (
    compare_plans,
    conditional_table,
    measure_plan_errors,
    plan_losses,
    random_orders,
)
from multimodal_dlm.pipelines import UnifiedTextToImagePipeline
from multimodal_dlm.schedulers.step_plan import parallel_error
from tests.pipelines.tiny import tiny_components
from tests.training.test_masked_diffusion import (
    LENGTH,
    SEQUENCES,
    PerfectDenoiser,
    letters_canvas,
)

ORDERS = torch.tensor(list(itertools.permutations(range(LENGTH))))


def law_of_plan(joint, order, sizes):
    """Probability of every sequence when `sizes` tokens are drawn side by side in an order."""
    law, known = torch.ones_like(joint), []
    start = 0
    for size in sizes:
        step = order[start : start + size].tolist()
        for place in step:
            both, given = [*known, place], known
            law = law * marginal(joint, both) / marginal(joint, given)
        known, start = [*known, *step], start + size
    return law


def marginal(joint, places):
    """Probability of the letters at some places, for every sequence."""
    same = (SEQUENCES[:, None, places] == SEQUENCES[None, :, places]).all(dim=-1)
    return same.double() @ joint


@pytest.fixture(scope="module")
def tables():
    model = PerfectDenoiser()
    canvas = letters_canvas(SEQUENCES)
    found = [conditional_table(model, canvas, order.expand(len(SEQUENCES), -1)) for order in ORDERS]
    return model.joint, found


@pytest.mark.parametrize("sizes", [(3,), (1, 2), (2, 1), (1, 1, 1)])
def test_the_mean_loss_is_the_divergence_of_the_plan(tables, sizes):
    joint, found = tables
    means = []
    for order, table in zip(ORDERS, found, strict=True):
        law = law_of_plan(joint, order, sizes)
        assert float(law.sum()) == pytest.approx(1.0)
        divergence = float((joint * (joint / law).log()).sum())
        measured = float(joint @ plan_losses(table, sizes))
        assert measured == pytest.approx(divergence, abs=1e-9)
        means.append(measured)
    # The same from the profile alone: h(n) is the mean cross-entropy with n tokens known.
    profile = [
        float(torch.stack([joint @ t[:, n, n:].mean(dim=1) for t in found]).mean())
        for n in range(LENGTH)
    ]
    assert sum(means) / len(means) == pytest.approx(parallel_error(profile, sizes), abs=1e-9)
    assert (sum(means) > 1e-3) == (len(sizes) < LENGTH)


def test_a_plan_of_the_measured_profile_loses_what_was_predicted(tables):
    joint, found = tables
    weighted = torch.cat([t * (joint * len(joint))[:, None, None] for t in found])
    profile = [float(weighted[:, n, n:].mean()) for n in range(LENGTH)]
    # 3 tokens: no plan of 4 steps or more, so the comparison has nothing to compare.
    assert compare_plans(weighted, profile).plans == {}
    assert compare_plans(weighted, profile).comparisons == []


def test_orders_hold_each_free_column_once(source):
    canvas = letters_canvas(SEQUENCES)
    canvas.is_free[:, 1] = False
    order = random_orders(canvas, torch.Generator().manual_seed(0))
    assert order.sort(dim=1).values.tolist() == [[0, 2]] * len(SEQUENCES)
    assert len(order.unique(dim=0)) == 2


def test_pictures_are_measured_and_ragged_texts_refused(source):
    pipe = UnifiedTextToImagePipeline(**tiny_components())
    profile = [2.0, 1.0]
    found = measure_plan_errors(pipe, source, profile, split="test", batch_size=2)
    assert (found.num_rows, found.num_tokens) == (3, 16)
    assert found == measure_plan_errors(pipe, source, profile, split="test", batch_size=2)
    row = found.plans["cosine"]
    assert row["16"]["measured"] == row["16"]["predicted"] == 0.0  # One token a step.
    assert {pair["against"] for pair in found.comparisons} == {
        f"cosine {count}" for count in (4, 8, 12, 16)
    }
    for pair in found.comparisons[:4]:
        count = pair["against"].split()[1]
        planned, cosine = found.plans["planned"][count], row[count]
        difference = planned["measured"] - cosine["measured"]
        assert pair["difference"] == pytest.approx(difference, abs=2e-4)
    with pytest.raises(ConfigError, match="windows of one length"):
        measure_plan_errors(pipe, source, profile, split="test", task="caption")
