"""Held-out evaluation on a fixed grid, and the best checkpoint."""

import dataclasses
from pathlib import Path

import pytest
import torch

from multimodal_dlm.errors import ConfigError
from multimodal_dlm.pipelines import load_pipeline
from multimodal_dlm.training.checkpoint import best_checkpoint, load_checkpoint
from multimodal_dlm.training.components import build_job
from multimodal_dlm.training.config import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    ExportConfig,
    ModelConfig,
    ObjectiveConfig,
    TrainConfig,
)
from multimodal_dlm.training.evaluation_loop import BestStep
from multimodal_dlm.training.objectives import MaskedDiffusion
from multimodal_dlm.training.randomness import row_generator
from multimodal_dlm.training.run import train
from tests.training.runs import Stop, crash_at, final_tensors, run_config
from tests.training.test_stability import metrics

EVALUATION = EvaluationConfig(every_steps=2, num_rows=6, num_levels=4)


def evaluated(root: Path, output: str, **changes):
    return run_config(root, output, evaluation=EVALUATION, **changes)


def evaluations(config) -> list[dict]:
    return [row for row in metrics(config.output_dir) if "eval/loss" in row]


def test_a_resumed_run_logs_the_evaluations_of_a_straight_one(run_root):
    straight = evaluated(run_root, "eval_straight")
    broken = evaluated(run_root, "eval_broken", sample_every_steps=1)
    train(straight)
    with pytest.raises(Stop):
        train(broken, callbacks=[crash_at(5)])
    train(broken)
    assert metrics(straight.output_dir) == metrics(broken.output_dir)
    rows = evaluations(straight)
    assert [row["step"] for row in rows] == [2, 4, 6]
    assert {"eval/nelbo/text", "eval/nelbo/image", "eval/nelbo/image/text_to_image"} <= set(rows[0])
    left, right = final_tensors(straight), final_tensors(broken)
    assert all(torch.equal(tensor, right[name]) for name, tensor in left.items())


def test_evaluation_does_not_change_a_run_and_does_not_depend_on_its_seed(run_root):
    """Only the weights count: rows, levels and masks stay."""
    plain = run_config(run_root, "eval_off", num_train_steps=2)
    watched = evaluated(run_root, "eval_on", num_train_steps=2)
    train(plain)
    train(watched)
    left, right = final_tensors(plain), final_tensors(watched)
    assert all(torch.equal(tensor, right[name]) for name, tensor in left.items())
    small = dataclasses.replace(plain.data, micro_batch_size=2)
    job = build_job(evaluated(run_root, "eval_again", num_train_steps=2, seed=7, data=small))
    weights = {
        name.removeprefix("ema/"): tensor for name, tensor in right.items() if "ema/" in name
    }
    job.model.load_state_dict(weights)
    assert job.held_out is not None
    batches = [dataclasses.replace(batch, draws=()) for batch in job.held_out.batches(0)]
    assert all(key.startswith("squares/val-") for batch in batches for key in batch.keys)
    plan = job.objective.prepare(batches, seed=0, step=0, gather=list, num_processes=1)
    total, model = 0.0, job.model.eval()
    for level, contexts in enumerate(job.objective.grid(plan.contexts, 4)):
        for batch, context in zip(batches, contexts, strict=True):
            draws = [row_generator(0, level, row) for row in batch.rows]
            with torch.no_grad():
                total += float(job.objective(model, batch.inputs, generator=draws, **context).loss)
    assert evaluations(watched)[0]["eval/loss"] == pytest.approx(total / 4, rel=1e-5)


def test_the_grid_has_one_count_of_every_row_in_every_band(run_root):
    job = build_job(evaluated(run_root, "eval_grid"))
    assert job.held_out is not None
    objective, batches = MaskedDiffusion(hole_share=1.0), job.held_out.batches(0)
    plan = objective.prepare(batches, seed=0, step=0, gather=list, num_processes=1)
    levels = objective.grid(plan.contexts, 4)
    assert len(levels) == 4
    for level, contexts in enumerate(levels):
        for context in contexts:
            assert context["draws"] == ()
            for uniforms in context["uniforms"].values():
                assert bool(((uniforms >= level / 4) & (uniforms < (level + 1) / 4)).all())


def test_the_best_step_is_saved_and_outlives_later_ones(run_root):
    config = evaluated(run_root, "best", num_train_steps=8, sample_every_steps=1, ema_decay=0.0)
    config = dataclasses.replace(
        config,
        checkpoint=CheckpointConfig(every_steps=3, keep_last=1),
        export=ExportConfig(dtype="float32", use_best=True),
    )

    def spoil(state) -> None:
        """From step 4 on the weights are worse than before."""
        if state.step >= 4:
            with torch.no_grad():
                state.model.embed_tokens.weight.mul_(2.0)

    exported = train(config, callbacks=[spoil])["export"]
    values = {row["step"]: row["eval/loss"] for row in evaluations(config)}
    best = min(values, key=values.__getitem__)
    folder = Path(config.output_dir) / "checkpoints"
    assert best < 8
    assert sorted(path.name for path in folder.iterdir()) == [
        f"step-0000000{best}", "step-00000008"
    ]  # fmt: skip
    found = best_checkpoint(folder)
    assert found == folder / f"step-0000000{best}"
    weights = load_checkpoint(found).tensors["model"]
    released = load_pipeline(exported).transformer.state_dict()
    assert all(torch.equal(tensor, released[name]) for name, tensor in weights.items())
    state = load_checkpoint(folder / "step-00000008").state
    assert state["best"] == {
        "metric": "eval/loss", "mode": "min", "value": values[best], "step": best
    }  # fmt: skip


def test_best_follows_its_direction_and_refuses_a_metric_that_is_not_there():
    lowest = BestStep(CheckpointConfig(best_metric="eval/a"))
    assert [lowest.is_improved_by(s, {"eval/a": v}) for s, v in enumerate((2, 3, 1, 1))] == [
        True, False, True, False
    ]  # fmt: skip
    assert not lowest.is_improved_by(9, {"eval/a": float("nan")})
    highest = BestStep(CheckpointConfig(best_metric="eval/a", best_mode="max"))
    assert [highest.is_improved_by(s, {"eval/a": v}) for s, v in enumerate((2, 3, 1))] == [
        True, True, False
    ]  # fmt: skip
    highest.restore(lowest.state())  # Of another direction: it starts anew.
    assert highest.step == 1
    with pytest.raises(ConfigError, match=r"got `eval/a`. There are `eval/b`"):
        lowest.is_improved_by(1, {"eval/b": 1.0})
    with pytest.raises(ConfigError, match=r"`export.use_best` needs `evaluation.every_steps`"):
        TrainConfig("out", 1, export=ExportConfig(use_best=True))


def test_an_image_tokenizer_is_evaluated_too(run_root):
    options = {
        "image_size": 32, "channels": (8, 8), "encoder_layers": (1, 1), "decoder_layers": (1, 1),
        "quantizer": {"type": "fsq", "levels": [4, 4, 3]},
    }  # fmt: skip
    config = evaluated(
        run_root, "eval_pixels", num_train_steps=2,
        model=ModelConfig(component="image_tokenizer", options=options),
        objective=ObjectiveConfig(
            name="reconstruction", options={"perceptual_weight": 0.0, "adversarial_weight": 0.1}
        ),
        data=DataConfig(manifest=str(run_root / "mixture.yaml"), batch_size=4),
    )  # fmt: skip
    train(config)
    row = evaluations(config)[0]
    assert row["eval/psnr"] > 0
    assert "eval/critic" not in row  # Nothing is trained on held-out pictures.
