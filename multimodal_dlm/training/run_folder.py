"""What a run folder records before the first step: config, environment, commit, data and seeds."""

import json
from pathlib import Path

import yaml

from multimodal_dlm.datasets.manifest import Manifest
from multimodal_dlm.environment import environment
from multimodal_dlm.training.config import TrainConfig

CONFIG_FILE = "config.yaml"
ENVIRONMENT_FILE = "environment.json"


def write_run_folder(config: TrainConfig, manifest: Manifest, *, num_processes: int) -> None:
    """Write `config.yaml` and `environment.json`.

    Args:
        config: Resolved config.
        manifest: Data of the run.
        num_processes: Processes that train together.
    """
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_FILE).write_text(yaml.safe_dump(config.to_dict(), sort_keys=False))
    values = environment() | {
        "num_processes": num_processes,
        "seed": config.seed,
        "manifest": {"name": manifest.name, "fingerprint": manifest.fingerprint},
    }
    (folder / ENVIRONMENT_FILE).write_text(json.dumps(values, indent=2))
