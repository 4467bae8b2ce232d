"""Two tiny datasets and their mixture, written as real shards."""

from pathlib import Path

import numpy as np
import yaml

from multimodal_dlm.datasets.manifest import Manifest, open_manifest, write_dataset_manifest
from multimodal_dlm.datasets.schema import QuestionAnswer, Record, Sample
from multimodal_dlm.datasets.writing import write_shards
from multimodal_dlm.intake import encode_png

SIZES = {"shapes": 25, "words": 13}
TASKS = {"shapes": {"text_to_image": 2, "vqa": 1}, "words": {"text": 1}}


def toy_sample(source: str, number: int, *, with_picture: bool = True) -> Sample:
    record = Record(
        key=f"{source}-{number:03d}",
        source=source,
        split="train",
        license="MIT",
        captions=(f"{source} {number}", f"a picture of {source} {number}"),
        qa=(QuestionAnswer("which?", str(number), "number"), QuestionAnswer("is it?", "yes", "is")),
    )
    pixels = np.full((8, 8, 3), number, dtype=np.uint8)
    return Sample(record, encode_png(pixels) if with_picture else None)


def write_toy(root: Path, source: str, *, shard_size: int = 4) -> Path:
    folder = root / source
    folder.mkdir(parents=True, exist_ok=True)
    samples = [toy_sample(source, n, with_picture=source != "words") for n in range(SIZES[source])]
    shards = write_shards(samples, folder, f"{source}-train", shard_size)
    content = {
        "name": source,
        "recipe": source,
        "recipe_version": 1,
        "folder": source,
        "license": "MIT",
        "packages": [],
        "caption_templates": ["short", "long"],
        "weight": 1,
        "tasks": TASKS[source],
        "caption_weights": {"text_to_image": [0, 1]} if source == "shapes" else {},
    }
    path = root / f"{source}.yaml"
    write_dataset_manifest(path, content, {"train": shards}, "toy")
    return path


def toy_mixture(root: Path, weights: tuple[int, int] = (3, 2)) -> Manifest:
    for source in SIZES:
        write_toy(root, source)
    members = [
        {"manifest": f"{source}.yaml", "weight": weight}
        for source, weight in zip(SIZES, weights, strict=True)
    ]
    path = root / "mixture.yaml"
    path.write_text(yaml.safe_dump({"name": "toy", "mixture": members}))
    return open_manifest(path)
