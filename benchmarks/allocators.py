"""Tokens a second of a training run under glibc's allocator and under another, such as jemalloc.

Runs of a config from its start, in turn and in processes of their own, for an allocator has to be
there when a process begins. The rate is the median over the logged steps of the last half of a run.
Slow-downs take minutes to show: let `--steps` last that long. Each run writes into a temporary
folder. jemalloc is told to keep what is freed, as the trainer tells glibc.

    python benchmarks/allocators.py --config configs/released.yaml --data_root data --steps 300 \
        --library /usr/lib/x86_64-linux-gnu/libjemalloc.so.2 --json out/allocators.json
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from reporting import finish

SETTINGS = "oversize_threshold:1,metadata_thp:auto,dirty_decay_ms:-1,muzzy_decay_ms:-1"


def rates(arguments: list[str], library: str | None, folder: Path) -> list[float]:
    """Tokens a second at the logged steps of one run."""
    environment = {k: v for k, v in os.environ.items() if k not in ("LD_PRELOAD", "MALLOC_CONF")}
    if library is not None:
        environment |= {"LD_PRELOAD": library, "MALLOC_CONF": SETTINGS}
    command = [sys.executable, "-m", "multimodal_dlm", "train", *arguments]
    command += ["--output_dir", str(folder), "--export.folder", str(folder / "pipeline")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    refused = [line for line in done.stderr.splitlines() if "cannot be preloaded" in line]
    if done.returncode or refused:
        raise SystemExit("\n".join(refused[:1]) or done.stderr)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [row["tokens_per_s"] for row in map(json.loads, lines) if "tokens_per_s" in row]


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/smoke.yaml", help="training run")
    parser.add_argument("--data_root", help="of the config's data")
    parser.add_argument("--steps", type=int, default=300, help="of each run, at least 2")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each allocator")
    parser.add_argument("--library", required=True, help="the other allocator, a shared object")
    parser.add_argument("--json", type=Path, help="where the report is written as well")
    options = parser.parse_args()
    if not Path(options.library).is_file():
        parser.error(f"`--library` must be a file; there is no `{options.library}`.")
    arguments = ["--config", options.config, "--num_train_steps", str(options.steps)]
    arguments += ["--log_every_steps", str(max(1, options.steps // 16))]
    if options.data_root is not None:
        arguments += ["--data.data_root", options.data_root]
    found: dict[str, list[float]] = {"glibc": [], "other": []}
    for _ in range(options.rounds):
        for name, library in (("glibc", None), ("other", options.library)):
            with tempfile.TemporaryDirectory() as folder:
                logged = rates(arguments, library, Path(folder))
            found[name].append(statistics.median(logged[len(logged) // 2 :]))
            print(f"{name}: {found[name][-1]:,.0f} tokens a second", file=sys.stderr, flush=True)
    medians = {name: statistics.median(values) for name, values in found.items()}
    finish(
        {
            "config": {
                "config": options.config,
                "steps": options.steps,
                "rounds": options.rounds,
                "library": Path(options.library).name,
                "settings": SETTINGS,
            },
            "tokens_per_second": {k: [round(v) for v in values] for k, values in found.items()},
            "ratio": round(medians["other"] / medians["glibc"], 3),
        },
        options.json,
    )


if __name__ == "__main__":
    main()
