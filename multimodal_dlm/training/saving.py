"""A run as a checkpoint and back: what is saved, and how a run goes on from it."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.optim import Optimizer

from multimodal_dlm.errors import CheckpointError, ConfigError
from multimodal_dlm.training.checkpoint import (
    Checkpoint,
    latest_checkpoint,
    load_checkpoint,
    load_state,
    save_checkpoint,
)
from multimodal_dlm.training.components import Job
from multimodal_dlm.training.config import (
    FIXED_FIELDS,
    TrainConfig,
    config_changes,
    with_defaults,
)
from multimodal_dlm.training.ema import ExponentialMovingAverage
from multimodal_dlm.training.optimizer_state import (
    model_tensors,
    optimizer_tensors,
    restore_model,
    restore_optimizer,
)
from multimodal_dlm.training.shards import whole_tensors
from multimodal_dlm.training.tracking import TermMeter

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"


def recorded_precision(output_dir: Path) -> str | None:
    """The `mixed_precision` that the newest intact checkpoint of a run was trained in.

    Args:
        output_dir: Folder of the run.

    Returns:
        `bf16` or `no`; None without a checkpoint.
    """
    path = latest_checkpoint(output_dir / CHECKPOINTS)
    return None if path is None else load_state(path)["config"]["mixed_precision"]


class Record(Protocol):
    """A small part of a run that every process holds alike, as JSON values."""

    def state(self) -> dict[str, Any]:
        """What to save."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what was saved."""
        ...


@dataclass
class RunKeeper:
    """Saves a run and takes it up again; every process takes part, the main one writes.

    Args:
        job: Gives the position in the data, and what the objective has learned.
        wrapper: Model, as this process holds it.
        optimizer: Its optimizer.
        ema: Averaged weights, or None.
        meter: Terms that are not logged yet.
        config: The run.
        accelerator: Processes and devices.
        records: What else is saved, by name.
    """

    job: Job
    wrapper: nn.Module
    optimizer: Optimizer
    ema: ExponentialMovingAverage | None
    meter: TermMeter
    config: TrainConfig
    accelerator: Accelerator
    records: Mapping[str, Record] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Folder of all checkpoints of the run."""
        return Path(self.config.output_dir) / CHECKPOINTS

    def save(self, step: int) -> None:
        """Write a checkpoint."""
        weights = model_tensors(self.wrapper)
        moments, groups = optimizer_tensors(self.wrapper, self.optimizer)
        rng = gather_object([_rng_state()])
        meters = gather_object([self.meter.sums()])
        tensors = {"model": weights, "optimizer": moments, "rng": _by_rank(rng)}
        learned = _by_rank(gather_object([self.job.objective.tensors()]))
        if learned:
            tensors["objective"] = learned
        if self.ema is not None:
            keep = self.accelerator.is_main_process
            tensors["ema"] = whole_tensors(self.ema.weights, keep=keep)
        if self.accelerator.is_main_process:
            state = {name: record.state() for name, record in self.records.items()} | {
                "loader": self.job.source.state(step),
                "optimizer_groups": groups,
                "ema_updates": self.ema.num_updates if self.ema else 0,
                "meters": meters,
                "num_processes": self.accelerator.num_processes,
                "config": self.config.to_dict(),
                "manifest": self.job.manifest.fingerprint,
            }
            path = save_checkpoint(
                self.folder,
                Checkpoint(step, tensors, state),
                keep_last=self.config.checkpoint.keep_last,
            )
            logger.info("Saved %s.", path)
        self.accelerator.wait_for_everyone()

    def resume(self) -> int:
        """Load the latest checkpoint of the output folder and return its step; 0 without one.

        A new run seeds the default generators: what ran before it in the process, such as encoding
        pictures for an empty cache, must not show in its random states.

        Raises:
            CheckpointError: When the checkpoint is of another config or of other data, or the
                processes find different ones.
            ConfigError: When it is beyond the last step.
        """
        self.accelerator.wait_for_everyone()
        path = latest_checkpoint(self.folder)
        self._check_agrees(path)
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
            # A run that had none before starts to average from the weights it goes on with.
            averages = checkpoint.tensors.get("ema", checkpoint.tensors["model"])
            self.ema.load(averages, state["ema_updates"])
        rank = self.accelerator.process_index
        _set_rng_state(_of_rank(checkpoint.tensors["rng"], rank))
        learned = checkpoint.tensors.get("objective", {})
        self.job.objective.restore(_of_rank(learned, rank % state["num_processes"]))
        processes = self.accelerator.num_processes
        for sums in state.get("meters", [])[self.accelerator.process_index :: processes]:
            self.meter.add_sums(sums)
        for name, record in self.records.items():
            if name in state:
                record.restore(state[name])
        logger.info("Resumed from %s.", path)
        return self.job.source.restore(dict(state["loader"]))

    def _check_agrees(self, path: Path | None) -> None:
        """Refuse processes that would go on from different steps."""
        found = gather_object([path.name if path else "none"])
        if len(set(found)) > 1:
            raise CheckpointError(
                f"Every process must find the same newest checkpoint in `{self.folder}`; they found"
                f" {', '.join(found)}. Put `output_dir` where all processes read and write."
            )

    def _check_continues(self, path: Path, state: Mapping[str, Any]) -> None:
        """Refuse a checkpoint of another config or of other data, or beyond the last step."""
        if state["step"] > self.config.num_train_steps:
            raise ConfigError(
                f"`num_train_steps` must be at least the step of `{path}`; got"
                f" {self.config.num_train_steps}. Raise it, or give another `output_dir`."
            )
        changes = config_changes(with_defaults(state["config"]), self.config.to_dict())
        listed = "; ".join(f"`{name}` {old} -> {new}" for name, (old, new) in changes.items())
        is_fixed = any(name in FIXED_FIELDS for name in changes)
        if changes and (is_fixed or not self.config.allow_changes):
            remedy = (
                f"Undo the change (`allow_changes` is not for {', '.join(FIXED_FIELDS)}) or give"
                " another `output_dir`."
                if is_fixed
                else "Undo the change, give another `output_dir`, or set `allow_changes`."
            )
            raise CheckpointError(
                f"`{path}` was written by a run with another config ({listed}). {remedy}"
            )
        if changes:
            logger.warning("Going on with another config: %s.", listed)
        if state["manifest"] != self.job.manifest.fingerprint:
            raise CheckpointError(
                f"`{path}` was trained on other data than `{self.config.data.manifest}` holds now."
                " Give another `output_dir`."
            )


def _by_rank(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors of all processes in one mapping."""
    return {f"{rank}.{k}": t for rank, state in enumerate(states) for k, t in state.items()}


def _of_rank(tensors: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """Those of one process."""
    own = f"{rank}."
    return {k.removeprefix(own): t for k, t in tensors.items() if k.startswith(own)}


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
