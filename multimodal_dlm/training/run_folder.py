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
    """Write `config.yaml` and `environment.json`, each whole or not at all.

    Args:
        config: Resolved config.
        manifest: Data of the run.
        num_processes: Processes that train together.
    """
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / CONFIG_FILE, yaml.safe_dump(config.to_dict(), sort_keys=False))
    values = environment() | {
        "num_processes": num_processes,
        "seed": config.seed,
        "manifest": {"name": manifest.name, "fingerprint": manifest.fingerprint},
    }
    _write(folder / ENVIRONMENT_FILE, json.dumps(values, indent=2))


def _write(path: Path, text: str) -> None:
    """Write a file aside, then rename it."""
    aside = path.with_name(f".{path.name}.part")
    aside.write_text(text)
    aside.replace(path)
