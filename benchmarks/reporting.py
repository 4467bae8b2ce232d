"""What every benchmark's report ends with, and where it goes."""

import json
import platform
from pathlib import Path
from typing import Any

import diffusers
import torch


def finish(report: dict[str, Any], path: Path | None) -> None:
    """Add machine and versions to a report, print it, and write it where a path is given."""
    whole = {
        **report,
        "machine": {
            "cpu": _cpu_name(),
            "threads": torch.get_num_threads(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "amx": torch.cpu._is_amx_tile_supported(),
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
        },
    }
    text = json.dumps(whole, indent=2)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    print(text)


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
