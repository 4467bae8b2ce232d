"""Rows a second from pre-tokenized shards, against decoding and encoding raw ones.

Every path goes through the mixture's order and ends with the rows that training lays out: codes of
picture and texts. `raw` decodes and encodes each picture as training would (batches of 64) and
encodes its texts; `decode` only decodes the picture; `tokenized` reads pre-tokenized shards.

    OMP_NUM_THREADS=1 python benchmarks/tokenized_reading.py --manifest datasets/released.yaml \
        --data_root data --tokenized data/tokenized/released.yaml
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from reporting import finish

from multimodal_dlm.datasets import MixtureReader, open_manifest
from multimodal_dlm.datasets.tokenize_engines import tokenize_manifest
from multimodal_dlm.datasets.tokenizing import ENCODE_BATCH, TokenizerFolders, TokenizerPair
from multimodal_dlm.tokenizers.image import pixels_from_images
from multimodal_dlm.tokenizers.text import encode_text
from multimodal_dlm.training.tokenized_data import TokenizedRows

Read = Callable[[int], list[Any]]


def paths(
    manifest: Path, tokenized: Path, data_root: Path | None, tokenizers: TokenizerPair
) -> dict[str, Read]:
    """Readers of batch `number`, by name."""
    raw = MixtureReader(open_manifest(manifest, data_root), batch_size=ENCODE_BATCH)
    made = MixtureReader(open_manifest(tokenized), batch_size=ENCODE_BATCH)
    rows_of = TokenizedRows(made)

    def decode(number: int) -> list[Any]:
        samples = [raw.readers[e.source][e.index] for e in raw.batch(number)]
        return [sample.image for sample in samples if sample.image_bytes is not None]

    def encode(number: int) -> list[Any]:
        images = decode(number)
        codes = tokenizers.image.encode(pixels_from_images(images)) if images else ()
        texts = [
            encode_text(tokenizers.text, text)
            for example in raw.batch(number)
            for text in (example.instruction, example.text)
            if text is not None
        ]
        return [codes, texts]

    def read(number: int) -> list[Any]:
        return [rows_of(example) for example in made.batch(number)]

    return {"raw": encode, "decode": decode, "tokenized": read}


def measure(
    manifest: Path,
    tokenized: Path,
    *,
    data_root: Path | None = None,
    tokenizers: TokenizerPair,
    num_batches: int = 20,
    repeats: int = 3,
) -> dict[str, Any]:
    """Rows a second of every path, medians over repeats in turn, and their ratios.

    Args:
        manifest: Raw manifest.
        tokenized: The same, pre-tokenized.
        data_root: Of the raw manifest.
        tokenizers: Those it was pre-tokenized with.
        num_batches: Batches of 64 rows in a repeat; the tokenized path reads ten times as many.
        repeats: Measurements of each path.
    """
    readers = paths(manifest, tokenized, data_root, tokenizers)
    rates: dict[str, list[float]] = {name: [] for name in readers}
    for repeat in range(-1, repeats):  # The first opens the files.
        for name, read in readers.items():
            count = num_batches * (10 if name == "tokenized" else 1)
            start = time.perf_counter()
            for number in range(count):
                read(number)
            rate = count * ENCODE_BATCH / (time.perf_counter() - start)
            if repeat >= 0:
                rates[name].append(rate)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    return {
        "rows_per_second": {name: round(rate, 1) for name, rate in medians.items()},
        "ratios": {
            "to_raw": round(medians["tokenized"] / medians["raw"], 2),
            "to_decode": round(medians["tokenized"] / medians["decode"], 2),
        },
        "bar": "to_raw at least 20",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--manifest", type=Path, default=Path("datasets/sample.yaml"))
    parser.add_argument("--data_root", type=Path)
    parser.add_argument("--tokenized", type=Path, default=Path("out/tokenized/sample.yaml"))
    parser.add_argument("--batches", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the report here")
    options = parser.parse_args()
    folders = TokenizerFolders.find()
    if not options.tokenized.is_file():
        tokenize_manifest(
            options.manifest, options.tokenized.parent, folders, data_root=options.data_root
        )
    report = measure(
        options.manifest,
        options.tokenized,
        data_root=options.data_root,
        tokenizers=folders.load(),
        num_batches=options.batches,
        repeats=options.repeats,
    )
    finish({"threads": torch.get_num_threads(), **report}, options.json)


if __name__ == "__main__":
    main()
