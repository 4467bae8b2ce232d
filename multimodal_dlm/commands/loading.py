"""Loading a pipeline for a command, and reading pictures given by path."""

import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from multimodal_dlm.commands.reporting import say
from multimodal_dlm.errors import ConfigError, DataError

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from multimodal_dlm.pipelines import UnifiedPipeline

RELEASED_PIPELINE = "pipelines/emoji-small"

Pipeline = TypeVar("Pipeline", bound="UnifiedPipeline")


def load(pipeline_class: type[Pipeline], path: str, device: str = "auto") -> Pipeline:
    """Load a pipeline as one class and move it to a device.

    Args:
        pipeline_class: Class to load the folder as.
        path: Folder, or `owner/name` on the Hub.
        device: `auto` takes CUDA, then MPS, then the CPU.

    Raises:
        CheckpointError: When there is no such pipeline.
        ConfigError: When torch does not know the device.
    """
    import torch

    start = time.perf_counter()
    pipeline = pipeline_class.from_pretrained(path)
    try:
        pipeline.to(pick_device(device))
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"`device` must be one that torch can use here; got `{device}` ({error}). Use `cpu`."
        ) from error
    pipeline.set_progress_bar_config(disable=True)
    logging.getLogger(__name__).info("torch runs %d threads", torch.get_num_threads())
    say(f"loaded {path} in {time.perf_counter() - start:.1f} s")
    return pipeline


def pick_device(device: str) -> str:
    """The device that `auto` stands for, or the one given."""
    import torch

    if device != "auto":
        return device
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def seeded(seed: int, count: int) -> "list[torch.Generator]":
    """One generator per result: result i alone is made again by `--seed` seed + i."""
    import torch

    return [torch.Generator().manual_seed(seed + place) for place in range(count)]


def read_picture(path: str) -> "Image.Image":
    """Open a picture file.

    Raises:
        DataError: When it does not exist or is no picture.
    """
    from PIL import Image

    if not Path(path).is_file():
        raise DataError(f"`image` must be a picture file; there is no file `{path}`.")
    try:
        with Image.open(path) as image:
            image.load()
            return image.copy()
    except (OSError, Image.DecompressionBombError) as error:
        raise DataError(f"`{path}` is not a readable picture: {error}. Give a PNG.") from error


def given(**options: Any) -> dict[str, Any]:
    """The options that are not None: the others stay at the pipeline's own defaults."""
    return {name: value for name, value in options.items() if value is not None}
