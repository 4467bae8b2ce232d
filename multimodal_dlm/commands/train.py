"""The training command: a YAML file with dotted overrides."""

import dataclasses
import json
from typing import TYPE_CHECKING, Any

from multimodal_dlm.commands.reporting import Report
from multimodal_dlm.training.config import TrainConfig

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from multimodal_dlm.training.run import Callback


def add_options(parser: "ArgumentParser", name: str) -> None:
    """Add `--config`, `--dry_run` and one option per field of the config."""
    parser.add_argument("--config", action="config", help="YAML file; options override its values")
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="show the resolved config, parameters, tokens per step and data size, then stop",
    )
    parser.add_class_arguments(TrainConfig, None)


def run_train(dry_run: bool = False, **fields: Any) -> Report:
    """Train, or show what would be trained.

    Args:
        dry_run: Stop after the description.
        fields: Of `TrainConfig`.
    """
    from multimodal_dlm.training.run import describe, train

    names = {part.name for part in dataclasses.fields(TrainConfig)}
    config = TrainConfig(**{name: value for name, value in fields.items() if name in names})
    if dry_run:
        values = describe(config)
        return Report(values, json.dumps(values, indent=2, ensure_ascii=False))
    values = train(config, callbacks=sample_callbacks(config))
    return Report(values, "\n".join(f"{name}: {value}" for name, value in values.items()))


def sample_callbacks(config: TrainConfig) -> "list[Callback]":
    """What the trainer calls every `sample_every_steps`: sample sheets and captions."""
    if not config.sample_every_steps:
        return []
    from multimodal_dlm.datasets.manifest import open_manifest
    from multimodal_dlm.evaluation.samples import (
        BackboneSamples,
        ReconstructionSamples,
        held_out_pictures,
    )

    held_out = held_out_pictures(open_manifest(config.data.manifest, config.data.data_root))
    if config.model.component == "image_tokenizer":
        return [ReconstructionSamples(held_out)]
    return [BackboneSamples(held_out)]
