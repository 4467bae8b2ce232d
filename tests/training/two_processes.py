"""Run by two processes at once, twice.

First: the tiny run of `runs.py` in shards, straight and resumed, then as copies until a signal
stops it after three steps. Second: the copies go on.
"""

import dataclasses
import math
import os
import shutil
import signal
import sys
from pathlib import Path

from multimodal_dlm.training.components import build_job
from multimodal_dlm.training.config import EvaluationConfig, ObjectiveConfig, TrainConfig
from multimodal_dlm.training.launching import open_accelerator
from multimodal_dlm.training.objectives import OBJECTIVES, MaskedDiffusion
from multimodal_dlm.training.run import train
from multimodal_dlm.training.trainer import Trainer
from tests.training.runs import CRITIC, run_config, tokenizer_config

STEPS = 4
OPTIONS = {"noise_conditioning": "ada_norm_single", "tie_word_embeddings": False}


def two_config(root: Path, output: str, **changes) -> TrainConfig:
    """The run of the tests, two rows a forward; head and levels have weights of their own."""
    watched = {
        "evaluation": EvaluationConfig(every_steps=2, num_rows=6),
        "grad_norms_every_steps": 2,
    }
    config = run_config(root, f"two/{output}", **({"num_train_steps": STEPS} | watched | changes))
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, micro_batch_size=2),
        model=dataclasses.replace(config.model, options=OPTIONS),
    )


def critic_config(root: Path, output: str) -> TrainConfig:
    """A run of an image tokenizer in which every process has a critic."""
    config = tokenizer_config(root, f"two/{output}", num_train_steps=STEPS)
    return dataclasses.replace(config, objective=ObjectiveConfig("reconstruction", CRITIC))


def fit(config: TrainConfig, callbacks=()) -> None:
    """Train as `train` does, but stay in the process group."""
    Path(config.output_dir).mkdir(parents=True, exist_ok=True)
    accelerator = open_accelerator(config)
    with accelerator.main_process_first():
        job = build_job(
            config, rank=accelerator.process_index, world_size=accelerator.num_processes
        )
    trainer = Trainer(job, config, accelerator, callbacks=callbacks)
    trainer.fit()
    trainer.parallel.gathered(trainer.ema)


def train_in_shards(root: Path) -> None:
    """Every sharding; one is stopped and resumed, one goes on as copies."""
    seen = []

    def see(state) -> None:
        with state.averaged() as model:
            seen.append(sum(float(p.detach().abs().sum()) for p in model.parameters()))

    fit(two_config(root, "fsdp", sharding="fsdp", sample_every_steps=2), callbacks=[see])
    assert len(seen) == (2 if os.environ["RANK"] == "0" else 0)
    assert all(0 < value < 1e6 for value in seen)
    changes = {"sharding": "zero2", "gradient_checkpointing": True, "mixed_precision": "no"}
    fit(two_config(root, "zero2", **changes))
    fit(two_config(root, "fsdp_bf16", sharding="fsdp", mixed_precision="bf16"))
    skip_a_step(root)
    if os.environ["RANK"] == "0":
        leave_half(root / "two/fsdp", root / "two/resumed")
    fit(two_config(root, "resumed", sharding="fsdp"))
    fit(critic_config(root, "critics"))
    if os.environ["RANK"] == "0":
        leave_half(root / "two/critics", root / "two/critics_resumed")
    fit(critic_config(root, "critics_resumed"))


class OneBrokenRank(MaskedDiffusion):
    """The loss of the last process is nan in step 1."""

    def prepare(self, batches, **options):
        self.is_broken = options["step"] == 1 and os.environ["RANK"] == "1"
        return super().prepare(batches, **options)

    def __call__(self, model, inputs, **options):
        output = super().__call__(model, inputs, **options)
        factor = math.nan if self.is_broken else 1.0
        return dataclasses.replace(output, loss=output.loss * factor)


def skip_a_step(root: Path) -> None:
    """All processes skip what one of them could not compute."""
    OBJECTIVES["masked_diffusion"] = OneBrokenRank
    for sharding in ("none", "fsdp"):
        fit(two_config(root, f"skipped_{sharding}", sharding=sharding))
    OBJECTIVES["masked_diffusion"] = MaskedDiffusion


def leave_half(run: Path, copy: Path) -> None:
    """A copy of a run as it was after two steps."""
    step = Path("checkpoints/step-00000002")
    shutil.copytree(run / step, copy / step)


def stop(state) -> None:
    """A signal to one process stops both."""
    if state.step == 3:
        os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    folder, is_first = Path(sys.argv[1]), sys.argv[2] == "first"
    if is_first:
        train_in_shards(folder)
    done = train(two_config(folder, "copies", sample_every_steps=1), callbacks=[stop])
    reached = (done["step"], done["is_finished"])
    sys.exit(0 if reached == ((3, False) if is_first else (4, True)) else 1)
