"""Skipped steps, spikes and divergence: what counts, what is reported, what a resume keeps."""

import dataclasses
import json
import logging
import math
from pathlib import Path

import pytest
import torch

from multimodal_dlm.errors import DivergenceError
from multimodal_dlm.training.checkpoint import load_checkpoint
from multimodal_dlm.training.components import build_job
from multimodal_dlm.training.config import (
    CheckpointConfig,
    ModelConfig,
    ObjectiveConfig,
    StabilityConfig,
)
from multimodal_dlm.training.objectives import OBJECTIVES, MaskedDiffusion, Reconstruction
from multimodal_dlm.training.randomness import row_generator
from multimodal_dlm.training.run import train
from multimodal_dlm.training.stability import RunningSpread, StabilityMonitor
from tests.training.runs import Stop, crash_at, final_tensors, run_config

TIMES = ("tokens_per_s", "elapsed_s", "eta_s")


def poison(monkeypatch, name: str, base, steps: set[int]) -> None:
    """An objective whose loss is nan in some steps."""

    class Poisoned(base):
        def prepare(self, batches, **options):
            self.is_poisoned = options["step"] in steps
            return super().prepare(batches, **options)

        def __call__(self, model, inputs, **options):
            output = super().__call__(model, inputs, **options)
            factor = math.nan if self.is_poisoned else 1.0
            return dataclasses.replace(output, loss=output.loss * factor)

    monkeypatch.setitem(OBJECTIVES, name, Poisoned)


def metrics(folder: str | Path) -> list[dict]:
    rows = [json.loads(row) for row in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def test_a_skipped_step_changes_nothing_but_the_count(run_root, monkeypatch):
    poison(monkeypatch, "masked_diffusion", MaskedDiffusion, {3})
    config = run_config(
        run_root, "skip", num_train_steps=4, log_every_steps=1,
        checkpoint=CheckpointConfig(every_steps=3, keep_last=2),
    )  # fmt: skip
    train(config)
    folder = Path(config.output_dir) / "checkpoints"
    before, after = (load_checkpoint(folder / f"step-0000000{step}") for step in (3, 4))
    for stem in ("model", "ema", "optimizer"):
        for name, tensor in before.tensors[stem].items():
            assert torch.equal(tensor, after.tensors[stem][name]), name
    assert before.state["ema_updates"] == after.state["ema_updates"] == 3
    assert before.state["stability"]["num_skipped"] == 0
    assert after.state["stability"]["num_skipped"] == 1
    rows = metrics(config.output_dir)
    assert [row["skipped_steps"] for row in rows] == [0, 0, 0, 1]
    assert "loss" not in rows[3]
    assert rows[3]["lr"] < rows[2]["lr"]  # It keeps its place in the schedule.
    assert "step 3 with the samples squares/square-" in (
        Path(config.output_dir) / "train.log"
    ).read_text()  # fmt: skip


def test_a_resume_across_skipped_steps_equals_a_straight_run(run_root, monkeypatch):
    poison(monkeypatch, "masked_diffusion", MaskedDiffusion, {1, 3})
    saves = CheckpointConfig(every_steps=2, keep_last=1)
    straight = run_config(run_root, "skip_straight", checkpoint=saves, log_every_steps=4)
    broken = run_config(
        run_root, "skip_broken", checkpoint=saves, log_every_steps=4, sample_every_steps=1
    )
    train(straight)
    with pytest.raises(Stop):
        train(broken, callbacks=[crash_at(4)])  # Step 4 is due, but waits: its step was skipped.
    assert [path.name for path in Path(broken.output_dir).glob("checkpoints/*")] == [
        "step-00000003"
    ]
    train(broken)
    left, right = final_tensors(straight), final_tensors(broken)
    assert all(torch.equal(tensor, right[name]) for name, tensor in left.items())
    assert metrics(straight.output_dir) == metrics(broken.output_dir)
    states = [
        load_checkpoint(Path(config.output_dir) / "checkpoints/step-00000006").state
        for config in (straight, broken)
    ]
    assert states[0]["stability"] == states[1]["stability"]
    assert states[0]["stability"]["num_skipped"] == 2


def test_buffers_of_a_skipped_step_are_put_back(run_root, monkeypatch):
    """A codebook that moves in forward must not keep what a broken batch left in it."""
    poison(monkeypatch, "reconstruction", Reconstruction, {1})
    options = {
        "image_size": 32, "channels": (8, 8), "encoder_layers": (1, 1), "decoder_layers": (1, 1),
        "quantizer": {"type": "vq", "codebook_size": 16, "num_channels": 4},
    }  # fmt: skip
    config = run_config(
        run_root, "codebook", num_train_steps=2, ema_decay=0.0,
        model=ModelConfig(component="image_tokenizer", options=options),
        objective=ObjectiveConfig(name="reconstruction", options={"perceptual_weight": 0.0}),
        checkpoint=CheckpointConfig(every_steps=1),
    )  # fmt: skip
    train(config)
    folder = Path(config.output_dir) / "checkpoints"
    first, second = (load_checkpoint(folder / f"step-0000000{step}").tensors for step in (1, 2))
    assert any(name.endswith("num_updates") for name in first["model"])
    for name, tensor in first["model"].items():
        assert torch.equal(tensor, second["model"][name]), name


def test_too_many_skipped_steps_end_the_run(run_root, monkeypatch):
    poison(monkeypatch, "masked_diffusion", MaskedDiffusion, {2, 3, 4, 5})
    config = run_config(run_root, "many", stability=StabilityConfig(max_skipped_in_a_row=2))
    with pytest.raises(DivergenceError, match="makes 3 such steps in a row and 3 of the last 128"):
        train(config)
    assert [path.name for path in Path(config.output_dir).glob("checkpoints/*")] == [
        "step-00000002"
    ]


def test_weights_that_are_no_numbers_are_not_saved_at_the_end(run_root):
    config = run_config(run_root, "broken_weights", sample_every_steps=1)

    def spoil(state) -> None:
        if state.step == 3:
            with torch.no_grad():
                state.model.embed_tokens.weight.fill_(float("nan"))

    with pytest.raises(DivergenceError, match=r"`embed_tokens.weight` holds nan or inf"):
        train(config, callbacks=[spoil])
    assert [path.name for path in Path(config.output_dir).glob("checkpoints/*")] == [
        "step-00000002"
    ]


def test_a_share_of_skipped_steps_ends_a_run_and_old_ones_are_forgotten():
    limits = StabilityConfig(max_skipped_in_a_row=5, max_skipped_share=0.25, window=8)
    monitor = StabilityMonitor(limits)
    broken, sound = {"loss": 1.0, "grad_norm": math.inf}, {"loss": 1.0, "grad_norm": 1.0}
    for step in (0, 4, 8, 12):
        assert not monitor.accepts(step, broken, ["a/1"])
        assert monitor.accepts(step + 1, sound, ["a/1"])
    with pytest.raises(
        DivergenceError, match=r"gradient must be finite; got inf in step 14 .* a/1"
    ):
        monitor.accepts(14, broken, ["a/1"])


def test_spikes_are_found_by_a_robust_spread_that_a_resume_keeps(caplog):
    draw = torch.Generator().manual_seed(0)
    values = (3 + 0.1 * torch.randn(60, generator=draw)).tolist()
    values[40] = 9.0
    straight, resumed = StabilityMonitor(StabilityConfig()), StabilityMonitor(StabilityConfig())
    with caplog.at_level(logging.WARNING, "multimodal_dlm.training.stability"):
        for step, value in enumerate(values):
            assert straight.accepts(step, {"loss": value, "grad_norm": 1.0}, [f"a/{step}"])
    assert straight.counts() == {"skipped_steps": 0, "spikes/loss": 1, "spikes/grad_norm": 0}
    assert "the loss of step 40 is 9" in caplog.text
    assert "a/40" in caplog.text
    for step, value in enumerate(values[:30]):
        resumed.accepts(step, {"loss": value, "grad_norm": 1.0}, [])
    other = StabilityMonitor(StabilityConfig())
    other.restore(json.loads(json.dumps(resumed.state())))
    for step, value in enumerate(values[30:], start=30):
        other.accepts(step, {"loss": value, "grad_norm": 1.0}, [])
    assert other.state() == straight.state()


def test_one_outlier_does_not_hide_the_next():
    spread = RunningSpread(32)
    for value in (1.0, 1.1, 0.9, 1.05) * 8:
        spread.add(value)
    first = spread.deviations(50.0)
    spread.add(50.0)
    assert first > 100
    assert spread.deviations(50.0) > 0.8 * first
    assert RunningSpread(32).deviations(1e9) == 0.0


def test_the_gradient_norm_of_a_modality_is_that_of_its_loss_alone(run_root):
    config = run_config(
        run_root, "norms", num_train_steps=1, log_every_steps=1, grad_norms_every_steps=1
    )
    train(config)
    row = metrics(config.output_dir)[0]
    job = build_job(config)
    batches = job.source.batches(0)
    for name, other in (("text", "image"), ("image", "text")):
        objective = MaskedDiffusion(hole_share=0.1, loss_weights={other: 0.0})
        plan = objective.prepare(batches, seed=1, step=0, gather=list, num_processes=1)
        job.model.zero_grad()
        for batch, context in zip(batches, plan.contexts, strict=True):
            draws = [row_generator(1, 0, row) for row in batch.rows]
            objective(job.model, batch.inputs, generator=draws, **context).loss.backward()
        grads = [p.grad for p in job.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        assert row[f"grad_norm/{name}"] == pytest.approx(float(norm), rel=1e-4)


def test_measured_norms_do_not_change_a_run(run_root):
    without = run_config(run_root, "norms_off", grad_norms_every_steps=0)
    with_norms = run_config(run_root, "norms_on", grad_norms_every_steps=1)
    train(without)
    train(with_norms)
    left, right = final_tensors(without), final_tensors(with_norms)
    assert all(torch.equal(tensor, right[name]) for name, tensor in left.items())
    assert "grad_norm/text" in metrics(with_norms.output_dir)[0]
