"""A dataset of colored squares with a held-out split, written as real shards."""

import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from multimodal_dlm.datasets.manifest import write_dataset_manifest
from multimodal_dlm.datasets.schema import QuestionAnswer, Record, Sample
from multimodal_dlm.datasets.writing import ShardWriter

IMAGE_SIZE = 32
COLORS = ("red", "green", "blue")
SPLITS = {"train": 9, "test": 3}


def square(color: str, noise: np.random.Generator) -> Image.Image:
    """A colored square on a dark, slightly noisy background."""
    pixels = noise.integers(0, 40, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    pixels[8:24, 8:24, COLORS.index(color)] = 200
    return Image.fromarray(pixels)


def write_squares(folder: Path, splits: Mapping[str, int] = SPLITS) -> Path:
    """Write the shards and return the manifest's path."""
    noise = np.random.default_rng(0)
    (folder / "squares").mkdir(parents=True)
    shards = {}
    for split, count in splits.items():
        writer = ShardWriter(folder / "squares", f"squares-{split}", shard_size=100)
        for number in range(count):
            color = COLORS[number % 3]
            buffer = io.BytesIO()
            square(color, noise).save(buffer, "PNG")
            record = Record(
                key=f"{split}-{number}",
                source="squares",
                split=split,
                license="CC0-1.0",
                captions=(f"an emoji of a {color} square", f"a {color} square"),
                qa=(
                    QuestionAnswer("what color is it?", color, "color"),
                    QuestionAnswer("is it a square?", "yes", "yes_no"),
                ),
                meta={"concept": f"{color} square"},
            )
            writer.write(Sample(record=record, image_bytes=buffer.getvalue()))
        shards[split] = writer.close()
    content = {
        "name": "squares",
        "recipe": "squares",
        "recipe_version": 1,
        "folder": "squares",
        "license": "CC0-1.0",
        "packages": [],
        "caption_templates": [],
        "weight": 1,
        "tasks": {"text_to_image": 1, "caption": 1, "vqa": 1},
        "caption_weights": {},
    }
    path = folder / "squares.yaml"
    write_dataset_manifest(path, content, shards, "Written by a test.")
    return path
