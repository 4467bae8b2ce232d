"""A mixture of a few real shards and two tiny tokenizers, and configs of runs over them."""

import dataclasses
import io
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from multimodal_dlm.datasets.manifest import write_dataset_manifest
from multimodal_dlm.datasets.schema import QuestionAnswer, Record, Sample
from multimodal_dlm.datasets.writing import ShardWriter
from multimodal_dlm.tokenizers.image import ImageTokenizer
from multimodal_dlm.tokenizers.text import train_text_tokenizer
from multimodal_dlm.training.checkpoint import latest_checkpoint
from multimodal_dlm.training.config import (
    CheckpointConfig,
    DataConfig,
    LRScheduleConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    TokenizersConfig,
    TrainConfig,
)

NUM_SAMPLES = {"train": 12, "val": 6}
IMAGE_SIZE = 32
COLOURS = ("red", "green", "blue")


def write_data(folder: Path) -> Path:
    """Write a mixture of one source with pictures; return its manifest."""
    shards = folder / "squares"
    shards.mkdir(parents=True)
    splits = {split: _write_split(shards, split) for split in NUM_SAMPLES}
    content = {
        "name": "squares",
        "recipe": "squares",
        "recipe_version": 1,
        "folder": "squares",
        "license": "CC0-1.0",
        "packages": {},
        "caption_templates": [],
        "weight": 1,
        "tasks": {"text_to_image": 2, "caption": 1, "vqa": 2, "joint": 1},
        "caption_weights": {},
    }
    write_dataset_manifest(folder / "squares.yaml", content, splits, "A test.")
    mixture = folder / "mixture.yaml"
    mixture.write_text(yaml.safe_dump({"name": "m", "mixture": [{"manifest": "squares.yaml"}]}))
    return mixture


def _write_split(shards: Path, split: str):
    writer = ShardWriter(shards, split, shard_size=5)
    draw = np.random.default_rng(len(split))
    for number in range(NUM_SAMPLES[split]):
        colour = COLOURS[number % 3]
        pixels = draw.integers(0, 40, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
        pixels[8:24, 8:24, number % 3] = 200
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        record = Record(
            key=f"square-{number:03d}" if split == "train" else f"{split}-{number:03d}",
            source="squares",
            split=split,
            license="CC0-1.0",
            captions=(f"a {colour} square",),
            qa=(QuestionAnswer("what colour is it?", colour, "colour"),),
        )
        writer.write(Sample(record=record, image_bytes=buffer.getvalue()))
    return writer.close()


def write_tokenizers(folder: Path) -> TokenizersConfig:
    """Train and save a text tokenizer, save an untrained image tokenizer."""
    texts = [f"a {colour} square what colour is it?" for colour in COLOURS]
    train_text_tokenizer(texts, vocab_size=300).save_pretrained(folder / "text")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        image_tokenizer = ImageTokenizer(
            image_size=IMAGE_SIZE,
            channels=(8, 8),
            encoder_layers=(1, 1),
            decoder_layers=(1, 1),
            quantizer={"type": "fsq", "levels": [4, 4, 3]},
        )
    image_tokenizer.mark_released()
    image_tokenizer.save_pretrained(folder / "image")
    return TokenizersConfig(text=str(folder / "text"), image=str(folder / "image"))


def run_config(root: Path, output: str = "run", **changes) -> TrainConfig:
    """A run of six steps over what `write_data` and `write_tokenizers` left in `root`."""
    config = TrainConfig(
        output_dir=str(root / output),
        num_train_steps=6,
        seed=1,
        model=ModelConfig(preset="tiny", max_text=20, unconditional_text=4),
        tokenizers=TokenizersConfig(text=str(root / "text"), image=str(root / "image")),
        data=DataConfig(
            manifest=str(root / "mixture.yaml"),
            batch_size=8,
            micro_batch_size=4,
            cache_dir=str(root / "cache"),
        ),
        objective=ObjectiveConfig(options={"hole_share": 0.1}),
        optimizer=OptimizerConfig(lr=5e-3),
        lr_schedule=LRScheduleConfig(num_warmup_steps=2),
        checkpoint=CheckpointConfig(every_steps=2, keep_last=2),
        ema_decay=0.9,
        mixed_precision="no",
        log_every_steps=2,
    )
    return dataclasses.replace(config, **changes)


CRITIC = {
    "perceptual_weight": 0.0,
    "adversarial_weight": 0.1,
    "matching_weight": 1.0,
    "critic_channels": 4,
}


def tokenizer_config(root: Path, output: str = "image_tokenizer", **changes) -> TrainConfig:
    """A run of six steps that trains an image tokenizer; options of the objective: `CRITIC`."""
    return dataclasses.replace(
        run_config(root, output, **changes),
        model=ModelConfig(
            component="image_tokenizer",
            options={
                "image_size": IMAGE_SIZE,
                "channels": (8, 8),
                "encoder_layers": (1, 1),
                "decoder_layers": (1, 1),
                "quantizer": {"type": "fsq", "levels": [4, 4, 3]},
            },
        ),
        objective=ObjectiveConfig("reconstruction", {"perceptual_weight": 0.0}),
    )


class Stop(Exception):
    """Ends a run as a crash would."""


def crash_at(step: int):
    """A callback that ends a run at a step."""

    def callback(state) -> None:
        if state.step == step:
            raise Stop

    return callback


def final_tensors(config: TrainConfig) -> dict[str, torch.Tensor]:
    """All tensors of a run's newest checkpoint, `file/name` -> tensor."""
    path = latest_checkpoint(Path(config.output_dir) / "checkpoints")
    assert path is not None
    return {
        f"{file.stem}/{name}": tensor
        for file in path.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }
