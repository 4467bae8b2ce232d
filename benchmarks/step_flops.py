"""Matmul FLOPs that the first steps of training runs execute, and of each whole run from them.

Runs are equal in FLOPs when these are: every mask, clean copy, padded column and head is counted as
it is computed (`torch.utils.flop_counter`, the native kernels' by their own formulas), where
`multimodal-dlm plan` estimates.

    python benchmarks/step_flops.py configs/reasoning_block.yaml configs/reasoning_causal.yaml \\
        --data_root DATA_ROOT
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from reporting import finish
from torch.utils.flop_counter import FlopCounterMode

from multimodal_dlm.training.config import load_train_config
from multimodal_dlm.training.run import train


def count(path: Path, steps: int, data_root: Path | None) -> dict[str, Any]:
    """FLOPs of a run's first steps.

    Args:
        path: Config of the run.
        steps: Steps to count.
        data_root: Folder of the built datasets; None for the config's own.
    """
    planned = load_train_config(path).num_train_steps
    with tempfile.TemporaryDirectory() as folder:
        changes = [
            ("output_dir", folder),
            ("num_train_steps", steps),
            ("evaluation.every_steps", 0),
            *([("data.data_root", data_root)] if data_root else []),
        ]
        config = load_train_config(path, [word for k, v in changes for word in (f"--{k}", str(v))])
        with FlopCounterMode(display=False) as counter:
            train(config)
    flops = counter.get_total_flops() / steps
    return {
        "teraflops_per_step": round(flops / 1e12, 5),
        "petaflops": round(flops * planned / 1e15, 4),
        "num_train_steps": planned,
        "steps_counted": steps,
    }


def main() -> None:
    """Parse options, count, write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("configs", nargs="+", type=Path)
    parser.add_argument("--data_root", type=Path, help="folder of the built datasets")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--json", type=Path, help="file to write the report to")
    args = parser.parse_args()
    runs = {str(path): count(path, args.steps, args.data_root) for path in args.configs}
    first, *_ = runs.values()
    relative = {name: run["petaflops"] / first["petaflops"] for name, run in runs.items()}
    finish({"runs": runs, "relative": relative}, args.json)


if __name__ == "__main__":
    main()
