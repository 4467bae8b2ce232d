"""Checkpoints: safetensors and JSON only, complete or absent, verified when read.

    checkpoints/step-00000500/
        model.safetensors  ema.safetensors  optimizer.safetensors  rng.safetensors
        state.json         step, loader position, optimizer groups, config
        manifest.json      SHA-256 of every other file

A checkpoint is written aside, synced to disk and renamed; the latest is found by looking, so there
is no pointer that could be wrong.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from multimodal_dlm.errors import CheckpointError

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
STATE = "state.json"
_PREFIX = "step-"


@dataclass(frozen=True)
class Checkpoint:
    """Everything a run needs to go on.

    Args:
        step: Optimizer steps taken.
        tensors: File stem (`model`, `ema`, `optimizer`, `rng`) -> tensors by name.
        state: JSON values.
    """

    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    state: Mapping[str, Any] = field(default_factory=dict)


def save_checkpoint(folder: Path, checkpoint: Checkpoint, *, keep_last: int) -> Path:
    """Write a checkpoint and remove the oldest beyond `keep_last`.

    Args:
        folder: Folder of all checkpoints of a run.
        checkpoint: What to write.
        keep_last: At least 1.

    Returns:
        The folder of this checkpoint.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"{_PREFIX}{checkpoint.step:08d}"
    aside = folder / f".{final.name}.part"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    for stem, tensors in checkpoint.tensors.items():
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, aside / f"{stem}.safetensors")
    state = {**checkpoint.state, "step": checkpoint.step}
    (aside / STATE).write_text(json.dumps(state, indent=2, sort_keys=True))
    hashes = {path.name: _sha256(path) for path in sorted(aside.iterdir())}
    (aside / MANIFEST).write_text(json.dumps({"sha256": hashes}, indent=2, sort_keys=True))
    for path in (*aside.iterdir(), aside):
        _sync(path)
    if final.exists():
        shutil.rmtree(final)
    aside.rename(final)
    _sync(folder)
    for old in list_checkpoints(folder)[:-keep_last]:
        shutil.rmtree(old)
    return final


def load_checkpoint(path: Path) -> Checkpoint:
    """Read and verify one checkpoint.

    Raises:
        CheckpointError: When a file is missing or its hash is not the recorded one.
    """
    verify_checkpoint(path)
    state = json.loads((path / STATE).read_text())
    tensors = {file.stem: load_file(file) for file in sorted(path.glob("*.safetensors"))}
    return Checkpoint(int(state["step"]), tensors, state)


def verify_checkpoint(path: Path) -> None:
    """Compare every file with the manifest.

    Raises:
        CheckpointError: When a file is missing, extra or changed.
    """
    if not (path / MANIFEST).is_file():
        raise CheckpointError(f"`{path}` is no checkpoint: it has no `{MANIFEST}`.")
    try:
        hashes = json.loads((path / MANIFEST).read_text())["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"`{path / MANIFEST}` cannot be read: {error!r}.") from error
    present = {file.name for file in path.iterdir()} - {MANIFEST}
    if present != set(hashes):
        different = sorted(present ^ set(hashes))
        raise CheckpointError(f"`{path}` must hold the files of its manifest; {different} differ.")
    for name, expected in hashes.items():
        if _sha256(path / name) != expected:
            raise CheckpointError(
                f"`{path / name}` changed since it was written. Delete the folder `{path.name}` to"
                " continue from the checkpoint before it."
            )


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first; unverified."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.glob(f"{_PREFIX}*") if (path / MANIFEST).is_file())


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint whose files have their recorded hashes; None without one."""
    for path in reversed(list_checkpoints(folder)):
        try:
            verify_checkpoint(path)
        except CheckpointError as error:
            logger.warning("Skipped a damaged checkpoint: %s", error)
            continue
        return path
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Ask the system to put a file or folder on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
