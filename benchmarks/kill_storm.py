"""Kill a training run again and again, and compare it with one that was left alone.

A tiny backbone trains on the committed sample with a checkpoint after every step, an evaluation
after every fourth, the best step kept, and a loss that is nan in every eleventh. It is killed with
SIGKILL, which nothing can catch: some time after its start, some time after a checkpoint, as soon
as a checkpoint is being written, or in its loader worker alone. The same run then starts again,
until it finishes. What is left must be that of the undisturbed run, bit for bit: every file of the
last and the best checkpoints (weights, averages, optimizer, random states, loader position,
statistics) and every row of the metrics but its times. A round that finishes before all kills are
done is followed by another.

The undisturbed run and every start that is killed at a random instant are fresh interpreters; the
others are forked from a process that has imported the package (`storm_run.py`).

    OMP_NUM_THREADS=1 python benchmarks/kill_storm.py --kills 100 --json out/kill_storm.json
"""

import argparse
import hashlib
import json
import os
import random
import socket
import subprocess
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
RUN = Path(__file__).with_name("storm_run.py")
LOCAL = {"ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": "lo"}
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
        final_hash: SHA-256 of everything that is compared.
    """

    kills: dict[str, int] = field(default_factory=dict)
    inside_save: int = 0
    differences: dict[int, list[str]] = field(default_factory=dict)
    rounds: list[int] = field(default_factory=list)
    final_hash: str = ""

    @property
    def num_kills(self) -> int:
        """All kills."""
        return sum(self.kills.values())

    @property
    def num_identical(self) -> int:
        """Kills of the rounds that ended as the undisturbed run did."""
        return sum(k for i, k in enumerate(self.rounds) if i not in self.differences)


class Server:
    """A process that has imported everything and forks runs, see `storm_run.py`."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(RUN), "serve"], cwd=ROOT, env=os.environ | LOCAL,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._read()

    def ask(self, **request: Any) -> Any:
        """Send one request and return the answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._read()

    def _read(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("The server of warm starts has ended.")
        return json.loads(line)

    def close(self) -> None:
        """End it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


class Started:
    """The processes of a run that was started: forked ones, or a launcher with what is below it.

    Args:
        processes: Main processes.
        server: Forked them; None when they are children of this process.
    """

    def __init__(self, processes: list[Any], server: Server | None) -> None:
        self.processes, self.server = processes, server

    def poll(self) -> int | None:
        """Exit code once all have ended; as under torchrun, one that fails ends the others."""
        if self.server is None:
            return self.processes[0].poll()
        codes = self.server.ask(pids=[process.pid for process in self.processes])
        if any(codes) and None in codes:
            for process, code in zip(self.processes, codes, strict=True):
                if code is None:
                    _kill(process)
        return None if None in codes else next((code for code in codes if code), 0)

    def wait(self) -> int:
        """Exit code, when all have ended."""
        while (code := self.poll()) is None:
            time.sleep(0.005)
        return code

    def kill(self, *, only_workers: bool = False) -> bool:
        """Kill all processes, or the loader workers alone; false without any to kill."""
        found = []
        for process in self.processes:
            try:
                below = process.children(recursive=True)
            except psutil.NoSuchProcess:
                continue
            workers = [child for child in below if _is_worker(child)]
            found += workers if only_workers else [*below, process]
        return sum([_kill(process) for process in found]) > 0


class Run:
    """One training run in a folder, started as often as it is killed.

    Args:
        folder: Output folder; pre-tokenized rows lie beside it.
        num_train_steps: Steps.
        num_processes: Processes that train together.
        server: Gives warm starts.
    """

    def __init__(
        self, folder: Path, num_train_steps: int, num_processes: int, server: Server
    ) -> None:
        self.folder, self.num_processes, self.server = folder, num_processes, server
        self.arguments = [
            "--config", "configs/smoke.yaml",
            "--output_dir", str(folder), "--data.cache_dir", str(folder.parent / "cache"),
            "--num_train_steps", str(num_train_steps), "--checkpoint.every_steps", "1",
            "--data.num_workers", "1", "--data.batch_size", "8", "--log_every_steps", "3",
            "--grad_norms_every_steps", "5", "--evaluation.every_steps", "4",
            "--evaluation.num_rows", "8", "--evaluation.num_levels", "2",
        ]  # fmt: skip

    def start(self, *, is_cold: bool = False) -> Started:
        """Start, or go on: in a fresh interpreter, or forked from a warm one."""
        if is_cold:
            launcher = [sys.executable]
            if self.num_processes > 1:
                launcher += ["-m", "torch.distributed.run", "--standalone"]
                launcher += ["--nproc_per_node", str(self.num_processes)]
            with self.log.open("ab") as log:
                command = [*launcher, str(RUN), "run", *self.arguments]
                process = psutil.Popen(
                    command, cwd=ROOT, env=os.environ | LOCAL, stdout=log, stderr=log
                )
            return Started([process], None)
        environments = [{}] if self.num_processes == 1 else _ranks(self.num_processes)
        pids = self.server.ask(
            arguments=self.arguments, environments=environments, log=str(self.log)
        )
        return Started([psutil.Process(pid) for pid in pids], self.server)

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
        """Hashes of all files of every kept checkpoint, and the metrics without times.

        Kept are the last ones and the best. The hash of a state leaves out the output folder, which
        differs between runs.
        """
        found: dict[str, Any] = {}
        for name in sorted(self.checkpoints()):
            for path in sorted((self.folder / "checkpoints" / name).glob("*.safetensors")):
                found[f"{name}/{path.name}"] = hashlib.sha256(path.read_bytes()).hexdigest()
            state = json.loads((self.folder / "checkpoints" / name / "state.json").read_text())
            del state["config"]["output_dir"]
            found[f"{name}/state.json"] = state
        for path in sorted(self.folder.glob("*.jsonl")):  # Metrics, and the ledger of samples.
            rows = [json.loads(row) for row in path.read_text().splitlines()]
            found[path.name] = [{k: v for k, v in row.items() if k not in TIMES} for row in rows]
        return found


def _ranks(count: int) -> list[dict[str, str]]:
    """What torchrun would set for each process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


def _kill(process: Any) -> bool:
    try:
        process.kill()
    except psutil.NoSuchProcess:
        return False
    return True


def _is_worker(process: psutil.Process) -> bool:
    """A loader worker is forked: it runs its parent's command, and has nothing below it."""
    try:
        parent = process.parent()
        is_forked = parent is not None and parent.cmdline() == process.cmdline()
        return is_forked and not process.children()
    except psutil.NoSuchProcess:
        return False


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
    process = run.start(is_cold=kind == "start")
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
    is_killed = process.poll() is None and process.kill(only_workers=kind == "worker")
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
    server = Server()
    calm = Run(folder / "calm", num_train_steps, processes, server)
    began = time.monotonic()
    code = calm.start(is_cold=True).wait()
    if code:
        raise RuntimeError(f"The undisturbed run ended with {code}:\n{_tail(calm.log)}")
    start_s = min(8.0, time.monotonic() - began)
    expected = calm.outcome()
    draw, tally = random.Random(seed), Tally()
    while tally.num_kills < kills:
        number = len(tally.rounds)
        run = Run(folder / f"round-{number}", num_train_steps, processes, server)
        first = tally.num_kills
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
    server.close()
    tally.final_hash = hashlib.sha256(json.dumps(expected, sort_keys=True).encode()).hexdigest()
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
    began = time.monotonic()
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
        "final_hash": tally.final_hash,
        "seconds": round(time.monotonic() - began),
        "settings": {"steps": args.steps, "processes": args.processes, "seed": args.seed},
    }
    finish(report, args.json)
    if tally.num_identical != tally.num_kills:
        sys.exit(1)


if __name__ == "__main__":
    main()
