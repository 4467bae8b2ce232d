"""Whole runs on tiny real components: resume, damage, signals, divergence, export."""

import dataclasses
import hashlib
import json
import os
import signal
import tarfile
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from multimodal_dlm.errors import CheckpointError, ConfigError, DataError, DivergenceError
from multimodal_dlm.pipelines import load_pipeline
from multimodal_dlm.training.checkpoint import latest_checkpoint, list_checkpoints
from multimodal_dlm.training.config import CheckpointConfig, DataConfig, StabilityConfig
from multimodal_dlm.training.run import describe, train
from tests.training.runs import Stop, crash_at, final_tensors, run_config, write_data


def test_a_resumed_run_equals_a_straight_one_bit_for_bit(run_root):
    straight = run_config(run_root, "straight")
    result = train(straight)
    assert result["step"] == 6
    assert result["is_finished"]
    broken = run_config(run_root, "broken", sample_every_steps=1)
    with pytest.raises(Stop):
        train(broken, callbacks=[crash_at(5)])
    assert [path.name for path in list_checkpoints(Path(broken.output_dir) / "checkpoints")] == [
        "step-00000002",
        "step-00000004",
    ]
    train(broken)
    left, right = final_tensors(straight), final_tensors(broken)
    assert left.keys() == right.keys()
    assert len(left) > 50
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name
    rows = [json.loads(row) for row in (run_root / "broken/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6]
    expected = [json.loads(row) for row in (run_root / "straight/metrics.jsonl").open()]
    assert [row["loss"] for row in rows] == [row["loss"] for row in expected]


def test_a_row_of_the_log_that_spans_a_crash_is_that_of_a_straight_run(run_root):
    saves = CheckpointConfig(every_steps=3, keep_last=1)
    rows = []
    for name in ("log_straight", "log_broken"):
        config = run_config(run_root, name, checkpoint=saves, sample_every_steps=1)
        if name == "log_broken":
            with pytest.raises(Stop):
                train(config, callbacks=[crash_at(4)])  # Step 3 is saved, row 4 not yet written.
        train(config)
        found = [json.loads(row) for row in (run_root / name / "metrics.jsonl").open()]
        timing = ("tokens_per_s", "elapsed_s", "eta_s")
        rows.append([{k: v for k, v in row.items() if k not in timing} for row in found])
    assert [row["step"] for row in rows[0]] == [2, 4, 6]
    assert rows[0] == rows[1]


def test_the_run_folder_says_what_ran_and_the_export_draws(run_root):
    config = run_config(run_root, "folder")
    result = train(config)
    folder = Path(config.output_dir)
    assert yaml.safe_load((folder / "config.yaml").read_text()) == config.to_dict()
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["seed"] == 1
    assert environment["manifest"]["name"] == "m"
    assert "torch" in environment["packages"]
    assert list(folder.rglob("events.out.tfevents*"))
    log = (folder / "train.log").read_text()
    assert "step 6/6" in log
    for epoch in range(3):
        assert f"epoch {epoch}, squares: 12 yielded + 0 skipped + 0 filtered = 12 in" in log
    assert not [path for path in folder.rglob("*") if path.suffix in (".pt", ".bin", ".pkl")]
    pipe = load_pipeline(result["export"])
    assert pipe.transformer.num_parameters() > 0
    assert pipe.card.tasks == ("text_to_image", "caption", "vqa", "joint")
    images = pipe("a red square", num_inference_steps=2).images
    assert images[0].size == (32, 32)
    ema = final_tensors(config)["ema/embed_tokens.weight"]
    assert torch.equal(pipe.transformer.embed_tokens.weight, ema.bfloat16().float())


def test_a_damaged_checkpoint_is_passed_over(run_root):
    config = run_config(run_root, "damaged", sample_every_steps=1)
    with pytest.raises(Stop):
        train(config, callbacks=[crash_at(5)])
    checkpoints = Path(config.output_dir) / "checkpoints"
    newest = checkpoints / "step-00000004" / "model.safetensors"
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)
    chosen = latest_checkpoint(checkpoints)
    assert chosen is not None
    assert chosen.name == "step-00000002"
    train(config)
    straight = run_config(run_root, "undamaged")
    train(straight)
    left, right = final_tensors(straight), final_tensors(config)
    assert all(torch.equal(tensor, right[name]) for name, tensor in left.items())


def test_unusable_samples_end_a_run_unless_there_is_a_budget(run_root, tmp_path):
    write_data(tmp_path)
    spoil_a_picture(tmp_path)
    saves = CheckpointConfig(every_steps=1)
    config = run_config(run_root, "budget", num_train_steps=4, checkpoint=saves)
    data = dataclasses.replace(
        config.data, manifest=str(tmp_path / "mixture.yaml"), cache_dir=str(tmp_path / "cache")
    )
    with pytest.raises(DataError, match="square-002"):
        train(dataclasses.replace(config, data=data))
    with pytest.raises(DataError, match=r"1 are unusable \(picture 1\)"):
        train(dataclasses.replace(config, data=dataclasses.replace(data, max_skipped=0.01)))
    config = dataclasses.replace(config, data=dataclasses.replace(data, max_skipped=1))
    with pytest.raises(Stop):
        train(dataclasses.replace(config, sample_every_steps=2), callbacks=[crash_at(2)])
    train(config)  # Goes on from step 1, within epoch 0, with the ledger of before.
    log = (Path(config.output_dir) / "train.log").read_text()
    line = "squares: 11 yielded + 1 skipped (picture 1) + 0 filtered = 12 in the manifest."
    assert log.count(f"epoch 0, {line}") == 2
    assert log.count(f"epoch 1, {line}") == 1


def spoil_a_picture(root: Path) -> None:
    """Cut the pixels of `square-002` short; the manifest vouches for the result."""
    path = root / "squares" / "train-000000.tar"
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        member = tar.getmember("square-002.png")
    data[member.offset_data + 60 : member.offset_data + member.size] = bytes(member.size - 60)
    path.write_bytes(data)
    path.with_name(path.name + ".index.json").unlink()
    manifest = root / "squares.yaml"
    content = yaml.safe_load(manifest.read_text())
    content["splits"]["train"][0]["sha256"] = hashlib.sha256(data).hexdigest()
    manifest.write_text(yaml.safe_dump(content))


def test_another_config_does_not_continue_a_run(run_root):
    config = run_config(run_root, "changed")
    train(config)
    changed = dataclasses.replace(config, num_train_steps=8)
    with pytest.raises(CheckpointError, match=r"`num_train_steps` 6 -> 8.*or set `allow_changes`"):
        train(changed)
    record = Path(config.output_dir) / "config.yaml"
    assert yaml.safe_load(record.read_text()) == config.to_dict()  # Not that of the refused run.
    for allow_changes in (False, True):
        seeded = dataclasses.replace(config, seed=2, allow_changes=allow_changes)
        with pytest.raises(CheckpointError, match=r"`seed` 1 -> 2.*`allow_changes` is not for"):
            train(seeded)
    with pytest.raises(ConfigError, match="`num_train_steps` must be at least .*; got 5"):
        train(dataclasses.replace(config, num_train_steps=5, allow_changes=True))
    assert train(dataclasses.replace(config, log_every_steps=1))["is_finished"]
    assert train(dataclasses.replace(changed, allow_changes=True))["step"] == 8


def test_averages_start_where_a_run_without_them_goes_on(run_root):
    config = run_config(run_root, "averages", num_train_steps=2, ema_decay=0.0)
    train(config)
    path = latest_checkpoint(Path(config.output_dir) / "checkpoints")
    assert path is not None
    before = load_file(path / "model.safetensors")["embed_tokens.weight"]
    changed = dataclasses.replace(config, num_train_steps=3, ema_decay=0.9, allow_changes=True)
    train(changed)
    after = final_tensors(changed)
    expected = before.lerp(after["model/embed_tokens.weight"], 1 - 2 / 11)
    assert torch.allclose(after["ema/embed_tokens.weight"], expected, atol=1e-6)


def test_processes_that_find_different_checkpoints_are_refused(run_root, monkeypatch):
    monkeypatch.setattr(
        "multimodal_dlm.training.saving.gather_object", lambda own: [*own, "step-00000002"]
    )
    message = "the same newest checkpoint.*found none, step-00000002. Put `output_dir` where"
    with pytest.raises(CheckpointError, match=message):
        train(run_config(run_root, "apart"))


def test_options_must_be_those_of_what_a_run_starts_from(run_root):
    first = run_config(run_root, "first_stage", num_train_steps=1)
    folder = train(first)["export"]
    config = run_config(run_root, "second_stage")
    same = dataclasses.replace(config.model, init_from=folder, options={"hidden_size": 64})
    assert describe(dataclasses.replace(config, model=same))["num_parameters"] > 0
    for changes, message in (
        ({"max_text": 24}, "`model.max_text` must be .*; got 24 and 20 in"),
        ({"condition_attention": "full"}, "`model.condition_attention` .*; got full and prefix in"),
        ({"block_lengths": (4,)}, r"`model.block_lengths` must be .*; got \[4\] and \[\] in"),
        ({"options": {"num_layers": 3}}, "`model.options.num_layers` must be .*; got 3 and 2 in"),
        ({"preset": "base"}, r"`model.preset` \(`num_layers`\) of `base` must be .*; got 12 and 2"),
    ):
        model = dataclasses.replace(same, **changes)
        with pytest.raises(ConfigError, match=message):
            describe(dataclasses.replace(config, model=model))


def test_a_signal_ends_the_run_with_a_checkpoint(run_root):
    config = run_config(run_root, "signal", sample_every_steps=1)

    def send(state) -> None:
        if state.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    result = train(config, callbacks=[send])
    assert (result["step"], result["is_finished"]) == (3, False)
    path = latest_checkpoint(Path(config.output_dir) / "checkpoints")
    assert path is not None
    assert path.name == "step-00000003"
    assert train(config)["is_finished"]


def test_divergence_names_step_and_samples(run_root):
    config = run_config(
        run_root, "nan", sample_every_steps=1, stability=StabilityConfig(max_skipped_in_a_row=0)
    )

    def spoil(state) -> None:
        if state.step == 3:
            with torch.no_grad():
                state.model.embed_tokens.weight.fill_(float("nan"))

    with pytest.raises(DivergenceError, match=r"got nan in step 3 with the samples squares/square"):
        train(config, callbacks=[spoil])
    path = latest_checkpoint(Path(config.output_dir) / "checkpoints")
    assert path is not None
    assert path.name == "step-00000002"


def test_workers_do_not_change_the_run(run_root):
    alone, helped = run_config(run_root, "alone"), run_config(run_root, "helped")
    helped = dataclasses.replace(helped, data=dataclasses.replace(helped.data, num_workers=1))
    train(alone)
    train(helped)
    left, right = final_tensors(alone), final_tensors(helped)
    assert all(torch.equal(tensor, right[name]) for name, tensor in left.items())


def test_callbacks_see_averaged_weights_and_may_log(run_root):
    config = run_config(run_root, "callbacks", sample_every_steps=3)
    seen = []

    def callback(state) -> None:
        own = state.model.embed_tokens.weight.detach().clone()
        with state.averaged() as model:
            assert not torch.equal(model.embed_tokens.weight, own)
        assert torch.equal(state.model.embed_tokens.weight, own)
        state.log({"sample/accuracy": 0.5})
        seen.append((state.step, state.model.training, sorted(state.components)))

    train(config, callbacks=[callback])
    names = ["image_tokenizer", "processor", "scheduler", "tokenizer"]
    assert seen == [(3, False, names), (6, False, names)]
    rows = (Path(config.output_dir) / "metrics.jsonl").read_text()
    assert rows.count("sample/accuracy") == 2


def test_a_description_encodes_and_writes_nothing(run_root, tmp_path):
    config = run_config(run_root, "described")
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, cache_dir=str(tmp_path / "cache"))
    )
    values = describe(config)
    assert values["rows_per_step"] == 8
    assert 8 * 18 < values["tokens_per_step"] < 8 * 60
    assert values["num_parameters"] > 10_000
    assert values["data"]["squares"]["samples"] == 12
    assert values["data"]["squares"]["epochs"] == 4.0
    assert json.loads(json.dumps(values)) == values
    assert not (tmp_path / "cache").exists()
    assert not Path(config.output_dir).exists()


def test_the_autoregressive_baseline_trains_on_the_same_rows(run_root):
    config = run_config(run_root, "causal")
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, options={"logits_shift": 1}),
        objective=dataclasses.replace(config.objective, name="autoregressive", options={}),
        data=DataConfig(**{**dataclasses.asdict(config.data), "micro_batch_size": None}),
    )
    result = train(config)
    assert result["is_finished"]
    assert result["loss"] < 20
