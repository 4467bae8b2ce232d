"""Where a result was made: versions, machine, command, commit and sources."""

import hashlib
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

_PACKAGES = (
    "torch",
    "torchvision",
    "diffusers",
    "transformers",
    "tokenizers",
    "timm",
    "accelerate",
    "safetensors",
    "numpy",
    "pillow",
)
_SOURCE_KINDS = (".py", ".cpp", ".h")
_UNMEASURED = ("app", "training")  # Packages that no measured number depends on.


def environment() -> dict[str, Any]:
    """Versions, machine, command and commit; nothing that identifies a person."""
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "commit": git_commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "num_cpus": os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
    }


def hash_sources(root: str | Path | None = None) -> str:
    """SHA-256 over the sources of this package but for `app` and `training`, names included.

    It tells changes apart that are not committed.

    Args:
        root: Folder of the package; None for that of this module.
    """
    folder = Path(root) if root is not None else Path(__file__).resolve().parent
    names = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*")}
    digest = hashlib.sha256()
    for name, path in sorted(names.items()):
        is_measured = name.partition("/")[0] not in _UNMEASURED
        if is_measured and path.suffix in _SOURCE_KINDS and path.is_file():
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            digest.update(f"{content}  {name}\n".encode())
    return digest.hexdigest()


def git_commit() -> str | None:
    """Commit of the working tree this package runs from, `-dirty` when changed; None without."""
    folder = Path(__file__).resolve().parent
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        return f"{commit}-dirty" if _git(folder, "status", "--porcelain", "-uno") else commit
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=folder, capture_output=True, text=True, check=True, timeout=20
    )
    return done.stdout.strip()


def _processor() -> str:
    """Model name of the processor where the system tells it."""
    path = Path("/proc/cpuinfo")
    if path.is_file():
        for line in path.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()
