"""Tokens a second of a training run under glibc's allocator and under another one.

Runs of a config from its start, in turn and in processes of their own, for the allocator has to be
there when a process begins. The rate is the median over the logged steps of the last half of a run,
by when a slow-down would show. Each run writes into a temporary folder.

    python benchmarks/allocators.py --config configs/smoke.yaml --steps 300 \
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
from typing import Any

from reporting import finish

SETTINGS = "oversize_threshold:1,metadata_thp:auto,dirty_decay_ms:-1,muzzy_decay_ms:-1"


def rates(arguments: list[str], library: str | None, folder: Path) -> list[float]:
    """Tokens a second at the logged steps of one run."""
    environment = dict(os.environ)
    if library is not None:
        environment |= {"LD_PRELOAD": library, "MALLOC_CONF": SETTINGS}
    command = [sys.executable, "-m", "multimodal_dlm", "train", *arguments]
    subprocess.run(
        [*command, "--output_dir", str(folder), "--export.folder", str(folder / "pipeline")],
        env=environment,
        check=True,
        stderr=subprocess.DEVNULL,
    )
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [row["tokens_per_s"] for row in map(json.loads, lines) if "tokens_per_s" in row]


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/smoke.yaml", help="training run")
    parser.add_argument("--data_root", help="of the config's data")
    parser.add_argument("--steps", type=int, default=300, help="of each run")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each allocator")
    parser.add_argument("--library", required=True, help="the other allocator, a shared object")
    parser.add_argument("--json", type=Path, help="where the report is written as well")
    options = parser.parse_args()
    if not Path(options.library).is_file():
        parser.error(f"`--library` must be a file; there is no `{options.library}`.")
    arguments = ["--config", options.config, "--num_train_steps", str(options.steps)]
    if options.data_root is not None:
        arguments += ["--data.data_root", options.data_root]
    found: dict[str, list[Any]] = {"glibc": [], "other": []}
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
