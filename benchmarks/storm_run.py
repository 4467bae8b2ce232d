"""The training run that `kill_storm.py` kills, in a fresh interpreter or forked from a warm one.

Importing torch and the package takes longer than a run of a few steps. A server process imports
them once and forks a process for each start: a real process with its own random states, files and
loader workers, that a signal really kills. Every n-th loss of the run is nan, so that skipped steps
are part of the storm.

    python benchmarks/storm_run.py run ARGUMENTS      train, as `multimodal-dlm train` would
    python benchmarks/storm_run.py serve              fork a run for each line of JSON on stdin
"""

import dataclasses
import json
import math
import os
import sys
from typing import Any

NAN_EVERY = 11


def train(arguments: list[str]) -> int:
    """Run the training command; its objective gives nan now and then."""
    from multimodal_dlm.cli import main
    from multimodal_dlm.training.objectives import OBJECTIVES, MaskedDiffusion

    class SometimesNan(MaskedDiffusion):
        def prepare(self, batches: Any, **options: Any) -> Any:
            self.is_broken = options["step"] % NAN_EVERY == NAN_EVERY - 1
            return super().prepare(batches, **options)

        def __call__(self, model: Any, inputs: Any, **options: Any) -> Any:
            output = super().__call__(model, inputs, **options)
            factor = math.nan if self.is_broken else 1.0
            return dataclasses.replace(output, loss=output.loss * factor)

    OBJECTIVES["masked_diffusion"] = SometimesNan
    return main(["train", *arguments])


def fork_run(arguments: list[str], environment: dict[str, str], log: str) -> int:
    """Train in a forked process; returns its id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.environ.update(environment)
        sys.argv = [__file__, "run", *arguments]
        with open(log, "ab", buffering=0) as file, open(os.devnull, "rb") as nothing:
            os.dup2(nothing.fileno(), 0)
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        code = train(arguments)
    finally:
        sys.stdout.flush()
        os._exit(code)


def exit_code(pid: int, codes: dict[int, int]) -> int | None:
    """Exit code of a forked process, negative for a signal; None while it runs."""
    if pid not in codes:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            codes[pid] = os.waitstatus_to_exitcode(status)
    return codes.get(pid)


def serve() -> None:
    """Answer requests, one JSON line each: start processes, or tell how they ended."""
    import multimodal_dlm.training.run  # noqa: F401  What every run would import.

    print(json.dumps({"is_ready": True}), flush=True)
    codes: dict[int, int] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "pids" in request:
            answer: list[Any] = [exit_code(pid, codes) for pid in request["pids"]]
        else:
            answer = [
                fork_run(request["arguments"], environment, request["log"])
                for environment in request["environments"]
            ]
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve()
    else:
        sys.exit(train(sys.argv[2:]))
