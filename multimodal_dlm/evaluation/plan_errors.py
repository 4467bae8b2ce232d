"""What step plans lose on held-out rows, measured: the test of what a profile predicts.

The tokens of a row are put in a random order once. With the first n of them known, one forward
gives the cross-entropy of every later token; N forwards give it for all n. A plan that draws the
tokens of a step side by side pays for each what it costs given the tokens before the step, and one
token at a time what it costs given all tokens before it. The difference, in the mean over rows, is
the divergence that a plan adds (`schedulers.step_plan`), for this model and these rows. All plans
read the same numbers, so differences between plans are of pairs.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from multimodal_dlm.canvas import Canvas
from multimodal_dlm.datasets.manifest import Source
from multimodal_dlm.errors import ConfigError
from multimodal_dlm.evaluation.step_profile import (
    COMPARED_STEPS,
    compared_plans,
    random_ranks,
    task_rows,
)
from multimodal_dlm.pipelines.scoring import masked_nll
from multimodal_dlm.schedulers.step_plan import interpolate_profile, parallel_error

# Fewer steps by the profile against more by the cosine schedule.
FEWER_STEPS = (14, 16)


@dataclass(frozen=True)
class PlanErrors:
    """Measured beside predicted losses of step plans.

    Args:
        num_rows: Rows measured.
        num_tokens: Tokens of each row's window.
        plans: Plan -> steps -> `predicted`, `measured` and `standard_error`, nats a window.
        comparisons: Pairs of plans: `plan`, `against`, the measured `difference` (below 0: the
            plan loses less), its `standard_error` over rows, and the difference `predicted`.
    """

    num_rows: int
    num_tokens: int
    plans: dict[str, dict[str, dict[str, float]]]
    comparisons: list[dict[str, Any]]


@torch.no_grad()
def measure_plan_errors(
    pipeline: Any,
    source: Source,
    profile: Sequence[float],
    *,
    split: str,
    task: str = "text_to_image",
    limit: int = 128,
    skip: int = 0,
    batch_size: int = 32,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> PlanErrors:
    """Losses of the linear, cosine, geometric and planned sizes of steps.

    Args:
        pipeline: Any pipeline of this package.
        source: Dataset.
        profile: Nats a token at evenly spaced shares of known tokens, measured on another split.
        split: Held-out split.
        task: Which window is free; every row's must be equally long.
        limit: Rows at most.
        skip: Rows passed over first.
        batch_size: Rows at once.
        seed: Of the orders and of the choice among captions or questions.
        progress: Called with (batches done, batches).

    Raises:
        ConfigError: When windows differ in length, or are shorter than two tokens.
        DataError: When the split has no row for the task.
    """
    canvases = task_rows(pipeline, source, split, task, limit, batch_size, seed, skip)
    lengths = {int(n) for canvas in canvases for n in canvas.is_free.sum(dim=1)}
    if len(lengths) > 1 or min(lengths) < 2:
        raise ConfigError(
            "Plans are measured on windows of one length, 2 tokens or more; task"
            f" `{task}` has {sorted(lengths)[:8]}. Use `text_to_image` or `unconditional_image`."
        )
    generator = torch.Generator().manual_seed(seed)
    transformer = pipeline.transformer.eval()
    tables = []
    for number, canvas in enumerate(canvases):
        order = random_orders(canvas, generator)
        tables.append(conditional_table(transformer, canvas, order))
        if progress is not None:
            progress(number + 1, len(canvases))
    return compare_plans(torch.cat(tables), profile)


def random_orders(canvas: Canvas, generator: torch.Generator) -> Int[Tensor, "batch tokens"]:
    """The columns of each row's free tokens in random order; every row must have equally many."""
    columns = random_ranks(canvas, generator).argsort(dim=1)
    return columns[:, : int(canvas.is_free[0].sum())]


def conditional_table(
    transformer: Any, canvas: Canvas, order: Int[Tensor, "batch tokens"]
) -> Float[Tensor, "batch tokens tokens"]:
    """Nll in nats of the j-th token of an order given its first n, at [row, n, j]; 0 for j < n."""
    num_tokens = order.shape[1]
    table = torch.zeros(len(order), num_tokens, num_tokens, dtype=torch.float64)
    for known in range(num_tokens):
        is_masked = torch.zeros_like(canvas.is_free)
        is_masked.scatter_(1, order[:, known:], value=True)
        nll = masked_nll(transformer, canvas, is_masked)
        table[:, known, known:] = nll.gather(1, order[:, known:]).cpu()
    return table


def plan_losses(
    table: Float[Tensor, "batch tokens tokens"], sizes: Sequence[int]
) -> Float[Tensor, " batch"]:
    """Nats each row pays for drawing `sizes` tokens at a time instead of one."""
    sequential = table.diagonal(dim1=1, dim2=2).sum(dim=1)
    paid, start = torch.zeros_like(sequential), 0
    for size in sizes:
        paid += table[:, start, start : start + size].sum(dim=1)
        start += size
    return paid - sequential


def compare_plans(
    table: Float[Tensor, "batch tokens tokens"], profile: Sequence[float]
) -> PlanErrors:
    """Every plan's predicted and measured loss, and the planned sizes against the cosine ones."""
    num_rows, num_tokens, _ = table.shape
    entropies = interpolate_profile(profile, num_tokens)
    steps = sorted({*COMPARED_STEPS, *FEWER_STEPS})
    sizes = compared_plans(profile, num_tokens, steps)
    losses = {key: plan_losses(table, plan) for key, plan in sizes.items()}
    predicted = {key: parallel_error(entropies, plan) for key, plan in sizes.items()}
    plans: dict[str, dict[str, dict[str, float]]] = {}
    for (name, count), rows in losses.items():
        plans.setdefault(name, {})[str(count)] = {
            "predicted": round(predicted[name, count], 4),
            **_summary("measured", rows),
        }
    fewer, more = FEWER_STEPS
    pairs = [(("planned", count), ("cosine", count)) for count in COMPARED_STEPS]
    pairs.append((("planned", fewer), ("cosine", more)))
    comparisons = [
        {
            "plan": f"{one[0]} {one[1]}",
            "against": f"{other[0]} {other[1]}",
            **_summary("difference", losses[one] - losses[other]),
            "predicted": round(predicted[one] - predicted[other], 4),
        }
        for one, other in pairs
        if one in losses and other in losses
    ]
    return PlanErrors(num_rows, num_tokens, plans, comparisons)


def _summary(name: str, rows: Float[Tensor, " batch"]) -> Mapping[str, float]:
    error = float(rows.std()) / len(rows) ** 0.5 if len(rows) > 1 else 0.0
    return {name: round(float(rows.mean()), 4), "standard_error": round(error, 4)}
