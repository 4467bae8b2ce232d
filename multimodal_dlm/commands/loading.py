"""Loading a pipeline for a command, and reading pictures given by path."""

import importlib
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from multimodal_dlm.commands.reporting import say
from multimodal_dlm.errors import CheckpointError, ConfigError, unknown_name

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from multimodal_dlm.datasets.manifest import Source

RELEASED_PIPELINE = "pipelines/emoji-small"


def load(class_name: str, path: str, device: str = "auto") -> Any:
    """Load a pipeline as one class, with the exact cache, and move it to a device.

    Args:
        class_name: Class of `multimodal_dlm.pipelines` to load the folder as.
        path: Folder, or `owner/name` on the Hub.
        device: `auto` takes CUDA, else the CPU.

    Raises:
        CheckpointError: When there is no such pipeline.
        ConfigError: When torch does not know the device, or it is MPS.
    """
    require_folder(path)
    say("importing torch, diffusers and transformers (some seconds)")
    start = time.perf_counter()
    target = pick_device(device)
    from multimodal_dlm.models.kv_cache import ExactCacheConfig

    pipelines = importlib.import_module("multimodal_dlm.pipelines")
    pipeline = getattr(pipelines, class_name).from_pretrained(path)
    try:
        pipeline.to(target)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"`device` must be one that torch can use here; got `{device}` ({error}). Use `cpu`."
        ) from error
    pipeline.transformer.enable_cache(ExactCacheConfig())
    pipeline.set_progress_bar_config(disable=True)
    say(f"loaded {path} in {time.perf_counter() - start:.1f} s")
    return pipeline


def require_folder(path: str) -> None:
    """Refuse a folder that is not there before anything slow is imported.

    Raises:
        CheckpointError: When a path, or the released pipeline, does not exist.
    """
    if Path(path).expanduser().is_dir():
        return
    if path == RELEASED_PIPELINE:
        raise CheckpointError(
            f"The released pipeline `{path}` must be in the working directory; it is not. Run this"
            " in the root of the repository, or give --pipeline FOLDER."
        )
    if path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise CheckpointError(
            f"`pipeline` must be an existing folder or a Hub repository `owner/name`; there is no"
            f" folder `{path}`. Check the spelling and the working directory."
        )


def open_source(manifest: str, data_root: str | None, source: str) -> "Source":
    """One dataset of a manifest.

    Raises:
        ConfigError: When the manifest has no such source.
    """
    from multimodal_dlm.datasets.manifest import open_manifest

    sources = open_manifest(manifest, data_root).sources
    if source not in sources:
        raise unknown_name("source", source, sources)
    return sources[source]


def write_json(path: str | None, values: dict[str, Any]) -> None:
    """Write a result; None writes nothing."""
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def pick_device(device: str) -> str:
    """The device that `auto` stands for (CUDA, else the CPU), or the one given.

    Raises:
        ConfigError: For MPS, which has no float64: positions and draws of tokens are made in it.
    """
    import torch

    from multimodal_dlm.precision import check_float64

    check_float64(device)
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def seeded(seed: int, count: int) -> "list[torch.Generator]":
    """One generator per result: result i alone is made again by `--seed` seed + i."""
    import torch

    return [torch.Generator().manual_seed(seed + place) for place in range(count)]


def read_picture(path: str) -> "Image.Image":
    """Open a picture file.

    Raises:
        DataError: When it does not exist or is no picture.
    """
    from multimodal_dlm.intake import read_upright

    return read_upright(path)


def given(**options: Any) -> dict[str, Any]:
    """The options that are not None: the others stay at the pipeline's own defaults."""
    return {name: value for name, value in options.items() if value is not None}
