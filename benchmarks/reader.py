"""The reader against plain webdataset, its share of a training step, and restored states.

`webdataset`: rows a second of the reader in stored order, record parsed and picture decoded, over
those of plain webdataset doing the same work on the same raw shards. `share`: preparing a global
batch (order, rows, canvases) over a whole training step of the released backbone's size with that
batch. `restores`: a state is saved and restored at a random batch of two epochs, and the next batch
compared with the uninterrupted order's. Times are medians of interleaved rounds in one process.
How much faster pre-tokenized shards are is measured by `tokenized_reading.py`.

    OMP_NUM_THREADS=2 python benchmarks/reader.py --json out/reader.json
"""

import argparse
import io
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import webdataset
from accelerate import Accelerator
from PIL import Image
from reporting import finish

from multimodal_dlm.datasets import Manifest, MixtureReader, ShardReader, open_manifest
from multimodal_dlm.training.components import build_job
from multimodal_dlm.training.config import (
    DataConfig,
    ModelConfig,
    ObjectiveConfig,
    TokenizersConfig,
    TrainConfig,
)
from multimodal_dlm.training.trainer import Trainer

ROOT = Path(__file__).resolve().parents[1]


def time_call(function: Callable[[], Any]) -> float:
    """Wall seconds of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def interleaved(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each call, after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            taken = time_call(call)
            if number:
                seconds[name].append(taken)
    return {name: statistics.median(values) for name, values in seconds.items()}


def measure_reading(manifest: Manifest, split: str, rounds: int) -> dict[str, Any]:
    """Rows a second of every picture of a split, ours and plain webdataset's."""
    shards = [
        shard
        for source in manifest.sources.values()
        for shard in source.splits.get(split, ())
        if ShardReader([shard])[0].image_bytes is not None
    ]
    paths = [str(shard.path) for shard in shards]

    def ours() -> int:
        return sum(sample.image.shape[2] * len(sample.key) for sample in ShardReader(shards))

    def theirs() -> int:
        total = 0
        for sample in webdataset.WebDataset(paths, shardshuffle=False, empty_check=False):
            with Image.open(io.BytesIO(sample["png"])) as image:
                pixels = np.asarray(image.convert("RGB"))
            record = json.loads(sample["json"])
            total += pixels.shape[2] * len(record["key"])
        return total

    if ours() != theirs():
        raise SystemExit("Both must have read the same samples.")
    seconds = interleaved({"reader": ours, "webdataset": theirs}, rounds)
    rows = sum(shard.count for shard in shards)
    return {"rows": rows, "rows_per_second": {n: round(rows / s, 1) for n, s in seconds.items()}}


def measure_share(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Seconds of preparing a batch and of the rest of the step."""
    config = TrainConfig(
        output_dir=str(folder / "run"),
        num_train_steps=10_000,
        model=ModelConfig(
            preset=args.preset, max_text=40, options={"noise_conditioning": "ada_norm_single"}
        ),
        tokenizers=TokenizersConfig(
            text=str(ROOT / "tokenizers/text"), image=str(ROOT / "tokenizers/image")
        ),
        data=DataConfig(
            manifest=args.manifest,
            data_root=args.data_root,
            batch_size=args.rows,
            micro_batch_size=min(16, args.rows),
            cache_dir=args.cache_dir or str(folder / "cache"),
        ),
        objective=ObjectiveConfig(options={"hole_share": 0.1}),
    )
    accelerator = Accelerator(mixed_precision="no", cpu=True)
    job = build_job(config)
    trainer = Trainer(job, config, accelerator)
    number = iter(range(1_000_000))
    made: list[Any] = []

    def prepare() -> None:
        made[:] = job.source.batches(next(number))

    def train() -> None:
        trainer.train_step.take(0, made)

    seconds = interleaved({"batch": prepare, "step": train}, args.rounds)
    return {
        "share": round(seconds["batch"] / (seconds["batch"] + seconds["step"]), 5),
        "seconds": {name: round(value, 6) for name, value in seconds.items()},
    }


def measure_restores(manifest: Manifest, count: int, rows: int) -> dict[str, Any]:
    """How many restored readers go on with another batch than the uninterrupted one."""
    draw = random.Random(0)
    whole = MixtureReader(manifest, batch_size=rows)
    differences, largest = 0, 0
    seconds = []
    for _ in range(count):
        number = draw.randrange(2 * whole.batches_per_epoch)
        state = json.dumps(whole.state_at(number))
        largest = max(largest, len(state))
        world = draw.choice([size for size in (1, 2, 3, 4) if rows % size == 0])
        rank = draw.randrange(world)
        resumed = MixtureReader(manifest, batch_size=rows, rank=rank, world_size=world)
        start = time.perf_counter()
        resumed.load_state_dict(json.loads(state))
        batch = next(iter(resumed))
        seconds.append(time.perf_counter() - start)
        part = rows // world
        differences += batch != whole.batch(number)[rank * part : (rank + 1) * part]
    return {
        "restores": count,
        "differences": differences,
        "state_bytes": largest,
        "median_seconds": round(statistics.median(seconds), 6) if seconds else None,
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All three."""
    manifest = open_manifest(args.manifest, args.data_root)
    reading = measure_reading(manifest, "train", args.rounds)
    rates = reading["rows_per_second"]
    with tempfile.TemporaryDirectory() as folder:
        share = measure_share(args, Path(folder))
    return {
        "ratios": {"webdataset": round(rates["reader"] / rates["webdataset"], 3)},
        "reading": reading,
        "loader": share,
        "restored": measure_restores(manifest, args.restores, args.restored_rows),
        "settings": {
            "manifest": Path(args.manifest).name,
            "preset": args.preset,
            "rows": args.rows,
            "rounds": args.rounds,
        },
    }


def main() -> None:
    """Parse options, measure, write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--manifest", default=str(ROOT / "datasets/sample.yaml"))
    parser.add_argument("--data_root", help="folder that holds the datasets' folders")
    parser.add_argument("--cache_dir", help="folder of pre-tokenized shards; a temporary one")
    parser.add_argument("--preset", default="small", help="that of the released backbone")
    parser.add_argument("--rows", type=int, default=64, help="rows of the global batch")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--restores", type=int, default=5000)
    parser.add_argument("--restored-rows", type=int, default=12, help="global batch of restores")
    parser.add_argument("--json", type=Path, help="file to write the report to")
    args = parser.parse_args()
    finish(measure(args), args.json)


if __name__ == "__main__":
    main()
