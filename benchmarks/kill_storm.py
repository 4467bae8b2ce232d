"""Kill a training run again and again, and compare it with one that was left alone.

A tiny backbone trains on the committed sample with a checkpoint after every step. It is killed with
SIGKILL, which nothing can catch: some time after its start, some time after a checkpoint, as soon
as a checkpoint is being written, or in its loader worker alone. The same command then runs again,
until it finishes. What is left must be that of the undisturbed run, bit for bit: every file of the
last checkpoint (weights, averages, optimizer, random states, loader position) and every row of the
metrics but its times. A round that finishes before all kills are done is followed by another.

    OMP_NUM_THREADS=1 python benchmarks/kill_storm.py --kills 100 --json out/kill_storm.json
"""

import argparse
import hashlib
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from reporting import finish

ROOT = Path(__file__).resolve().parents[1]
TIMES = ("tokens_per_s", "elapsed_s", "eta_s")
KINDS = ("save", "start", "progress", "save", "progress", "worker")
POLL_S = 0.0005


@dataclass
class Tally:
    """What the storm did.

    Args:
        kills: Kills by what was aimed at.
        inside_save: Kills that left a checkpoint half written.
        differences: What differed at the end of a round, by round.
        rounds: Rounds finished, with the number of their kills.
    """

    kills: dict[str, int] = field(default_factory=dict)
    inside_save: int = 0
    differences: dict[int, list[str]] = field(default_factory=dict)
    rounds: list[int] = field(default_factory=list)

    @property
    def num_kills(self) -> int:
        """All kills."""
        return sum(self.kills.values())

    @property
    def num_identical(self) -> int:
        """Kills of the rounds that ended as the undisturbed run did."""
        return sum(k for i, k in enumerate(self.rounds) if i not in self.differences)


class Run:
    """One training run in a folder, started as often as it is killed.

    Args:
        folder: Output folder; the cache of codes lies beside it.
        num_train_steps: Steps.
        num_processes: Processes that train together.
    """

    def __init__(self, folder: Path, num_train_steps: int, num_processes: int) -> None:
        self.folder = folder
        launcher = [sys.executable, "-m"]
        if num_processes > 1:
            launcher += ["torch.distributed.run", "--standalone"]
            launcher += ["--nproc_per_node", str(num_processes), "-m"]
        self.command = [
            *launcher, "multimodal_dlm", "train", "--config", "configs/smoke.yaml",
            "--output_dir", str(folder), "--data.cache_dir", str(folder.parent / "cache"),
            "--num_train_steps", str(num_train_steps), "--checkpoint.every_steps", "1",
            "--data.num_workers", "1", "--data.batch_size", "8", "--log_every_steps", "3",
        ]  # fmt: skip

    def start(self) -> Any:
        """Start, or go on."""
        local = {"ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": "lo"}
        with self.log.open("ab") as log:
            return psutil.Popen(
                self.command, cwd=ROOT, env=os.environ | local, stdout=log, stderr=log
            )

    @property
    def log(self) -> Path:
        """What the processes printed."""
        return self.folder.with_suffix(".log")

    def checkpoints(self) -> set[str]:
        """Names of the checkpoints."""
        return {path.name for path in self.folder.glob("checkpoints/step-*")}

    def unfinished(self) -> set[tuple[str, int]]:
        """Half written or half removed checkpoints, told apart by when they last changed."""
        found = set()
        for path in self.folder.glob("checkpoints/.step-*"):
            try:
                found.add((path.name, path.stat().st_ctime_ns))
            except FileNotFoundError:
                continue
        return found

    def outcome(self) -> dict[str, Any]:
        """Hashes of the last checkpoint's files, its state, and the metrics without times."""
        last = self.folder / "checkpoints" / max(self.checkpoints())
        files = {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(last.glob("*.safetensors"))
        }
        state = json.loads((last / "state.json").read_text())
        del state["config"]["output_dir"]
        rows = [json.loads(row) for row in (self.folder / "metrics.jsonl").read_text().splitlines()]
        metrics = [{k: v for k, v in row.items() if k not in TIMES} for row in rows]
        return {**files, "state.json": state, "metrics.jsonl": metrics}


def kill(process: Any, *, only_workers: bool = False) -> bool:
    """Kill a run, or its loader workers alone; false when there was nothing to kill."""
    try:
        below = process.children(recursive=True)
        if only_workers:
            below = [child for child in below if not child.children() and _is_worker(child)]
            if not below:
                return False
        for victim in [*below, *([] if only_workers else [process])]:
            victim.kill()
    except psutil.NoSuchProcess:
        return False
    return True


def _is_worker(process: psutil.Process) -> bool:
    """A forked loader worker runs its parent's command."""
    parent = process.parent()
    return parent is not None and parent.cmdline() == process.cmdline()


def strike(run: Run, kind: str, draw: random.Random, start_s: float, tally: Tally) -> bool:
    """Start a run and kill it once.

    Args:
        run: The run.
        kind: One of `KINDS`.
        draw: Chooses the instant.
        start_s: About how long a start takes.
        tally: Gets the kill.

    Returns:
        Whether the run finished.

    Raises:
        RuntimeError: When the run ends in an error of its own.
    """
    before, left = run.checkpoints(), run.unfinished()
    process = run.start()
    began = time.monotonic()
    delay = draw.uniform(0, start_s) if kind == "start" else draw.uniform(0, 0.6)

    def saved() -> bool:
        return run.checkpoints() != before

    def saving() -> bool:
        return bool(run.unfinished() - left)

    conditions: dict[str, Callable[[], bool]] = {
        "start": lambda: True, "progress": saved, "worker": saved, "save": saving
    }  # fmt: skip
    while process.poll() is None and not conditions[kind]():
        time.sleep(POLL_S)
    if kind == "save":
        delay = draw.uniform(0, 0.02)
    time.sleep(delay)
    is_killed = process.poll() is None and kill(process, only_workers=kind == "worker")
    code = process.wait()
    if not is_killed:
        if code:
            raise RuntimeError(f"The run ended with {code}; see {run.log}:\n{_tail(run.log)}")
        return True
    if kind == "worker" and code == 0:
        return True  # The last batch was already there.
    tally.kills[kind] = tally.kills.get(kind, 0) + 1
    is_inside = bool(run.unfinished() - left)
    tally.inside_save += is_inside
    seconds = time.monotonic() - began
    note = ", inside a save" if is_inside else ""
    newest = max(run.checkpoints(), default="nothing")
    print(
        f"kill {tally.num_kills}: {kind} after {seconds:.1f} s at {newest}{note}", file=sys.stderr
    )
    return False


def storm(folder: Path, *, kills: int, num_train_steps: int, processes: int, seed: int) -> Tally:
    """Kill until `kills` are done, finish, and compare every round with an undisturbed run.

    Args:
        folder: Empty folder.
        kills: Kills at least.
        num_train_steps: Steps of a round.
        processes: Processes that train together.
        seed: Of the instants.
    """
    calm = Run(folder / "calm", num_train_steps, processes)
    began = time.monotonic()
    code = calm.start().wait()
    if code:
        raise RuntimeError(f"The undisturbed run ended with {code}:\n{_tail(calm.log)}")
    start_s = min(8.0, time.monotonic() - began)
    expected = calm.outcome()
    draw, tally = random.Random(seed), Tally()
    while tally.num_kills < kills:
        number = len(tally.rounds)
        run, first = Run(folder / f"round-{number}", num_train_steps, processes), tally.num_kills
        is_finished = False
        while not is_finished and tally.num_kills < kills:
            kind = KINDS[tally.num_kills % len(KINDS)]
            is_finished = strike(run, kind, draw, start_s, tally)
        if not is_finished and run.start().wait():
            raise RuntimeError(f"The run could not go on:\n{_tail(run.log)}")
        found = run.outcome()
        wrong = [name for name in expected if expected[name] != found.get(name)]
        if wrong or set(found) != set(expected):
            tally.differences[number] = wrong
        tally.rounds.append(tally.num_kills - first)
        print(f"round {number}: {'differs in ' + ', '.join(wrong) if wrong else 'identical'}",
              file=sys.stderr)  # fmt: skip
    return tally


def _tail(path: Path) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-20:])


def main() -> None:
    """Parse options, storm, write the report; exit status 1 on any difference."""
    parser = argparse.ArgumentParser(description="Kill a training run again and again.")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=60, help="steps of a round")
    parser.add_argument("--processes", type=int, default=1, help="processes that train together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file to write the report to")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tally = storm(
            Path(folder),
            kills=args.kills,
            num_train_steps=args.steps,
            processes=args.processes,
            seed=args.seed,
        )
    report = {
        "kills": tally.num_kills,
        "identical": tally.num_identical,
        "inside_save": tally.inside_save,
        "kills_by_aim": tally.kills,
        "rounds": tally.rounds,
        "differences": tally.differences,
        "settings": {"steps": args.steps, "processes": args.processes, "seed": args.seed},
    }
    finish(report, args.json)
    if tally.num_identical != tally.num_kills:
        sys.exit(1)


if __name__ == "__main__":
    main()
