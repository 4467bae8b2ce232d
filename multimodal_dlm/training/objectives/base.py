"""What an objective is: it owns corruption, the number of forwards and the weights.

An objective gets the model (a callable with `vocabulary` and `compute_logits`) and a batch of
inputs, and returns the loss to differentiate and the terms to report.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from multimodal_dlm.canvas import Canvas
from multimodal_dlm.datasets.selection import YIELDED
from multimodal_dlm.diffusion.losses import token_nll
from multimodal_dlm.training.packing import Packing

PIECE = 64

Generators = torch.Generator | Sequence[torch.Generator]


@dataclass(frozen=True)
class Term:
    """A reported mean as its two sums, so that micro-batches and processes can be added.

    Args:
        total: Sum of the values.
        count: What it is divided by.
    """

    total: Tensor
    count: Tensor

    @property
    def value(self) -> float:
        """Total / count; nan when nothing was counted."""
        return float(self.total / self.count) if float(self.count) else float("nan")


@dataclass(frozen=True)
class ObjectiveOutput:
    """What an objective returns.

    Args:
        loss: Scalar to differentiate.
        terms: Values to report, by name.
        num_targets: Positions that carried loss.
        is_bound: True for rows whose NELBO is a bound on a likelihood; one flag for all rows when
            it does not depend on the row.
    """

    loss: Tensor
    terms: Mapping[str, Term]
    num_targets: int
    is_bound: Bool[Tensor, " batch"] | bool = True


@dataclass(frozen=True)
class Batch:
    """One micro-batch.

    Args:
        inputs: What the objective takes: a clean canvas, or pixels.
        keys: Source and key of each row, for messages.
        tasks: Task of each row; empty when rows have none.
        rows: Index of each row in the global batch.
        draws: One uniform number a row for choices of the objective.
        packing: How rows share the rows of the forward pass; None when they do not.
        outcomes: `yielded` for each row that counts, else why it does not; empty when all do.
        numbers: Number of each row in the run, as the reader counts them.
    """

    inputs: Any
    keys: tuple[str, ...]
    tasks: tuple[str, ...] = ()
    rows: tuple[int, ...] = ()
    draws: tuple[float, ...] = ()
    packing: Packing | None = None
    outcomes: tuple[str, ...] = ()
    numbers: tuple[int, ...] = ()

    def to(self, device: torch.device) -> "Batch":
        """A copy whose tensors are on another device."""
        packing = self.packing.to(device) if self.packing else None
        return replace(self, inputs=self.inputs.to(device), packing=packing)

    @property
    def counted(self) -> list[int]:
        """Places of the rows that count."""
        outcomes = self.outcomes or [YIELDED] * len(self.keys)
        return [place for place, outcome in enumerate(outcomes) if outcome == YIELDED]

    @property
    def num_tokens(self) -> int:
        """Tokens that are not padding (rows, when the inputs are not a canvas)."""
        if isinstance(self.inputs, Canvas):
            return int((~self.inputs.is_padding).sum())
        return len(self.inputs)

    @property
    def num_slots(self) -> int:
        """Tokens that the forward pass computes, padding included."""
        if self.packing is not None:
            return self.packing.num_slots
        return (
            self.inputs.input_ids.numel() if isinstance(self.inputs, Canvas) else len(self.inputs)
        )


@dataclass(frozen=True)
class StepPlan:
    """What the objective was told about a step before its first forward.

    Args:
        contexts: Extra keyword arguments of each micro-batch.
        loss_scales: Multiplied into each micro-batch's loss, so that the gradient averaged over
            processes is that of the global batch.
    """

    contexts: list[dict[str, Any]] = field(default_factory=list)
    loss_scales: list[float] = field(default_factory=list)


class Objective(ABC):
    """Base of objectives; the loss is a mean over a micro-batch's counted rows unless overridden.

    `component` is the `model.component` that an objective trains.
    """

    component: ClassVar[str] = "transformer"

    def prepare(
        self,
        batches: Sequence[Batch],
        *,
        seed: int,
        step: int,
        gather: Callable[[list[Any]], list[Any]],
        num_processes: int,
    ) -> StepPlan:
        """Look at the micro-batches of a step, on every process.

        Each gets `counted`, the places of the rows that the mean is over, and weighs as many rows;
        one without any weighs nothing, whatever its loss is.

        Args:
            batches: This process's micro-batches.
            seed: Of the run.
            step: Number of the global batch.
            gather: Joins small lists over all processes.
            num_processes: Processes that average their gradients.
        """
        del seed, step
        counted = [batch.counted for batch in batches]
        num_rows = max(1, sum(gather([len(rows) for rows in counted])))
        scales = [num_processes * len(rows) / num_rows for rows in counted]
        return StepPlan([{"counted": rows} for rows in counted], scales)

    def parts(
        self, model: Any, contexts: Sequence[dict[str, Any]]
    ) -> dict[str, list[dict[str, Any]]]:
        """Contexts in which the loss is one of the parts it is the sum of; none unless overridden.

        Args:
            model: Gives `vocabulary`.
            contexts: Of the micro-batches of a step, from `prepare`.

        Returns:
            Name of a part -> contexts.
        """
        del model, contexts
        return {}

    def grid(
        self, contexts: Sequence[dict[str, Any]], num_levels: int
    ) -> list[list[dict[str, Any]]]:
        """Contexts for evaluation at fixed noise levels; one level unless overridden.

        Args:
            contexts: Of all micro-batches, from `prepare`.
            num_levels: Levels, where the objective has them.
        """
        del num_levels
        return [list(contexts)]

    def to(self, device: torch.device) -> Self:
        """Move the networks an objective owns, such as a perceptual distance."""
        for part in vars(self).values():
            if isinstance(part, nn.Module):
                part.to(device)
        return self

    def tensors(self) -> dict[str, Tensor]:
        """What an objective has learned itself, for a checkpoint; nothing unless overridden."""
        return {}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `tensors` gave, or from a checkpoint in which there was nothing."""
        del tensors

    @abstractmethod
    def __call__(
        self, model: Any, inputs: Any, *, generator: Generators, **context: Any
    ) -> ObjectiveOutput:
        """Loss and terms of one micro-batch."""


def target_nll(
    model: Any,
    hidden_states: Float[Tensor, "batch length width"],
    canvas: Canvas,
    is_target: Bool[Tensor, "batch length"],
) -> Float[Tensor, "batch length"]:
    """-log p(clean token) at the targets, 0 elsewhere; logits exist at targets only.

    Without any target the result still depends on every parameter: a process whose micro-batch is
    all padding must have gradients (of zero) to exchange with the others.

    Args:
        model: Gives `vocabulary` and `compute_logits`.
        hidden_states: Of the corrupted canvas.
        canvas: The clean canvas.
        is_target: Positions that carry loss.
    """
    vocabulary = model.vocabulary
    kind = torch.float64 if hidden_states.dtype == torch.float64 else torch.float32
    dense = torch.zeros(is_target.shape, dtype=kind, device=hidden_states.device)
    for index, modality in enumerate(vocabulary.modalities):
        chosen = is_target & (canvas.modality_ids == index)
        if not bool(chosen.any()):
            continue

        def head(states: Tensor, name: str = modality) -> Tensor:
            return model.compute_logits(states, name)

        places = _in_pieces(chosen.flatten().nonzero().flatten())
        nll = token_nll(
            hidden_states.flatten(0, 1).index_select(0, places),
            head,
            vocabulary.to_columns(canvas.input_ids.flatten()[places], modality),
            num_columns=vocabulary.num_columns(modality),
        )
        dense = dense.masked_scatter(chosen, nll[: int(chosen.sum())])
    if not bool(is_target.any()):
        logits = model.compute_logits(hidden_states[:, :1], vocabulary.modalities[0])
        dense = dense + 0.0 * logits.sum()
    return dense


def _in_pieces(places: Int[Tensor, " count"]) -> Int[Tensor, " padded"]:
    """At least one place, the first one repeated at the end up to a multiple of `PIECE`.

    Products of ever other sizes would be compiled anew in every step: oneDNN keeps its last 1,024
    kernels with their memory, of which almost none would be met again.
    """
    return torch.cat([places, places[:1].expand(-len(places) % PIECE)])
