"""The loop: batches in, weights out. It knows no dataset and no model by name.

Works with one process, copies (DDP) and shards. The loader is never prepared by accelerate: batches
are pure functions of the step, and each process computes its own. What a step does is in `steps`,
what a checkpoint holds in `saving`, how processes hold the model in `sharding`.
"""

import logging
import math
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
from multimodal_dlm.training.evaluation_loop import BestStep, EvaluationLoop
from multimodal_dlm.training.launching import (
    check_accelerator,
    resolve_sharding,
    settle_precision,
)
from multimodal_dlm.training.ledger import Ledger, ledger_lines
from multimodal_dlm.training.objectives.base import Batch
from multimodal_dlm.training.optimizer import build_optimizer
from multimodal_dlm.training.run_folder import write_run_folder
from multimodal_dlm.training.saving import RunKeeper
from multimodal_dlm.training.sharding import spread_model
from multimodal_dlm.training.stability import StabilityMonitor, check_weights
from multimodal_dlm.training.steps import StepReport, TrainStep
from multimodal_dlm.training.stopping import StopRequest
from multimodal_dlm.training.tracking import Clock, MetricsFile, TermMeter, human_line, join_sums

logger = logging.getLogger(__name__)

METRICS = "metrics.jsonl"


class Trainer:
    """Trains a job.

    Args:
        job: Model, objective, batches and export.
        config: The run; `trainer.config` is the same with its precision resolved.
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
        check_accelerator(accelerator)
        config = settle_precision(config, accelerator)
        self.job, self.config, self.accelerator = job, config, accelerator
        self.callbacks = list(callbacks)
        self.output_dir = Path(config.output_dir)
        self.model: Any = job.model.train()
        if config.gradient_checkpointing:
            self.model.enable_gradient_checkpointing()
        if config.compile_blocks:
            self.model.compile_repeated_blocks()
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
        self.ledger = Ledger(job.source.epoch_plan, gather_object)
        self.monitor, self.best = StabilityMonitor(config.stability), BestStep(config.checkpoint)
        self.train_step = TrainStep(
            self.parallel,
            self.objective,
            self.ema,
            self.meter,
            self.monitor,
            config,
            accelerator,
        )
        self.evaluation = None
        if job.held_out is not None:
            self.evaluation = EvaluationLoop(
                self.model,
                self.train_step.view,
                self.objective,
                job.held_out,
                self.ema,
                config,
                accelerator,
            )
        self.keeper = RunKeeper(
            job,
            self.wrapper,
            self.optimizer,
            self.ema,
            self.meter,
            config,
            accelerator,
            {"stability": self.monitor, "best": self.best, "ledger": self.ledger},
        )
        self.stop = StopRequest()
        self.step = 0
        self.metrics: MetricsFile | None = None

    def _build_optimizer(self, model: nn.Module) -> Optimizer:
        options = self.config.optimizer
        return build_optimizer(
            model,
            name=options.name,
            lr=options.lr,
            betas=options.betas,
            eps=options.eps,
            weight_decay=options.weight_decay,
            momentum=options.momentum,
        )

    def fit(self) -> dict[str, Any]:
        """Train to the end, or until a signal asks to stop; resume what is there.

        Returns:
            Step reached, whether it is the last, and the last logged values.

        Raises:
            CheckpointError: When the run in the output folder cannot go on as this one.
            ConfigError: When it is beyond the last step.
            DivergenceError: When too many steps had no finite loss and gradient.
        """
        if self.accelerator.device.type == "cpu":
            keep_freed_memory()
        self.step = self.keeper.resume()
        first, last = self.step, self.config.num_train_steps
        if self.accelerator.is_main_process:
            # Not before `resume`: a run that it refuses leaves the record of the one before alone.
            processes = self.accelerator.num_processes
            write_run_folder(self.config, self.job.manifest, num_processes=processes)
            self.metrics = MetricsFile(self.output_dir / METRICS, first_step=first)
        clock, is_due = Clock(first, last), False
        values: dict[str, float] = {}
        workers = self.config.data.num_workers
        with self.stop.listening():
            for number, batches in iterate_steps(self.job.source, first, last, num_workers=workers):
                report = self.train_step.take(number, batches)
                self._account(number, batches)
                self.step = number + 1
                clock.add(sum(batch.num_tokens for batch in batches))
                if self._is_turn(self.config.log_every_steps):
                    values = self._log(clock, report)
                is_best = self._evaluate()
                self._sample()
                # Checkpoint and stop wait for a step that counts: then the weights are sound.
                is_due |= self._is_turn(self.config.checkpoint.every_steps)
                stops = self.stop.is_shared(self.accelerator) and not report.is_skipped
                if self.step == last:
                    check_weights(self.model)
                if is_best or stops or self.step == last or (is_due and not report.is_skipped):
                    self._save()
                    is_due = False
                if stops:
                    logger.info("Stopped at step %d; run the same command to go on.", self.step)
                    break
        return {"step": self.step, "is_finished": self.step == last, **values}

    def _account(self, step: int, batches: Sequence[Batch]) -> None:
        """Enter rows into the ledger; after an epoch print what it held."""
        held = self.ledger.add(step, batches)
        if held is not None and self.accelerator.is_main_process:
            logger.info("%s", "\n".join(ledger_lines(held)))

    def _is_turn(self, every: int) -> bool:
        """Every so many steps and after the last one; never for 0."""
        return bool(every) and (self.step == self.config.num_train_steps or self.step % every == 0)

    def _log(self, clock: Clock, report: StepReport) -> dict[str, float]:
        rates = clock.read(self.step)
        rates["tokens_per_s"] *= self.accelerator.num_processes
        values = join_sums(gather_object([self.meter.sums()]))
        self.meter.clear()
        values |= self.monitor.counts()
        values |= {"grad_norm": report.grad_norm, "lr": self.optimizer.param_groups[0]["lr"]}
        values = {name: value for name, value in values.items() if math.isfinite(value)} | rates
        self._write(values)
        if self.metrics is not None:
            logger.info(human_line(self.step, self.config.num_train_steps, values))
        return values

    def _write(self, values: Mapping[str, float]) -> None:
        """To the trackers and, in the main process, to the metrics file."""
        self.accelerator.log(dict(values), step=self.step)
        if self.metrics is not None:
            self.metrics.write({"step": self.step, **values})

    def _evaluate(self) -> bool:
        """Evaluate when it is time; True when the step is the best so far."""
        if self.evaluation is None or not self._is_turn(self.config.evaluation.every_steps):
            return False
        values = self.evaluation.run()
        self._write(values)
        is_best = self.best.is_improved_by(self.step, values)
        logger.info(
            "Evaluation at step %d: loss %.4f%s.",
            *(self.step, values["eval/loss"], ", the best so far" if is_best else ""),
        )
        return is_best

    def _save(self) -> None:
        if self.metrics is not None:
            self.metrics.sync()
        self.ledger.share()
        self.keeper.save(self.step)

    def _sample(self) -> None:
        """Call the callbacks when it is their turn, in evaluation mode, in the main process."""
        is_turn = self._is_turn(self.config.sample_every_steps)
        if not is_turn or not self.callbacks:
            return
        model, ema = self.parallel.gathered(self.ema)
        if self.metrics is None:
            return
        state = TrainState(
            self.step,
            self.config.num_train_steps,
            model,
            ema,
            self.output_dir,
            self.job.components,
            self._write,
        )
        model.eval()
        for callback in self.callbacks:
            callback(state)
        self.model.train()
