"""Held-out evaluation during a run: the objective on rows, noise levels and masks that stay.

The rows are the first of the split's order under a seed of its own, so all runs on the same data
are measured on the same grid. Each row is seen once in every band of noise, with masks drawn from a
generator keyed by (seed, band, row): the values are a function of the weights alone, whatever the
number of processes (up to the order of sums), and a resumed run logs those of a straight one.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from multimodal_dlm.errors import ConfigError
from multimodal_dlm.precision import autocast
from multimodal_dlm.training.batches import BatchSource
from multimodal_dlm.training.config import CheckpointConfig, TrainConfig
from multimodal_dlm.training.ema import ExponentialMovingAverage
from multimodal_dlm.training.objectives.base import Batch, Objective, Term
from multimodal_dlm.training.randomness import EVALUATION_SEED, row_generator
from multimodal_dlm.training.tracking import TermMeter, join_sums

PREFIX = "eval/"


@dataclass
class EvaluationLoop:
    """Evaluates the averaged weights, if there are any, on every process together.

    Args:
        model: The trained component.
        view: What the objective calls.
        objective: What is minimised.
        source: Its global batch 0 is the held-out set.
        ema: Averaged weights, or None.
        config: The run, its precision resolved.
        accelerator: Processes and devices.
    """

    model: nn.Module
    view: Any
    objective: Objective
    source: BatchSource
    ema: ExponentialMovingAverage | None
    config: TrainConfig
    accelerator: Accelerator

    @cached_property
    def batches(self) -> list[Batch]:
        """This process's micro-batches, made once."""
        return [replace(batch, draws=()) for batch in self.source.batches(0)]

    def run(self) -> dict[str, float]:
        """The objective's loss (`eval/loss`) and its terms (`eval/...`), means over the grid."""
        is_training = self.model.training
        self.model.eval()
        try:
            if self.ema is None:
                meter = self._measure()
            else:
                with self.ema.applied(self.model):
                    meter = self._measure()
        finally:
            self.model.train(is_training)
        values = join_sums(gather_object([meter.sums()]))
        return {f"{PREFIX}{name}": value for name, value in values.items()}

    @torch.no_grad()
    def _measure(self) -> TermMeter:
        """Terms of all rows in all bands; the loss once a band."""
        meter, device = TermMeter(), self.accelerator.device
        batches = [batch.to(device) for batch in self.batches]
        plan = self.objective.prepare(
            batches,
            seed=EVALUATION_SEED,
            step=0,
            gather=gather_object,
            num_processes=self.accelerator.num_processes,
        )
        levels = self.objective.grid(plan.contexts, self.config.evaluation.num_levels)
        for level, contexts in enumerate(levels):
            total = torch.zeros((), dtype=torch.float64, device=device)
            parts = zip(batches, contexts, plan.loss_scales, strict=True)
            for batch, context, scale in parts:
                generators = [row_generator(EVALUATION_SEED, level, row) for row in batch.rows]
                with autocast(device, self.config.mixed_precision):
                    output = self.objective(
                        self.view, batch.inputs, generator=generators, **context
                    )
                total += output.loss.double() * scale
                meter.add(output.terms)
            meter.add({"loss": Term(total, torch.ones(()))})
        return meter


class BestStep:
    """The best value of one metric so far, and the step that had it.

    Args:
        config: Gives the metric and its direction.
    """

    def __init__(self, config: CheckpointConfig) -> None:
        self.metric, self.mode = config.best_metric, config.best_mode
        self.value: float | None = None
        self.step: int | None = None

    def is_improved_by(self, step: int, values: Mapping[str, float]) -> bool:
        """Take in the values of an evaluation; True when they are the best so far.

        Raises:
            ConfigError: When the metric is not among them.
        """
        if self.metric is None:
            return False
        if self.metric not in values:
            raise ConfigError(
                f"`checkpoint.best_metric` must be a value of the evaluation; got `{self.metric}`."
                f" There are {', '.join(f'`{name}`' for name in values)}."
            )
        value = values[self.metric]
        is_better = math.isfinite(value) and (
            self.value is None or (value < self.value if self.mode == "min" else value > self.value)
        )
        if is_better:
            self.value, self.step = value, step
        return is_better

    def state(self) -> dict[str, Any]:
        """JSON values for a checkpoint."""
        return {"metric": self.metric, "mode": self.mode, "value": self.value, "step": self.step}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave; another metric starts anew."""
        if (state["metric"], state["mode"]) == (self.metric, self.mode):
            self.value, self.step = state["value"], state["step"]
