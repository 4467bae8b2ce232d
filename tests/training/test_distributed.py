"""Two processes on the CPU train what one process trains, as copies of the model and in shards."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from multimodal_dlm.training.run import train
from tests.training.two_processes import STEPS, leave_half, two_config

ROOT = Path(__file__).parents[2]
LAUNCH_FILE = ROOT / "configs/accelerate/cpu_2_processes.yaml"
SHARED = ("fsdp", "zero2", "copies")


def read(root: Path, run: str, file: str, step: int = STEPS) -> dict[str, torch.Tensor]:
    return load_file(root / run / f"checkpoints/step-{step:08d}/{file}.safetensors")


def losses(root: Path, run: str) -> list[float]:
    rows = (root / run / "metrics.jsonl").read_text().splitlines()
    return [row["loss"] for row in map(json.loads, rows) if "loss" in row]


@pytest.fixture(scope="module")
def two_root(run_root) -> Path:
    """The folder after two processes and then one have trained the same run."""
    launchers = {
        "first": ["accelerate.commands.launch", "--config_file", str(LAUNCH_FILE)],
        "second": ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    }
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "GLOO_SOCKET_IFNAME": "lo",  # Both processes are here; other interfaces may not connect.
    }
    for part, launcher in launchers.items():
        command = [sys.executable, "-m", *launcher, "-m", "tests.training.two_processes"]
        done = subprocess.run(
            [*command, str(run_root), part],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert done.returncode == 0, done.stderr[-3000:]
    train(two_config(run_root, "one"))
    return run_root / "two"


@pytest.mark.slow
@pytest.mark.parametrize("run", SHARED)
@pytest.mark.parametrize("file", ["model", "ema", "optimizer"])
def test_two_processes_equal_one(two_root, run, file):
    one, two = read(two_root, "one", file), read(two_root, run, file)
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert torch.allclose(tensor, two[name], rtol=1e-3, atol=1e-4), name


@pytest.mark.slow
@pytest.mark.parametrize("run", SHARED)
def test_two_processes_report_what_one_reports(two_root, run):
    assert losses(two_root, run) == pytest.approx(losses(two_root, "one"), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("run", SHARED)
@pytest.mark.parametrize("prefix", ["eval/", "grad_norm/"])
def test_two_processes_evaluate_and_measure_as_one(two_root, run, prefix):
    """Held-out bounds and gradient norms by modality; the weights differ by rounding alone."""
    one, two = (
        [
            {name: value for name, value in row.items() if name.startswith(prefix)}
            for row in map(json.loads, (two_root / name / "metrics.jsonl").open())
        ]
        for name in ("one", run)
    )
    assert sum(map(len, one)) >= 4
    for left, right in zip(one, two, strict=True):
        assert right == pytest.approx(left, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["none", "fsdp"])
def test_a_step_that_one_process_cannot_compute_is_skipped_by_all(two_root, sharding):
    folder = two_root / f"skipped_{sharding}/checkpoints"
    state = json.loads((folder / f"step-{STEPS:08d}/state.json").read_text())
    assert state["stability"]["skipped"] == [1]
    assert state["ema_updates"] == STEPS - 1
    model = load_file(folder / f"step-{STEPS:08d}/model.safetensors")
    assert all(bool(tensor.isfinite().all()) for tensor in model.values())


@pytest.mark.slow
def test_blocks_that_travel_in_bf16_train_alike(two_root):
    assert losses(two_root, "fsdp_bf16") == pytest.approx(losses(two_root, "one"), rel=0.02)
    assert losses(two_root, "fsdp_bf16") != pytest.approx(losses(two_root, "one"), rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("file", ["model", "ema", "optimizer"])
def test_shards_resume_bit_for_bit(two_root, file):
    straight, resumed = read(two_root, "fsdp", file), read(two_root, "resumed", file)
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in straight.items())


@pytest.mark.slow
def test_each_process_goes_on_with_the_critic_it_had(two_root):
    straight, resumed = (read(two_root, run, "objective") for run in ("critics", "critics_resumed"))
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in straight.items())
    weights = [name for name in straight if name.startswith("0.critic.") and "weight" in name]
    assert weights
    for name in weights:  # Each has learned from its own rows.
        assert not torch.equal(straight[name], straight[f"1.{name.removeprefix('0.')}"]), name
    left, right = (read(two_root, run, "model") for run in ("critics", "critics_resumed"))
    assert all(torch.equal(tensor, right[name]) for name, tensor in left.items())


@pytest.mark.slow
def test_one_process_goes_on_with_a_checkpoint_of_shards(run_root, two_root):
    leave_half(two_root / "fsdp", two_root / "alone")
    train(two_config(run_root, "alone"))
    one, two = read(two_root, "one", "model"), read(two_root, "alone", "model")
    assert all(torch.allclose(one[name], two[name], rtol=1e-3, atol=1e-4) for name in one)
