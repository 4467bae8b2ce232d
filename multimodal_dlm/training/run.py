"""The two entries of the training command: describe a run, or train it."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from multimodal_dlm.training.batches import iterate_steps
from multimodal_dlm.training.callbacks import Callback, TrainState
from multimodal_dlm.training.checkpoint import best_checkpoint, load_checkpoint
from multimodal_dlm.training.components import Job, build_job
from multimodal_dlm.training.config import TrainConfig
from multimodal_dlm.training.launching import open_accelerator, run_device, run_precision
from multimodal_dlm.training.trainer import Trainer

logger = logging.getLogger(__name__)

DESCRIBED_STEPS = 4

__all__ = ["Callback", "TrainState", "describe", "train"]


def describe(config: TrainConfig) -> dict[str, Any]:
    """What a run would be: resolved config and precision, parameters, tokens and data size.

    Nothing is encoded, written or trained; tokens are counted over the first steps.
    """
    precision = run_precision(config, run_device())
    config = replace(config, mixed_precision=precision.value)
    job = build_job(config, is_dry_run=True)
    steps = min(DESCRIBED_STEPS, config.num_train_steps)
    batches = [part for _, parts in iterate_steps(job.source, 0, steps) for part in parts]
    tokens = sum(batch.num_tokens for batch in batches) / steps
    slots = sum(batch.num_slots for batch in batches) / steps
    parameters = [parameter for parameter in job.model.parameters() if parameter.requires_grad]
    return {
        "config": config.to_dict(),
        "mixed_precision": str(precision),
        "num_parameters": sum(parameter.numel() for parameter in parameters),
        "rows_per_step": config.data.batch_size,
        "tokens_per_step": round(tokens),
        "padding_share": round(1 - tokens / slots, 4),
        "data": _data_size(config, job),
    }


def train(config: TrainConfig, *, callbacks: Sequence[Callback] = ()) -> dict[str, Any]:
    """Train a component, or go on with what `output_dir` holds, and export it when finished.

    Args:
        config: The run.
        callbacks: Called on the main process with a `TrainState`.

    Returns:
        Step reached, last metrics, and the folder of the export when the run is finished.
    """
    output_dir = Path(config.output_dir)
    accelerator = open_accelerator(config)
    if accelerator.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
    with _run_log(output_dir, is_main=accelerator.is_main_process):
        with accelerator.main_process_first():
            job = build_job(
                config,
                rank=accelerator.process_index,
                world_size=accelerator.num_processes,
                device=accelerator.device,
            )
        trainer = Trainer(job, config, accelerator, callbacks=callbacks)
        accelerator.init_trackers("tensorboard")
        result = trainer.fit()
        if result["is_finished"]:
            folder = _export(config, job, trainer)
            result["export"] = str(folder)
        # In this order, or a process may abort at its exit: DDP's buckets hold the process group.
        accelerator.wait_for_everyone()
        del trainer
        accelerator.free_memory()
        accelerator.end_training()
    return {"output_dir": str(output_dir), **result}


@contextmanager
def _run_log(output_dir: Path, *, is_main: bool) -> Iterator[None]:
    """The library's messages on the screen and in `<output_dir>/train.log`."""
    root = logging.getLogger("multimodal_dlm")
    old_level, handlers = root.level, list[logging.Handler]()
    if is_main:
        shape = logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S")
        handlers = [logging.StreamHandler(), logging.FileHandler(output_dir / "train.log")]
        for handler in handlers:
            handler.setFormatter(shape)
            root.addHandler(handler)
        root.setLevel(logging.INFO)
    try:
        yield
    finally:
        for handler in handlers:
            root.removeHandler(handler)
            handler.close()
        root.setLevel(old_level)


def _export(config: TrainConfig, job: Job, trainer: Trainer) -> Path:
    """Save the finished component, averaged if asked for, from the main process."""
    folder = config.export_folder
    model, ema = trainer.parallel.gathered(trainer.ema)
    if trainer.accelerator.is_main_process:
        best = best_checkpoint(trainer.keeper.folder) if config.export.use_best else None
        if best is not None:
            checkpoint = load_checkpoint(best)
            model.load_state_dict(checkpoint.tensors["model"])
            if ema is not None:
                # A run that began without averages may have its best step there.
                ema.weights = dict(checkpoint.tensors.get("ema", checkpoint.tensors["model"]))
            logger.info("The best step is %d.", checkpoint.step)
        with ema.applied(model) if config.export.use_ema and ema else nullcontext():
            job.export(model, folder)
        logger.info("Exported to %s.", folder)
    trainer.accelerator.wait_for_everyone()
    return folder


def _data_size(config: TrainConfig, job: Job) -> dict[str, Any]:
    """Samples and passes of every source."""
    sources = {}
    rows = config.num_train_steps * config.data.batch_size
    chosen = [s for s in job.manifest.sources.values() if s.count(config.data.split)]
    plan = job.source.epoch_plan
    weight = sum(plan.slots.values())
    for source in chosen:
        count, slots = source.count(config.data.split), plan.slots[source.name]
        drawn = plan.selections[source.name].size
        sources[source.name] = {
            "samples": count,
            "share": round(slots / weight, 4),
            "epochs": round(rows * slots / weight / drawn, 2),
            "tasks": dict(source.tasks),
        }
    return {"manifest": job.manifest.name, "fingerprint": job.manifest.fingerprint, **sources}
