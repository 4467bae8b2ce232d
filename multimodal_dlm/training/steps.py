"""One optimizer step: forward and backward of all micro-batches, then clip, step and average.

Or none of it: a step that the stability monitor refuses leaves weights, buffers, optimizer,
averages and the log's sums as they were.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from multimodal_dlm.precision import autocast
from multimodal_dlm.training.config import TrainConfig
from multimodal_dlm.training.ema import ExponentialMovingAverage
from multimodal_dlm.training.lr_schedule import learning_rate
from multimodal_dlm.training.objectives.base import (
    Batch,
    Objective,
    ObjectiveOutput,
    StepPlan,
    Term,
)
from multimodal_dlm.training.randomness import row_generator
from multimodal_dlm.training.sharding import ReplicatedModel, check_rows
from multimodal_dlm.training.stability import StabilityMonitor
from multimodal_dlm.training.tracking import TermMeter


class ModelView:
    """What an objective sees: calls go through the wrapper, everything else to the model itself.

    Args:
        wrapper: Model as this process holds it.
        model: Model itself.
    """

    def __init__(self, wrapper: nn.Module, model: nn.Module) -> None:
        self._wrapper, self._model = wrapper, model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Forward, through the wrapper."""
        return self._wrapper(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


@dataclass(frozen=True)
class StepReport:
    """What a step did.

    Args:
        grad_norm: Global norm of the gradient before clipping; no number in a skipped step.
        is_skipped: Whether nothing was changed.
    """

    grad_norm: float
    is_skipped: bool


@dataclass
class TrainStep:
    """Takes one optimizer step at a time.

    Args:
        parallel: The trained component with its optimizer, as this process holds it.
        objective: What is minimised.
        ema: Averaged weights, or None.
        meter: Gets the reported terms.
        monitor: Decides which steps count.
        config: The run, its precision resolved.
        accelerator: Processes and devices.
    """

    parallel: ReplicatedModel
    objective: Objective
    ema: ExponentialMovingAverage | None
    meter: TermMeter
    monitor: StabilityMonitor
    config: TrainConfig
    accelerator: Accelerator

    def __post_init__(self) -> None:
        self.model, self.optimizer = self.parallel.model, self.parallel.optimizer
        self.is_checked = False
        self.view = ModelView(self.parallel.wrapper, self.model)

    def take(self, number: int, batches: list[Batch]) -> StepReport:
        """Train on global batch `number`.

        Args:
            number: Number of the step, from 0.
            batches: This process's micro-batches.

        Raises:
            DivergenceError: When too many steps had no finite loss and gradient.
        """
        batches = [batch.to(self.accelerator.device) for batch in batches]
        self._check_rows(batches)
        self._set_learning_rate(number)
        buffers = [buffer.clone() for buffer in self.model.buffers()]
        plan = self.objective.prepare(
            batches,
            seed=self.config.seed,
            step=number,
            gather=gather_object,
            num_processes=self.accelerator.num_processes,
        )
        terms = self._part_norms(number, batches, plan)
        losses = self._accumulate(number, batches, plan, terms)
        grad_norm = self.parallel.clip_gradients(self.config.optimizer.max_grad_norm)
        is_accepted = self._is_accepted(number, losses, grad_norm, batches)
        if is_accepted:
            self.optimizer.step()
            if self.ema is not None:
                self.ema.update(self.model)
            terms.add({"loss": Term(losses.sum(), torch.ones(()))})
            slots = torch.tensor(float(sum(batch.num_slots for batch in batches)))
            tokens = sum(batch.num_tokens for batch in batches)
            terms.add({"padding_share": Term(slots - tokens, slots)})
            self.meter.add(terms.terms())
        else:
            for buffer, value in zip(self.model.buffers(), buffers, strict=True):
                buffer.copy_(value)
        self.optimizer.zero_grad(set_to_none=True)
        return StepReport(grad_norm, not is_accepted)

    def _check_rows(self, batches: list[Batch]) -> None:
        """Before the first step: do the processes together see every row once?"""
        if not self.is_checked:
            rows = gather_object([[row for batch in batches for row in batch.rows]])
            check_rows(rows, self.config.data.batch_size)
        self.is_checked = True

    def _set_learning_rate(self, number: int) -> None:
        config = self.config
        rate = learning_rate(
            number,
            peak=config.optimizer.lr,
            num_train_steps=config.num_train_steps,
            num_warmup_steps=config.lr_schedule.num_warmup_steps,
            final_share=config.lr_schedule.final_share,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def _accumulate(
        self, number: int, batches: list[Batch], plan: StepPlan, terms: TermMeter
    ) -> Tensor:
        """Gradients of all micro-batches added up.

        Returns:
            Scaled loss of each micro-batch of this process.
        """
        losses = []
        parts = zip(batches, plan.contexts, plan.loss_scales, strict=True)
        for index, (batch, context, scale) in enumerate(parts):
            is_final = index == len(batches) - 1
            with nullcontext() if is_final else self.parallel.accumulating():
                output = self._forward(number, batch, context)
                (output.loss * scale).backward()
            losses.append(output.loss.detach().float() * scale)
            terms.add(output.terms)
        return torch.stack(losses)

    def _forward(self, number: int, batch: Batch, context: dict[str, Any]) -> ObjectiveOutput:
        """Loss and terms of one micro-batch."""
        generators = [row_generator(self.config.seed, number, row) for row in batch.rows]
        with autocast(self.accelerator.device, self.config.mixed_precision):
            return self.objective(self.view, batch.inputs, generator=generators, **context)

    def _part_norms(self, number: int, batches: list[Batch], plan: StepPlan) -> TermMeter:
        """Gradient norm of each part of the loss (each modality) on its own, in every n-th step.

        The whole gradient of the global batch, before clipping, by a forward and backward of each
        part: with any number of processes and micro-batches it is the norm a step on that part
        alone would have.
        """
        meter, every = TermMeter(), self.config.grad_norms_every_steps
        if not every or (number + 1) % every:
            return meter
        for name, contexts in self.objective.parts(self.view, plan.contexts).items():
            self._accumulate(number, batches, StepPlan(contexts, plan.loss_scales), TermMeter())
            meter.add({f"grad_norm/{name}": torch.tensor(self.parallel.clip_gradients(math.inf))})
            self.optimizer.zero_grad(set_to_none=True)
        return meter

    def _is_accepted(
        self, number: int, losses: Tensor, grad_norm: float, batches: Sequence[Batch]
    ) -> bool:
        """Ask the monitor, with the loss and the samples of all processes."""
        values = losses.tolist()
        broken = [
            key
            for batch, value in zip(batches, values, strict=True)
            if not math.isfinite(value)
            for key in batch.keys
        ]
        everything = [key for batch in batches for key in batch.keys]
        parts = gather_object([(sum(values), grad_norm, broken, everything)])
        loss = sum(part[0] for part in parts) / len(parts)
        grad_norm = max((part[1] for part in parts), key=lambda norm: (math.isnan(norm), norm))
        samples = [key for part in parts for key in part[2]]
        samples = samples or [key for part in parts for key in part[3]]
        return self.monitor.accepts(number, {"loss": loss, "grad_norm": grad_norm}, samples)
