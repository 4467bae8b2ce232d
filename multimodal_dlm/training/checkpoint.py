"""Checkpoints: safetensors and JSON only, complete or absent, verified when read.

    checkpoints/step-00000500/
        model.safetensors  ema.safetensors  optimizer.safetensors  rng.safetensors
        objective.safetensors   what the objective has learned itself, where it has
        state.json         step, loader position, optimizer groups, config
        manifest.json      SHA-256 of every other file

A checkpoint is written aside, synced to disk and renamed; the latest is found by looking, so there
is no pointer that could be wrong. Which step was best so far is part of each checkpoint's state, so
`latest`, `best` and what is kept change with one rename. The tests enumerate what a power cut can
leave.
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
        tensors: File stem (`model`, `ema`, `optimizer`, `rng`, `objective`) -> tensors by name.
        state: JSON values.
    """

    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    state: Mapping[str, Any] = field(default_factory=dict)


class Disk:
    """The file operations of a save, one by one, so that a test can stop between any two."""

    def make_folder(self, path: Path) -> None:
        """Create a folder and those above it."""
        path.mkdir(parents=True, exist_ok=True)

    def write_tensors(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        """Write a safetensors file."""
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)

    def write_text(self, path: Path, text: str) -> None:
        """Write a text file."""
        path.write_text(text)

    def sync(self, path: Path) -> None:
        """Ask the system to put a file's content, or a folder's entries, on disk."""
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def rename(self, old: Path, new: Path) -> None:
        """Rename inside one folder."""
        old.rename(new)

    def unlink(self, path: Path) -> None:
        """Remove a file."""
        path.unlink()

    def remove_folder(self, path: Path) -> None:
        """Remove an empty folder."""
        path.rmdir()


def save_checkpoint(
    folder: Path, checkpoint: Checkpoint, *, keep_last: int, disk: Disk | None = None
) -> Path:
    """Write a checkpoint, then remove the oldest beyond `keep_last`, but never the best.

    Wherever it is cut off, the newest intact checkpoint is the one before or this one, and the best
    that it names is there. An intact checkpoint of the same step stays as it is: a run that goes on
    would write the same.

    Args:
        folder: Folder of all checkpoints of a run.
        checkpoint: What to write; `state["best"]["step"]`, where given, is kept besides.
        keep_last: At least 1.
        disk: Does the file operations.

    Returns:
        The folder of this checkpoint.

    Raises:
        CheckpointError: When the disk refuses; the checkpoints before are whole.
    """
    disk = disk or Disk()
    final = _path(folder, checkpoint.step)
    aside = folder / f".{final.name}.part"
    if final.exists() and _is_intact(final):
        return final
    try:
        if not folder.is_dir():
            disk.make_folder(folder)
            disk.sync(folder.parent)
        for left in sorted(folder.glob(f".{_PREFIX}*")):
            _remove(left, disk)
        _write(aside, checkpoint, disk)
        if final.exists():
            disk.rename(final, _gone(final))
        disk.rename(aside, final)
        disk.sync(folder)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise CheckpointError(
            f"`{final}` must be written whole; the disk refused: {error}. The checkpoints before it"
            " are intact: free some space or repair the disk, and run the same command again."
        ) from error
    try:
        _prune(folder, final, keep_last, _best_step(checkpoint.state), disk)
    except OSError as error:
        logger.warning("Old checkpoints in %s could not be removed: %s", folder, error)
    return final


def _write(aside: Path, checkpoint: Checkpoint, disk: Disk) -> None:
    """All files of a checkpoint, their hashes last, on disk when this returns."""
    disk.make_folder(aside)
    for stem, tensors in checkpoint.tensors.items():
        disk.write_tensors(aside / f"{stem}.safetensors", tensors)
    state = {**checkpoint.state, "step": checkpoint.step}
    disk.write_text(aside / STATE, json.dumps(state, indent=2, sort_keys=True))
    hashes = {path.name: _sha256(path) for path in sorted(aside.iterdir())}
    disk.write_text(aside / MANIFEST, json.dumps({"sha256": hashes}, indent=2, sort_keys=True))
    for path in (*sorted(aside.iterdir()), aside):
        disk.sync(path)


def _prune(folder: Path, final: Path, keep_last: int, best: int | None, disk: Disk) -> None:
    """Remove all but the newest `keep_last` up to `final` and the best.

    What is newer was passed over: damaged. Renamed first, so that no half removed folder looks like
    a checkpoint.
    """
    complete = list_checkpoints(folder)
    kept = [path for path in complete if path.name <= final.name][-keep_last:]
    if best is not None:
        kept.append(_path(folder, best))
    for path in complete:
        if path not in kept:
            disk.rename(path, _gone(path))
            _remove(_gone(path), disk)
    if _gone(final).exists():
        _remove(_gone(final), disk)


def _path(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return folder / f"{_PREFIX}{step:08d}"


def _best_step(state: Mapping[str, Any]) -> int | None:
    """The best step so far, as a checkpoint's state names it; None without one."""
    best = state.get("best") or {}
    return best.get("step")


def _gone(path: Path) -> Path:
    """The name of a checkpoint that is being removed."""
    return path.with_name(f".{path.name}.old")


def _remove(folder: Path, disk: Disk) -> None:
    """Remove a folder of files."""
    for path in sorted(folder.iterdir()):
        disk.unlink(path)
    disk.remove_folder(folder)


def load_checkpoint(path: Path) -> Checkpoint:
    """Read and verify one checkpoint.

    Raises:
        CheckpointError: When a file is missing or its hash is not the recorded one.
    """
    verify_checkpoint(path)
    state = load_state(path)
    tensors = {file.stem: load_file(file) for file in sorted(path.glob("*.safetensors"))}
    return Checkpoint(int(state["step"]), tensors, state)


def load_state(path: Path) -> dict[str, Any]:
    """The JSON values of a checkpoint, unverified."""
    return json.loads((path / STATE).read_text())


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
    return next((path for path in reversed(list_checkpoints(folder)) if _is_intact(path)), None)


def best_checkpoint(folder: Path) -> Path | None:
    """The best checkpoint that the newest intact one names; None without one.

    Should the newest be damaged, what the one before it names counts.
    """
    for path in reversed(list_checkpoints(folder)):
        if _is_intact(path):
            step = _best_step(load_state(path))
            if step is not None and _is_intact(_path(folder, step)):
                return _path(folder, step)
    return None


def _is_intact(path: Path) -> bool:
    """Whether a checkpoint verifies; a warning says why not."""
    try:
        verify_checkpoint(path)
    except CheckpointError as error:
        logger.warning("Skipped a damaged checkpoint: %s", error)
        return False
    return True


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
