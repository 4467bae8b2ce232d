"""One optimizer step: forward and backward of all micro-batches, then clip, step and average."""

import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from multimodal_dlm.errors import DivergenceError
from multimodal_dlm.training.config import TrainConfig
from multimodal_dlm.training.ema import ExponentialMovingAverage
from multimodal_dlm.training.lr_schedule import learning_rate
from multimodal_dlm.training.objectives.base import Batch, Objective, Term
from multimodal_dlm.training.randomness import row_generator
from multimodal_dlm.training.sharding import ReplicatedModel, check_rows
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


@dataclass
class TrainStep:
    """Takes one optimizer step at a time.

    Args:
        parallel: The trained component with its optimizer, as this process holds it.
        objective: What is minimised.
        ema: Averaged weights, or None.
        meter: Gets the reported terms.
        config: The run.
        accelerator: Processes and devices.
    """

    parallel: ReplicatedModel
    objective: Objective
    ema: ExponentialMovingAverage | None
    meter: TermMeter
    config: TrainConfig
    accelerator: Accelerator

    def __post_init__(self) -> None:
        self.model, self.optimizer = self.parallel.model, self.parallel.optimizer
        self.is_checked = False
        self.view = ModelView(self.parallel.wrapper, self.model)

    def take(self, number: int, batches: list[Batch]) -> float:
        """Train on global batch `number`.

        Args:
            number: Number of the step, from 0.
            batches: This process's micro-batches.

        Returns:
            Global norm of the gradient before clipping.
        """
        batches = [batch.to(self.accelerator.device) for batch in batches]
        self._check_rows(batches)
        self._set_learning_rate(number)
        total = self._accumulate(number, batches)
        grad_norm = self.parallel.clip_gradients(self.config.optimizer.max_grad_norm)
        self._check_finite("gradient", grad_norm, number, batches)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update(self.model)
        self.meter.add({"loss": Term(total, torch.ones(()))})
        return grad_norm

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

    def _accumulate(self, number: int, batches: list[Batch]) -> Tensor:
        """Gradients of all micro-batches added up; returns this process's share of the loss."""
        plan = self.objective.prepare(
            batches,
            seed=self.config.seed,
            step=number,
            gather=gather_object,
            num_processes=self.accelerator.num_processes,
        )
        total = torch.zeros((), device=self.accelerator.device)
        for index, (batch, context) in enumerate(zip(batches, plan.contexts, strict=True)):
            is_final = index == len(batches) - 1
            with nullcontext() if is_final else self.parallel.accumulating():
                total += self._backward(number, batch, context, plan.loss_scale)
        return total

    def _backward(self, number: int, batch: Batch, context: dict[str, Any], scale: float) -> Tensor:
        """Scaled loss of one micro-batch, after its backward."""
        seed, device = self.config.seed, self.accelerator.device
        generators = [row_generator(seed, number, row) for row in batch.rows]
        is_bf16 = self.config.mixed_precision == "bf16"
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=is_bf16):
            output = self.objective(self.view, batch.inputs, generator=generators, **context)
        self._check_finite("loss", float(output.loss.detach()), number, [batch])
        (output.loss * scale).backward()
        self.meter.add(output.terms)
        return output.loss.detach().float() * scale

    def _check_finite(self, what: str, value: float, number: int, batches: list[Batch]) -> None:
        if not math.isfinite(value):
            keys = [key for batch in batches for key in batch.keys]
            raise DivergenceError(
                f"The {what} must be finite; got {value} in step {number} with the samples"
                f" {', '.join(keys[:8])}{' ...' if len(keys) > 8 else ''}. Lower `optimizer.lr` or"
                " look at these samples; the last checkpoint is whole."
            )
