"""The loop: batches in, weights out. It knows no dataset and no model by name.

Works with one process, copies (DDP) and shards. The loader is never prepared by accelerate: batches
are pure functions of the step, and each process computes its own. What a step does is in `steps`,
what a checkpoint holds in `saving`, how processes hold the model in `sharding`.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from torch.optim import Optimizer

from multimodal_dlm.models.memory import keep_freed_memory
from multimodal_dlm.training.batches import iterate_steps
from multimodal_dlm.training.callbacks import Callback, TrainState
from multimodal_dlm.training.components import Job
from multimodal_dlm.training.config import TrainConfig
from multimodal_dlm.training.ema import ExponentialMovingAverage
from multimodal_dlm.training.launching import check_accelerator, resolve_sharding
from multimodal_dlm.training.optimizer import build_optimizer
from multimodal_dlm.training.saving import RunKeeper
from multimodal_dlm.training.sharding import spread_model
from multimodal_dlm.training.steps import TrainStep
from multimodal_dlm.training.stopping import StopRequest
from multimodal_dlm.training.tracking import Clock, MetricsFile, TermMeter, human_line, join_sums

logger = logging.getLogger(__name__)

METRICS = "metrics.jsonl"


class Trainer:
    """Trains a job.

    Args:
        job: Model, objective, batches and export.
        config: The run.
        accelerator: Made with `mixed_precision="no"`: the loop has its own autocast.
        callbacks: Called on the main process every `sample_every_steps` and after the last step.
    """

    def __init__(
        self,
        job: Job,
        config: TrainConfig,
        accelerator: Accelerator,
        *,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self.job, self.config, self.accelerator = job, config, accelerator
        self.callbacks = list(callbacks)
        self.output_dir = Path(config.output_dir)
        self.model: Any = job.model.train()
        if config.gradient_checkpointing:
            self.model.enable_gradient_checkpointing()
        if config.compile_blocks:
            self.model.compile_repeated_blocks()
        check_accelerator(accelerator)
        self.parallel = spread_model(
            self.model,
            self._build_optimizer,
            accelerator,
            sharding=resolve_sharding(config.sharding),
            mixed_precision=config.mixed_precision,
        )
        self.wrapper, self.optimizer = self.parallel.wrapper, self.parallel.optimizer
        self.objective = job.objective.to(accelerator.device)
        self.ema = (
            ExponentialMovingAverage(self.model, config.ema_decay) if config.ema_decay else None
        )
        self.meter = TermMeter()
        self.train_step = TrainStep(
            self.parallel,
            self.objective,
            self.ema,
            self.meter,
            config,
            accelerator,
        )
        self.keeper = RunKeeper(
            job, self.wrapper, self.optimizer, self.ema, self.meter, config, accelerator
        )
        self.stop = StopRequest()
        self.step = 0

    def _build_optimizer(self, model: nn.Module) -> Optimizer:
        options = self.config.optimizer
        return build_optimizer(
            model,
            lr=options.lr,
            betas=options.betas,
            eps=options.eps,
            weight_decay=options.weight_decay,
        )

    def fit(self) -> dict[str, Any]:
        """Train to the end, or until a signal asks to stop; resume what is there.

        Returns:
            Step reached, whether it is the last, and the last logged values.
        """
        if self.accelerator.device.type == "cpu":
            keep_freed_memory()
        self.step = self.keeper.resume()
        first, last = self.step, self.config.num_train_steps
        is_main = self.accelerator.is_main_process
        metrics = MetricsFile(self.output_dir / METRICS, first_step=first) if is_main else None
        clock = Clock(first, last)
        values: dict[str, float] = {}
        workers = self.config.data.num_workers
        with self.stop.listening():
            for number, batches in iterate_steps(self.job.source, first, last, num_workers=workers):
                grad_norm = self.train_step.take(number, batches)
                self.step = number + 1
                clock.add(sum(batch.num_tokens for batch in batches))
                is_last = self.step == last
                if is_last or self.step % self.config.log_every_steps == 0:
                    values = self._log(metrics, clock, grad_norm)
                self._sample(metrics, is_last)
                stops = self.stop.is_shared(self.accelerator)
                if is_last or stops or self.step % self.config.checkpoint.every_steps == 0:
                    self.keeper.save(self.step)
                if stops:
                    logger.info("Stopped at step %d; run the same command to go on.", self.step)
                    break
        return {"step": self.step, "is_finished": self.step == last, **values}

    def _log(self, metrics: MetricsFile | None, clock: Clock, grad_norm: float) -> dict[str, float]:
        rates = clock.read(self.step)
        rates["tokens_per_s"] *= self.accelerator.num_processes
        values = join_sums(gather_object([self.meter.sums()]))
        self.meter.clear()
        lr = self.optimizer.param_groups[0]["lr"]
        values = {"loss": values.pop("loss"), **values, "grad_norm": grad_norm, "lr": lr, **rates}
        self.accelerator.log(values, step=self.step)
        if metrics is not None:
            metrics.write({"step": self.step, **values})
            logger.info(human_line(self.step, self.config.num_train_steps, values))
        return values

    def _sample(self, metrics: MetricsFile | None, is_last: bool) -> None:
        """Call the callbacks when it is their turn, in evaluation mode."""
        every = self.config.sample_every_steps
        is_turn = every and (is_last or self.step % every == 0)
        if not is_turn or not self.callbacks:
            return
        model, ema = self.parallel.gathered(self.ema)
        if metrics is None:
            return

        def log(values: Mapping[str, float]) -> None:
            metrics.write({"step": self.step, **values})
            self.accelerator.log(dict(values), step=self.step)

        state = TrainState(
            self.step,
            self.config.num_train_steps,
            model,
            ema,
            self.output_dir,
            self.job.components,
            log,
        )
        model.eval()
        for callback in self.callbacks:
            callback(state)
        self.model.train()
