"""The accelerate configs: accelerate reads them, no guard refuses them, and the CPU's ones run."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env

from multimodal_dlm.training.config import TrainConfig
from multimodal_dlm.training.launching import GUARDS, resolve_sharding

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "configs/accelerate"
SHARDING = {
    "1_gpu": "none",
    "8_gpu": "none",
    "8_gpu_zero2": "zero2",
    "cpu_2_processes": "none",
    "multi_node_fsdp": "fsdp",
}


def environment_of(name: str) -> tuple[int, dict[str, str]]:
    """Processes, and what accelerate sets for each, as its launcher works them out."""
    file = str(FOLDER / f"{name}.yaml")
    arguments = ["--config_file", file, "--main_process_ip", "localhost", "-m", "multimodal_dlm"]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(arguments))
    if args.multi_gpu or args.use_fsdp:
        return args.num_processes, prepare_multi_gpu_env(args) | {"WORLD_SIZE": "several"}
    return args.num_processes, prepare_simple_launcher_cmd_env(args)[1]


def test_all_launch_files_are_known():
    assert sorted(path.stem for path in FOLDER.iterdir()) == sorted(SHARDING)


@pytest.mark.parametrize("name", SHARDING)
def test_accelerate_reads_a_launch_file(name):
    path = FOLDER / f"{name}.yaml"
    config = load_config_from_file(str(path))
    stated = yaml.safe_load(path.read_text())
    assert config.num_processes == stated["num_processes"]
    assert config.num_machines == stated["num_machines"]
    assert config.mixed_precision == "no"
    comment = path.read_text().split("compute_environment")[0]
    assert f"accelerate launch --config_file configs/accelerate/{path.name}" in comment
    assert re.search(r"-m multimodal_dlm train --config configs/\w+\.yaml", comment)


@pytest.mark.parametrize("name", SHARDING)
def test_no_guard_refuses_a_launch_file(name):
    processes, environment = environment_of(name)
    config = TrainConfig(output_dir="out", num_train_steps=1)
    for guard in GUARDS:
        guard(config, environment)
    assert resolve_sharding("auto", environment) == SHARDING[name]
    assert processes == yaml.safe_load((FOLDER / f"{name}.yaml").read_text())["num_processes"]


@pytest.mark.slow  # `cpu_2_processes` is launched in test_distributed.py.
@pytest.mark.parametrize("name", ["8_gpu_zero2"])
def test_a_launch_file_trains_with_two_processes(name, tmp_path):
    command = [
        sys.executable, "-m", "accelerate.commands.launch",
        "--config_file", str(FOLDER / f"{name}.yaml"),
        "--num_processes", "2", "--main_process_port", "0", "-m", "multimodal_dlm", "train",
        "--config", "configs/smoke.yaml", "--num_train_steps", "1", "--data.batch_size", "4",
        "--output_dir", str(tmp_path / "run"), "--data.cache_dir", str(tmp_path / "cache"),
    ]  # fmt: skip
    environment = os.environ | {
        "ACCELERATE_USE_CPU": "true",
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "run/environment.json").read_text())["num_processes"] == 2
    assert (tmp_path / "run/pipeline/model_index.json").is_file()
