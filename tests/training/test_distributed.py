"""Two processes on the CPU train what one process trains."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from multimodal_dlm.training.run import train
from tests.training.runs import run_config

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_two_processes_equal_one(run_root):
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
        "-m", "tests.training.two_processes", str(run_root),
    ]  # fmt: skip
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "GLOO_SOCKET_IFNAME": "lo",  # Both processes are here; other interfaces may not connect.
    }
    for last_step in ("3", "4"):  # Stopped by a signal after 3, then finished.
        done = subprocess.run(
            [*command, last_step],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-3000:]
    train(run_config(run_root, "one", num_train_steps=4))
    one, two = (
        load_file(run_root / name / "checkpoints/step-00000004/model.safetensors")
        for name in ("one", "two")
    )
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert torch.allclose(tensor, two[name], rtol=1e-3, atol=1e-4), name
