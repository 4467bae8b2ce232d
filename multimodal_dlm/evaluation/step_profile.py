"""The information profile of a model, and what step plans made from it are predicted to cost."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from multimodal_dlm.canvas import Canvas
from multimodal_dlm.datasets.manifest import Source
from multimodal_dlm.datasets.mixture import task_texts
from multimodal_dlm.datasets.reading import iterate_samples
from multimodal_dlm.datasets.schema import Sample
from multimodal_dlm.diffusion.mask_schedules import get_mask_schedule
from multimodal_dlm.errors import ConfigError, DataError, unknown_name
from multimodal_dlm.evaluation.encoding import encode_images
from multimodal_dlm.pipelines.scoring import masked_nll
from multimodal_dlm.schedulers.step_plan import interpolate_profile, parallel_error, plan_steps

TASKS = ("text_to_image", "caption", "vqa", "unconditional_image", "unconditional_text")
COMPARED_STEPS = (4, 8, 12, 16)


@dataclass(frozen=True)
class StepProfile:
    """Nats per token against the share of known tokens.

    Args:
        modality: Modality of the free window.
        task: Task whose rows were scored.
        values: h at shares i / (M - 1) of known tokens.
        standard_errors: Of the values, over rows.
        num_tokens: Tokens of the longest window that was scored.
        num_rows: Rows scored at each share.
        predictions: `predicted_errors` of the profile.
    """

    modality: str
    task: str
    values: list[float]
    standard_errors: list[float]
    num_tokens: int
    num_rows: int
    predictions: dict[str, dict[str, float]] = field(default_factory=dict)


@torch.no_grad()
def measure_step_profile(
    pipeline: Any,
    source: Source,
    *,
    split: str,
    task: str = "text_to_image",
    num_points: int = 17,
    limit: int = 256,
    skip: int = 0,
    batch_size: int = 32,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> StepProfile:
    """Mean cross-entropy of a masked token with a given share of its window known.

    At share i / (M - 1), a row with N free tokens has the first round(share (N - 1)) of them known
    in a random order, and the true tokens of the others are scored: an upper bound on h(j), tight
    for a perfect model. A row has one order for all shares: a plan is made of differences of h, and
    those of independent orders would be noisier. Guidance and temperature are not part of it.

    Args:
        pipeline: Any pipeline of this package.
        source: Dataset.
        split: Held-out split.
        task: Which window is free: see `TASKS`.
        num_points: Shares M, at least 2.
        limit: Rows at most.
        skip: Rows passed over first.
        batch_size: Rows at once.
        seed: Of the orders and of the choice among captions or questions.
        progress: Called with (points done, points).

    Raises:
        ConfigError: When the task is unknown or there are fewer than 2 points.
        DataError: When the split has no row for the task.
    """
    if task not in TASKS:
        raise unknown_name("task", task, TASKS)
    if num_points < 2:
        raise ConfigError(f"`num_points` must be 2 or more; got {num_points}. Use 17.")
    canvases = task_rows(pipeline, source, split, task, limit, batch_size, seed, skip)
    transformer = pipeline.transformer.eval()
    generator = torch.Generator().manual_seed(seed)
    ranked = [(canvas, random_ranks(canvas, generator)) for canvas in canvases]
    values, errors = [], []
    for point in range(num_points):
        share = point / (num_points - 1)
        rows = torch.cat([_row_means(transformer, *pair, share) for pair in ranked])
        values.append(float(rows.mean()))
        errors.append(float(rows.std()) / len(rows) ** 0.5 if len(rows) > 1 else 0.0)
        if progress is not None:
            progress(point + 1, num_points)
    first = canvases[0]
    index = int(first.modality_ids[first.is_free][0])
    num_tokens = max(int(canvas.is_free.sum(dim=1).max()) for canvas in canvases)
    return StepProfile(
        modality=list(transformer.vocabulary.modalities)[index],
        task=task,
        values=[round(value, 6) for value in values],
        standard_errors=[round(error, 6) for error in errors],
        num_tokens=num_tokens,
        num_rows=sum(canvas.batch_size for canvas in canvases),
        predictions=predicted_errors(values, num_tokens),
    )


def predicted_errors(
    profile: Sequence[float], num_tokens: int, steps: Sequence[int] = COMPARED_STEPS
) -> dict[str, dict[str, float]]:
    """Expected KL in nats by step plan and number of steps, tokens in random order.

    Args:
        profile: As for `plan_steps`.
        num_tokens: Tokens of the window.
        steps: Numbers of steps to compare; those beyond `num_tokens` are left out.
    """
    entropies = interpolate_profile(profile, num_tokens)
    table: dict[str, dict[str, float]] = {}
    for (name, count), sizes in compared_plans(profile, num_tokens, steps).items():
        table.setdefault(name, {})[str(count)] = round(parallel_error(entropies, sizes), 4)
    return table


def compared_plans(
    profile: Sequence[float], num_tokens: int, steps: Sequence[int]
) -> dict[tuple[str, int], list[int]]:
    """Sizes of the steps by plan and number of steps; numbers beyond `num_tokens` are left out."""
    plans: dict[tuple[str, int], list[int]] = {}
    for count in (count for count in steps if count <= num_tokens):
        for name in ("linear", "cosine", "geometric"):
            plans[name, count] = schedule_sizes(name, num_tokens, count)
        plans["planned", count] = list(plan_steps(profile, num_tokens, count))
    return plans


def schedule_sizes(name: str, num_tokens: int, num_steps: int) -> list[int]:
    """Tokens a scheduler commits at each step under a mask schedule, at least one each.

    Args:
        name: Mask schedule.
        num_tokens: Tokens of the window.
        num_steps: Steps, at most `num_tokens`.
    """
    schedule = get_mask_schedule(name)
    left, sizes = num_tokens, []
    for step in range(num_steps):
        if left == 0:
            break
        after = 1.0 - (step + 1) / num_steps
        share = 1.0 - float(schedule.alpha(after)) if after > 0.0 else 0.0
        target = min(int(np.floor(num_tokens * share + 1e-9)), left - 1)
        sizes.append(left - max(target, 0))
        left = max(target, 0)
    return sizes


def task_rows(
    pipeline: Any,
    source: Source,
    split: str,
    task: str,
    limit: int,
    batch_size: int,
    seed: int,
    skip: int = 0,
) -> list[Canvas]:
    """Clean rows of a task, in batches.

    Raises:
        DataError: When the split has no row for the task.
    """
    rng = np.random.default_rng(seed)
    has_questions = task == "vqa"
    usable = (s for s in iterate_samples(source, split) if s.record.qa or not has_questions)
    samples = list(islice(usable, skip, skip + limit))
    if not samples:
        beyond = f" beyond the first {skip}" if skip else ""
        raise DataError(f"`{source.name}` has no row for task `{task}` in split `{split}`{beyond}.")
    batches = (samples[first : first + batch_size] for first in range(0, len(samples), batch_size))
    return [_canvas(pipeline, source, batch, task, rng) for batch in batches]


def _canvas(
    pipeline: Any, source: Source, samples: Sequence[Sample], task: str, rng: Any
) -> Canvas:
    pairs = [
        task_texts(sample.record, task, float(rng.random()), source.caption_weights)
        for sample in samples
    ]
    codes = None
    if task != "unconditional_text":
        codes = encode_images(pipeline, [sample.image for sample in samples], len(samples))
    return pipeline.processor.score(
        task,
        codes=codes,
        texts=None if task == "unconditional_image" else [text for _, text in pairs],
        questions=[question for question, _ in pairs] if task == "vqa" else None,
    ).to(pipeline.device)


def random_ranks(canvas: Canvas, generator: torch.Generator) -> Int[Tensor, "batch length"]:
    """The place of each free token in a random order of its row's, from 0; others come later."""
    draws = torch.rand(canvas.is_free.shape, generator=generator).to(canvas.device)
    return draws.masked_fill(~canvas.is_free, 2.0).argsort(dim=1).argsort(dim=1)


def _row_means(
    transformer: Any, canvas: Canvas, ranks: Int[Tensor, "batch length"], share: float
) -> Float[Tensor, " batch"]:
    """Mean nll of the masked tokens of each row with a share of its free tokens known."""
    num_free = canvas.is_free.sum(dim=1)
    num_known = (share * (num_free - 1)).round().long()
    is_target = canvas.is_free & (ranks >= num_known[:, None])
    nll = masked_nll(transformer, canvas, is_target).sum(dim=1)
    return (nll / (num_free - num_known)).cpu()
