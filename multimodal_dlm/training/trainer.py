"""The loop: batches in, weights out. It knows no dataset and no model by name.

Works with one process, DDP and FSDP2 through accelerate. The loader is never prepared: batches are
pure functions of the step, and each process computes its own.
"""

import logging
import math
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from multimodal_dlm.errors import CheckpointError, DivergenceError
from multimodal_dlm.models.memory import keep_freed_memory
from multimodal_dlm.training.batches import iterate_steps
from multimodal_dlm.training.checkpoint import (
    Checkpoint,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from multimodal_dlm.training.components import Job
from multimodal_dlm.training.config import TrainConfig, config_changes
from multimodal_dlm.training.ema import ExponentialMovingAverage
from multimodal_dlm.training.lr_schedule import learning_rate
from multimodal_dlm.training.objectives.base import Batch, Term
from multimodal_dlm.training.optimizer import build_optimizer
from multimodal_dlm.training.optimizer_state import (
    model_tensors,
    optimizer_tensors,
    restore_model,
    restore_optimizer,
)
from multimodal_dlm.training.randomness import row_generator
from multimodal_dlm.training.tracking import Clock, MetricsFile, TermMeter, human_line, join_sums

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
METRICS = "metrics.jsonl"


class ModelView:
    """What an objective sees: calls go through the wrapper, everything else to the model itself.

    Args:
        wrapper: Model as accelerate prepared it.
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
class TrainState:
    """What a callback gets.

    Args:
        step: Optimizer steps taken.
        num_train_steps: Length of the run.
        model: The trained component.
        ema: Averaged weights, or None.
        output_dir: Folder of the run.
        components: Tokenizers, processor and scheduler, by name.
        log: Writes scalars to the trackers and the metrics file.
    """

    step: int
    num_train_steps: int
    model: nn.Module
    ema: ExponentialMovingAverage | None
    output_dir: Path
    components: Mapping[str, Any]
    log: Callable[[Mapping[str, float]], None]

    def averaged(self) -> AbstractContextManager[nn.Module]:
        """The model holding its averaged weights, if there are any, for the time of a `with`."""
        return self.ema.applied(self.model) if self.ema else nullcontext(self.model)


Callback = Callable[[TrainState], None]


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
        optimizer = build_optimizer(
            self.model,
            lr=config.optimizer.lr,
            betas=config.optimizer.betas,
            eps=config.optimizer.eps,
            weight_decay=config.optimizer.weight_decay,
        )
        self.wrapper, self.prepared_optimizer = accelerator.prepare(self.model, optimizer)
        self.optimizer = self.prepared_optimizer.optimizer
        self.objective = job.objective.to(accelerator.device)
        self.view = ModelView(self.wrapper, self.model)
        self.ema = (
            ExponentialMovingAverage(self.model, config.ema_decay) if config.ema_decay else None
        )
        self.meter = TermMeter()
        self.is_stopping = False
        self.step = 0

    def fit(self) -> dict[str, Any]:
        """Train to the end, or until a signal asks to stop; resume what is there.

        Returns:
            Step reached, whether it is the last, and the last logged values.
        """
        if self.accelerator.device.type == "cpu":
            keep_freed_memory()
        self.step = self._resume()
        first, last = self.step, self.config.num_train_steps
        is_main = self.accelerator.is_main_process
        metrics = MetricsFile(self.output_dir / METRICS, first_step=first) if is_main else None
        clock = Clock(first, last)
        values: dict[str, float] = {}
        workers = self.config.data.num_workers
        with self._stop_on_signal():
            for number, batches in iterate_steps(self.job.source, first, last, num_workers=workers):
                grad_norm = self._train_step(number, batches)
                self.step = number + 1
                clock.add(sum(batch.num_tokens for batch in batches))
                is_last = self.step == last
                if is_last or self.step % self.config.log_every_steps == 0:
                    values = self._log(metrics, clock, grad_norm)
                self._sample(metrics, is_last)
                stops = self._must_stop()
                if is_last or stops or self.step % self.config.checkpoint.every_steps == 0:
                    self.save()
                if stops:
                    logger.info("Stopped at step %d; run the same command to go on.", self.step)
                    break
        return {"step": self.step, "is_finished": self.step == last, **values}

    # One step.

    def _train_step(self, number: int, batches: list[Batch]) -> float:
        """Forward and backward of all micro-batches, then one optimizer step."""
        config, seed = self.config, self.config.seed
        batches = [batch.to(self.accelerator.device) for batch in batches]
        plan = self.objective.prepare(
            batches,
            seed=seed,
            step=number,
            gather=gather_object,
            num_processes=self.accelerator.num_processes,
        )
        rate = learning_rate(
            number,
            peak=config.optimizer.lr,
            num_train_steps=config.num_train_steps,
            num_warmup_steps=config.lr_schedule.num_warmup_steps,
            final_share=config.lr_schedule.final_share,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        total = torch.zeros((), device=self.accelerator.device)
        for index, (batch, context) in enumerate(zip(batches, plan.contexts, strict=True)):
            is_final = index == len(batches) - 1
            with nullcontext() if is_final else self.accelerator.no_sync(self.wrapper):
                loss = self._backward(number, batch, context, plan.loss_scale)
            total += loss
        norm = self.accelerator.clip_grad_norm_(
            self.wrapper.parameters(), config.optimizer.max_grad_norm
        )
        grad_norm = float(norm) if norm is not None else 0.0
        self._check_finite("gradient", grad_norm, number, batches)
        self.prepared_optimizer.step()
        self.prepared_optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update(self.model)
        self.meter.add({"loss": Term(total, torch.ones(()))})
        return grad_norm

    def _backward(self, number: int, batch: Batch, context: dict[str, Any], scale: float) -> Tensor:
        """Scaled loss of one micro-batch, after its backward."""
        seed, device = self.config.seed, self.accelerator.device
        generators = [row_generator(seed, number, row) for row in batch.rows]
        is_bf16 = self.config.mixed_precision == "bf16"
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=is_bf16):
            output = self.objective(self.view, batch.inputs, generator=generators, **context)
        self._check_finite("loss", float(output.loss.detach()), number, [batch])
        self.accelerator.backward(output.loss * scale)
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

    # Reports.

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
        if metrics is None or not is_turn or not self.callbacks:
            return

        def log(values: Mapping[str, float]) -> None:
            metrics.write({"step": self.step, **values})
            self.accelerator.log(dict(values), step=self.step)

        state = TrainState(
            self.step,
            self.config.num_train_steps,
            self.model,
            self.ema,
            self.output_dir,
            self.job.components,
            log,
        )
        self.model.eval()
        for callback in self.callbacks:
            callback(state)
        self.model.train()

    # Checkpoints.

    def save(self) -> None:
        """Write a checkpoint; every process takes part, the main one writes."""
        weights = model_tensors(self.wrapper)
        moments, groups = optimizer_tensors(self.wrapper, self.optimizer)
        rng = gather_object([_rng_state()])
        meters = gather_object([self.meter.sums()])
        tensors = {"model": weights, "optimizer": moments}
        tensors["rng"] = {
            f"{rank}.{k}": t for rank, state in enumerate(rng) for k, t in state.items()
        }
        if self.ema is not None:
            tensors["ema"] = {name: _whole(tensor) for name, tensor in self.ema.weights.items()}
        if self.accelerator.is_main_process:
            state = {
                "loader": self.job.source.state(self.step),
                "optimizer_groups": groups,
                "ema_updates": self.ema.num_updates if self.ema else 0,
                "meters": meters,
                "num_processes": self.accelerator.num_processes,
                "config": self.config.to_dict(),
                "manifest": self.job.manifest.fingerprint,
            }
            path = save_checkpoint(
                self.output_dir / CHECKPOINTS,
                Checkpoint(self.step, tensors, state),
                keep_last=self.config.checkpoint.keep_last,
            )
            logger.info("Saved %s.", path)
        self.accelerator.wait_for_everyone()

    def _resume(self) -> int:
        """Load the latest checkpoint of the output folder; 0 without one.

        A new run seeds the default generators: what ran before it in the process, such as encoding
        pictures for an empty cache, must not show in its random states.
        """
        self.accelerator.wait_for_everyone()
        path = latest_checkpoint(self.output_dir / CHECKPOINTS)
        if path is None:
            torch.manual_seed(self.config.seed + self.accelerator.process_index)
            return 0
        checkpoint = load_checkpoint(path)
        state = checkpoint.state
        self._check_continues(path, state)
        restore_model(self.wrapper, checkpoint.tensors["model"])
        restore_optimizer(
            self.wrapper, self.optimizer, checkpoint.tensors["optimizer"], state["optimizer_groups"]
        )
        if self.ema is not None:
            self.ema.load(checkpoint.tensors["ema"], state["ema_updates"])
        rank = f"{self.accelerator.process_index}."
        _set_rng_state(
            {
                name.removeprefix(rank): tensor
                for name, tensor in checkpoint.tensors["rng"].items()
                if name.startswith(rank)
            }
        )
        processes = self.accelerator.num_processes
        for sums in state.get("meters", [])[self.accelerator.process_index :: processes]:
            self.meter.add_sums(sums)
        logger.info("Resumed from %s.", path)
        return self.job.source.restore(dict(state["loader"]))

    def _check_continues(self, path: Path, state: Mapping[str, Any]) -> None:
        """Refuse a checkpoint of another config or of other data."""
        changes = config_changes(state["config"], self.config.to_dict())
        listed = "; ".join(f"`{name}` {old} -> {new}" for name, (old, new) in changes.items())
        if changes and not self.config.allow_changes:
            raise CheckpointError(
                f"`{path}` was written by a run with another config ({listed}). Undo the change,"
                " give another `output_dir`, or set `allow_changes`."
            )
        if changes:
            logger.warning("Going on with another config: %s.", listed)
        if state["manifest"] != self.job.manifest.fingerprint:
            raise CheckpointError(
                f"`{path}` was trained on other data than `{self.config.data.manifest}` holds now."
                " Give another `output_dir`."
            )

    # Stopping.

    @contextmanager
    def _stop_on_signal(self) -> Iterator[None]:
        """SIGTERM and SIGINT ask for a checkpoint after the step that runs."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(number: int, frame: FrameType | None) -> None:
            del frame
            logger.warning("Signal %d: stopping after this step.", number)
            self.is_stopping = True

        old = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    def _must_stop(self) -> bool:
        """True on every process once a signal reached any of them."""
        if self.accelerator.num_processes == 1:
            return self.is_stopping
        return any(gather_object([self.is_stopping]))


def _rng_state() -> dict[str, Tensor]:
    """Default generators of this process."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _set_rng_state(states: Mapping[str, Tensor]) -> None:
    if "cpu" in states:
        torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _whole(tensor: Tensor) -> Tensor:
    """The full tensor of a shard."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
