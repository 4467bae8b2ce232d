"""What objectives over canvases share: one normalisation and one way to report.

loss_m = sum over rows of (weight of the row's task x NELBO_row) / sum of window lengths, both over
the global accumulated batch; the total is the weighted sum over modalities m.
"""

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from multimodal_dlm.canvas import Canvas
from multimodal_dlm.diffusion.timesteps import banded_uniforms, stratified_uniforms
from multimodal_dlm.errors import ConfigError, unknown_name
from multimodal_dlm.processing import TASKS
from multimodal_dlm.training.objectives.base import Batch, Objective, StepPlan, Term
from multimodal_dlm.training.randomness import step_generator
from multimodal_dlm.vocabulary import UnifiedVocabulary


class CanvasObjective(Objective):
    """An objective over canvases, weighted by modality and task.

    Args:
        loss_weights: Weight of each modality by name; 1 where none is given.
        task_weights: Weight of the rows of each task by name; 1 where none is given. A one-word
            answer is a bit beside the hundreds of nats of a picture: without a weight its gradient
            drowns in theirs. Reported terms are unweighted.
    """

    def __init__(
        self,
        *,
        loss_weights: Mapping[str, float] | None = None,
        task_weights: Mapping[str, float] | None = None,
    ) -> None:
        self.loss_weights = dict(loss_weights or {})
        self.task_weights = dict(task_weights or {})
        for option in ("loss_weights", "task_weights"):
            for name, weight in getattr(self, option).items():
                if weight < 0:
                    raise ConfigError(f"`{option}.{name}` must not be negative; got {weight}.")
        for name in self.task_weights:
            if name not in TASKS:
                raise unknown_name("task in `task_weights`", name, TASKS)

    def prepare(
        self,
        batches: Sequence[Batch],
        *,
        seed: int,
        step: int,
        gather: Callable[[list[Any]], list[Any]],
        num_processes: int,
    ) -> StepPlan:
        """Denominators of the global batch, and its draws stratified by task and window."""
        records = gather([_describe(batch) for batch in batches])
        denominators: dict[int, int] = {}
        for record in records:
            for modality, count in record["free"].items():
                denominators[modality] = denominators.get(modality, 0) + count
        windows = sorted({window for record in records for window in record["windows"]})
        groups: dict[str, list[int]] = {}
        for record in records:
            for row, task in zip(record["rows"], record["tasks"], strict=True):
                groups.setdefault(task, []).append(row)
        num_rows = sum(len(rows) for rows in groups.values())
        drawn = {window: _stratified(groups, seed, step, window) for window in windows}
        contexts = []
        for batch in batches:
            uniforms = {
                window: torch.tensor([draws[row] for row in batch.rows], dtype=torch.float64)
                for window, draws in drawn.items()
            }
            contexts.append(
                {
                    "uniforms": uniforms,
                    "denominators": denominators,
                    "tasks": batch.tasks,
                    "draws": batch.draws,
                    "packing": batch.packing,
                    "row_share": len(batch.rows) / num_rows,
                }
            )
        return StepPlan(contexts, [float(num_processes)] * len(batches))

    def parts(
        self, model: Any, contexts: Sequence[dict[str, Any]]
    ) -> dict[str, list[dict[str, Any]]]:
        """Contexts in which only the targets of one modality count, by its name."""
        found: dict[str, list[dict[str, Any]]] = {}
        for index, name in enumerate(model.vocabulary.modalities):
            if any(context["denominators"].get(index) for context in contexts):
                found[name] = [
                    {**context, "row_share": 0.0, "denominators": _only(context, index)}
                    for context in contexts
                ]
        return found

    def grid(
        self, contexts: Sequence[dict[str, Any]], num_levels: int
    ) -> list[list[dict[str, Any]]]:
        """The contexts once for each of `num_levels` equal bands of noise, without holes.

        Nor with condition noise. Every row gets one mask count in each band; where in the band
        is what `prepare` drew, stratified over the rows of a task, so the mean over bands is
        unbiased.
        """
        bands = [(level / num_levels, (level + 1) / num_levels) for level in range(num_levels)]
        return [
            [
                {
                    **context,
                    "draws": (),
                    "uniforms": {
                        window: banded_uniforms(uniforms, *band)
                        for window, uniforms in context["uniforms"].items()
                    },
                }
                for context in contexts
            ]
            for band in bands
        ]

    def weighted_loss(
        self,
        nelbo: Float[Tensor, "batch length"],
        canvas: Canvas,
        vocabulary: UnifiedVocabulary,
        denominators: Mapping[int, int] | None,
        tasks: Sequence[str] = (),
    ) -> Tensor:
        """Sum over modalities of weight x sum of weighted NELBO / denominator.

        Args:
            nelbo: Weighted negative log-likelihood of each position, 0 where it has none.
            canvas: Clean canvas.
            vocabulary: Names the modalities.
            denominators: Free positions of each modality in the global batch; None for those of
                this canvas.
            tasks: Task of each row; none weighs all rows alike.
        """
        if self.task_weights and tasks:
            factors = [self.task_weights.get(task, 1.0) for task in tasks]
            nelbo = nelbo * nelbo.new_tensor(factors)[:, None]
        for name in self.loss_weights:
            if name not in vocabulary.modalities:
                raise unknown_name("modality in `loss_weights`", name, vocabulary.modalities)
        if denominators is None:
            denominators = free_counts(canvas)
        total = 0.0 * nelbo.sum()  # Part of the graph, whatever is counted.
        for index, name in enumerate(vocabulary.modalities):
            if denominators.get(index):
                part = (nelbo * (canvas.modality_ids == index)).sum()
                total = total + self.loss_weights.get(name, 1.0) * part / denominators[index]
        return total


def free_counts(canvas: Canvas) -> dict[int, int]:
    """Free positions of each modality."""
    modalities = canvas.modality_ids[canvas.is_free]
    counts = torch.bincount(modalities) if modalities.numel() else modalities
    return {index: int(count) for index, count in enumerate(counts.tolist()) if count}


def num_free_windows(canvas: Canvas) -> Tensor:
    """Windows with free positions in each row, (batch,)."""
    count = torch.zeros(canvas.batch_size, dtype=torch.long, device=canvas.device)
    for window in canvas.free_windows():
        count += canvas.is_free[:, canvas.window_slice(window)].any(dim=1)
    return count


@torch.no_grad()
def nelbo_terms(
    nelbo: Float[Tensor, "batch length"],
    canvas: Canvas,
    vocabulary: UnifiedVocabulary,
    *,
    is_bound: Bool[Tensor, " batch"],
    tasks: Sequence[str] = (),
) -> dict[str, Term]:
    """Nats per token: `nelbo/<modality>` over rows that bound, then by task, then content.

    Rows without a bound are reported as `loss/<modality>/<task>`. `content/<modality>` leaves out
    the targets that are `<fill>`, in the modality that has it.
    """
    terms: dict[str, Term] = {}
    values = nelbo.detach()
    is_fill = torch.zeros_like(canvas.is_free)
    if "fill" in vocabulary.special_ids:
        is_fill = canvas.input_ids == vocabulary.special_id("fill")
    labels = torch.tensor(
        [sorted(set(tasks)).index(task) for task in tasks] or [0] * canvas.batch_size,
        device=canvas.device,
    )
    for index, name in enumerate(vocabulary.modalities):
        free = canvas.is_free & (canvas.modality_ids == index)
        bound = free & is_bound[:, None]
        if bool(bound.any()):
            terms[f"nelbo/{name}"] = _mean(values, bound)
            if bool((is_fill & bound).any()):
                terms[f"content/{name}"] = _mean(values, bound & ~is_fill)
        for number, task in enumerate(sorted(set(tasks))):
            for kind, rows in (("nelbo", is_bound), ("loss", ~is_bound)):
                part = free & (rows & (labels == number))[:, None]
                if bool(part.any()):
                    terms[f"{kind}/{name}/{task}"] = _mean(values, part)
    return terms


@torch.no_grad()
def noise_terms(
    nll: Float[Tensor, "batch length"],
    levels: Float[Tensor, "batch length"],
    is_target: Bool[Tensor, "batch length"],
    canvas: Canvas,
    vocabulary: UnifiedVocabulary,
    num_bins: int,
) -> dict[str, Term]:
    """Mean cross-entropy of the targets by noise level: `noise/<modality>/<low>-<high>`."""
    terms: dict[str, Term] = {}
    bins = (levels * num_bins).ceil().long().clamp(1, num_bins) - 1
    for index, name in enumerate(vocabulary.modalities):
        chosen = is_target & (canvas.modality_ids == index)
        for number in range(num_bins):
            part = chosen & (bins == number)
            if bool(part.any()):
                low, high = number / num_bins, (number + 1) / num_bins
                terms[f"noise/{name}/{low:g}-{high:g}"] = _mean(nll.detach(), part)
    return terms


@torch.no_grad()
def density_terms(
    weight: Float[Tensor, "batch length"],
    is_target: Bool[Tensor, "batch length"],
    canvas: Canvas,
) -> dict[str, Term]:
    """How many of the processed tokens teach: `density/targets`, `/weight`, `/squared_weight`.

    Targets, their weights and their squared weights over tokens, each a mean that adds up over
    micro-batches and processes. weight^2 / squared_weight is the share of equally weighted targets
    that would average as much, lower where few positions carry most of the loss.
    """
    tokens = (~canvas.is_padding).sum()
    return {
        "density/targets": Term(is_target.sum(), tokens),
        "density/weight": Term(weight.sum(), tokens),
        "density/squared_weight": Term(weight.pow(2).sum(), tokens),
    }


def _mean(values: Tensor, chosen: Tensor) -> Term:
    return Term((values * chosen).sum(), chosen.sum())


def _only(context: Mapping[str, Any], index: int) -> dict[int, int]:
    """The denominators of a context without those of other modalities."""
    return {index: context["denominators"][index]}


def _describe(batch: Batch) -> dict[str, Any]:
    """What other processes need to know of a micro-batch."""
    canvas: Canvas = batch.inputs
    return {
        "rows": batch.rows,
        "tasks": batch.tasks,
        "windows": canvas.free_windows(),
        "free": free_counts(canvas),
    }


def _stratified(
    groups: Mapping[str, Sequence[int]], seed: int, step: int, window: int
) -> dict[int, float]:
    """Row of the global batch -> uniform number, stratified within each task."""
    draws: dict[int, float] = {}
    for task, rows in groups.items():
        generator = step_generator(seed, step, window, zlib.crc32(task.encode()))
        values = stratified_uniforms(len(rows), generator=generator)
        draws.update(zip(sorted(rows), values.tolist(), strict=True))
    return draws
