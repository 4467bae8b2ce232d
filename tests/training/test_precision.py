"""`mixed_precision: auto` in runs: resolved once, recorded, and kept by a run that goes on."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import yaml

from multimodal_dlm import precision
from multimodal_dlm.errors import CheckpointError, ConfigError
from multimodal_dlm.training import launching
from multimodal_dlm.training.config import TrainConfig
from multimodal_dlm.training.devices import get_device
from multimodal_dlm.training.launching import check_precision, run_device, run_precision
from multimodal_dlm.training.planning import plan
from multimodal_dlm.training.run import describe, train
from tests.training.runs import final_tensors, run_config

PLAIN = "no (auto: this CPU has no bf16 instructions)"
AMX = {"amx_bf16": True}


class Stop(Exception):
    """Ends a run as a crash would."""


def crash(state) -> None:
    if state.step == 3:
        raise Stop


@pytest.fixture
def cpu(monkeypatch):
    """Give the CPU other instructions, as far as the rule can see."""

    def change(capabilities: dict) -> None:
        monkeypatch.setattr(precision, "cpu_capabilities", lambda: capabilities)
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)

    monkeypatch.setattr(launching, "run_device", lambda *_: torch.device("cpu"))
    monkeypatch.setattr("multimodal_dlm.training.run.run_device", lambda: torch.device("cpu"))
    change({})
    return change


def log(config: TrainConfig) -> str:
    return (Path(config.output_dir) / "train.log").read_text()


def same(left: TrainConfig, right: TrainConfig) -> bool:
    one, other = final_tensors(left), final_tensors(right)
    assert one.keys() == other.keys()
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def broken_off(config: TrainConfig) -> TrainConfig:
    """The run, stopped after step 3 of 4 with step 2 saved."""
    config = dataclasses.replace(config, sample_every_steps=1)
    with pytest.raises(Stop):
        train(config, callbacks=[crash])
    return config


def short(root: Path, name: str, mixed_precision: str) -> TrainConfig:
    return run_config(root, name, num_train_steps=4, mixed_precision=mixed_precision)


def test_auto_is_resolved_once_and_recorded(run_root, cpu):
    assert TrainConfig("out", 1).mixed_precision == "auto"
    own, stated = short(run_root, "auto", "auto"), short(run_root, "stated", "no")
    described = describe(own)
    assert described["mixed_precision"] == PLAIN
    assert described["config"]["mixed_precision"] == "no"
    train(own)
    train(stated)
    assert same(own, stated)
    assert log(own).count(f"mixed precision: {PLAIN}") == 1
    assert "mixed precision: no\n" in log(stated)
    folder = Path(own.output_dir)
    assert yaml.safe_load((folder / "config.yaml").read_text())["mixed_precision"] == "no"
    state = json.loads((folder / "checkpoints/step-00000004/state.json").read_text())
    assert state["config"]["mixed_precision"] == "no"


@pytest.mark.parametrize(
    ("value", "first", "then"), [("no", {}, AMX), ("bf16", AMX, {})], ids=["gains", "loses"]
)
def test_a_run_that_goes_on_elsewhere_keeps_its_precision(run_root, cpu, value, first, then):
    cpu(first)
    straight = short(run_root, f"kept_{value}_straight", "auto")
    train(straight)
    config = broken_off(short(run_root, f"kept_{value}", "auto"))
    cpu(then)
    assert describe(config)["mixed_precision"].startswith(f"{value} (auto: as the run began; ")
    train(config)
    assert same(straight, config)
    assert f"mixed precision: {value} (auto: as the run began; this CPU has " in log(config)
    slow = "bf16 is computed in software, many times slower than float32"
    assert (slow in log(config)) == (value == "bf16")
    assert slow not in log(straight)
    fresh = dataclasses.replace(config, output_dir=str(run_root / "fresh"))
    assert run_precision(fresh, torch.device("cpu")).value == {"no": "bf16", "bf16": "no"}[value]


def test_another_stated_precision_does_not_continue_a_run(run_root, cpu):
    config = broken_off(short(run_root, "restated", "auto"))
    with pytest.raises(CheckpointError, match="`mixed_precision` no -> bf16"):
        train(dataclasses.replace(config, mixed_precision="bf16"))
    changed = dataclasses.replace(config, mixed_precision="bf16", allow_changes=True)
    assert train(changed)["is_finished"]
    assert "Going on with another config: `mixed_precision` no -> bf16." in log(changed)
    assert "Set `mixed_precision` to `no`, and `allow_changes` if the run has" in log(changed)
    assert run_precision(config, torch.device("cpu")).value == "bf16"


def test_one_slow_process_decides_for_all(run_root, cpu, monkeypatch):
    cpu(AMX)
    monkeypatch.setattr(launching, "gather_object", lambda own: [*own, "no"])
    config = short(run_root, "several", "auto")
    train(config)
    reason = "auto: bf16 is not fast on the device of every process"
    assert f"mixed precision: no ({reason})" in log(config)


def test_a_launch_file_is_compared_with_what_was_resolved(tmp_path, cpu):
    launched = {"ACCELERATE_MIXED_PRECISION": "bf16"}
    config = TrainConfig(str(tmp_path), 1)
    with pytest.raises(ConfigError, match=r"got `no` \(auto: this CPU .*\) there and `bf16`"):
        check_precision(config, launched)
    cpu(AMX)
    check_precision(config, launched)
    check_precision(config, {"ACCELERATE_MIXED_PRECISION": "no"})


def test_a_launcher_that_asks_for_the_cpu_gets_it():
    assert run_device({"ACCELERATE_USE_CPU": "true"}) == torch.device("cpu")
    if not torch.accelerator.is_available():
        assert run_device({}) == torch.device("cpu")


@pytest.mark.parametrize(("kind", "expected"), [("mps", "cpu"), ("xpu", "xpu")])
def test_a_device_without_float64_is_not_trained_on(kind, expected, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(kind))
    assert run_device({}).type == expected


def test_a_plan_is_made_for_the_device_that_it_names(run_root, cpu):
    config = short(run_root, "planned", "auto")
    for device, capabilities, expected in (
        ("h100", {}, ("bf16", "auto: h100 has bf16 units")),
        ("cpu", {}, ("no", "auto: this CPU has no bf16 instructions")),
        ("cpu", AMX, ("bf16", "auto: this CPU has AMX")),
    ):
        cpu(capabilities)
        values = plan(config, get_device(device), 1).values
        assert (values["mixed_precision"], values["mixed_precision_reason"]) == expected
        stated = dataclasses.replace(config, mixed_precision=expected[0])
        other = plan(stated, get_device(device), 1).values
        assert other["mixed_precision_reason"] == ""
        for name in ("memory_gib", "step_s"):
            assert values[name] == other[name]
