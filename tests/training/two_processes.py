"""Run by two processes at once, twice: trains the tiny run of `runs.py`, is stopped, goes on."""

import dataclasses
import os
import signal
import sys
from pathlib import Path

from multimodal_dlm.training.run import train
from tests.training.runs import run_config


def stop(state) -> None:
    """A signal to one process stops both."""
    if state.step == 3:
        os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    config = run_config(Path(sys.argv[1]), "two", num_train_steps=4, sample_every_steps=1)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, micro_batch_size=2))
    done = train(config, callbacks=[stop])
    reached = (done["step"], done["is_finished"])
    sys.exit(0 if reached == (int(sys.argv[2]), sys.argv[2] == "4") else 1)
