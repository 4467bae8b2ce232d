"""Run by two processes at once: trains the tiny run of `runs.py` in the folder given."""

import dataclasses
import sys
from pathlib import Path

from multimodal_dlm.training.run import train
from tests.training.runs import run_config

if __name__ == "__main__":
    config = run_config(Path(sys.argv[1]), "two", num_train_steps=4)
    train(dataclasses.replace(config, data=dataclasses.replace(config.data, micro_batch_size=2)))
