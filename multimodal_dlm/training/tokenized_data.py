"""Rows of a run as codes: pre-tokenized shards, or raw ones that are tokenized once into a cache.

There is one way to train, from codes. A source whose manifest lists raw shards is pre-tokenized
into the cache folder before the first step, by the function that `multimodal-dlm data tokenize`
uses, so both give the same rows.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from multimodal_dlm.datasets.manifest import Manifest, Source
from multimodal_dlm.datasets.mixture import QUESTION_TASKS, MixtureReader, TrainingExample
from multimodal_dlm.datasets.row_groups import Codebooks, Row
from multimodal_dlm.datasets.row_reading import RowReader
from multimodal_dlm.datasets.tokenize_engines import tokenize_source
from multimodal_dlm.datasets.tokenizing import TokenizerPair
from multimodal_dlm.errors import CheckpointError, ConfigError
from multimodal_dlm.processing import TrainingRow

logger = logging.getLogger(__name__)


class TokenizedRows:
    """The row of an example, all of it codes.

    Args:
        reader: Order over pre-tokenized sources.
    """

    def __init__(self, reader: MixtureReader) -> None:
        self.readers = {n: r for n, r in reader.readers.items() if isinstance(r, RowReader)}

    def __call__(self, example: TrainingExample) -> TrainingRow:
        """The row that is laid out."""
        row = self.readers[example.source].row(example.index)
        asked = example.instruction
        return TrainingRow(
            task=example.task,
            codes=None if example.task == "text" else row.codes,
            instruction=None if asked is None else row.texts[asked].tolist(),
            text=_codes_or_text(row, example.text),
            window_draw=example.window_draw,
        )


def _codes_or_text(row: Row, text: str) -> list[int] | str:
    """Codes of a text of the record; the text itself where a template made it."""
    codes = row.texts.get(text)
    return text if codes is None else codes.tolist()


class BlankRows(TokenizedRows):
    """As `TokenizedRows`, but rows of raw sources have code 0 all over their picture.

    For descriptions of a run: the right lengths without encoding a picture.

    Args:
        reader: Order over any sources.
        codebooks: Of the run's tokenizers.
    """

    def __init__(self, reader: MixtureReader, codebooks: Codebooks) -> None:
        super().__init__(reader)
        blank = (np.zeros(codebooks.grid, codebooks.dtype),) * len(codebooks.image_sizes)
        self.codes = {
            name: blank if raw[0].image_bytes is not None else None
            for name, raw in reader.readers.items()
            if name not in self.readers
        }

    def __call__(self, example: TrainingExample) -> TrainingRow:
        """The row that is laid out."""
        if example.source in self.readers:
            return super().__call__(example)
        return TrainingRow(
            task=example.task,
            codes=None if example.task == "text" else self.codes[example.source],
            instruction=example.instruction,
            text=example.text,
            window_draw=example.window_draw,
        )


def check_tokenized(manifest: Manifest, codebooks: Codebooks) -> None:
    """Refuse pre-tokenized sources that were made with other tokenizers.

    Raises:
        CheckpointError: Naming source, tokenizer and both fingerprints.
    """
    for name, source in manifest.sources.items():
        if source.codebooks is None or source.codebooks == codebooks:
            continue
        kind = "text" if source.codebooks.text != codebooks.text else "image"
        theirs, ours = getattr(source.codebooks, kind), getattr(codebooks, kind)
        raise CheckpointError(
            f"Source `{name}` must be tokenized with the run's {kind} tokenizer, fingerprint"
            f" {ours[:12]}...; its shards were made with {theirs[:12]}... Set `tokenizers.{kind}`"
            " to that tokenizer's folder, or run `multimodal-dlm data tokenize` with the other."
        )


def check_lengths(manifest: Manifest, split: str, max_text: int) -> None:
    """Refuse sources with a text that does not fit the model's text window, if it may be drawn.

    Sources with a filter or templates, or that weigh their captions or questions, are left to the
    draw.

    Args:
        manifest: Pre-tokenized sources.
        split: Split that is read.
        max_text: Longest text window in tokens, `<eos>` included.

    Raises:
        ConfigError: Naming source, length and the option to raise.
    """
    for name, source in manifest.sources.items():
        tasks = {task for task, share in source.tasks.items() if share}
        if source.filter is not None:
            continue
        is_left = bool(source.caption_weights or source.templates)
        kinds = {"captions": bool(tasks - set(QUESTION_TASKS)) and not is_left}
        kinds["questions"] = bool(tasks & set(QUESTION_TASKS)) and not source.question_weights
        for kind in (kind for kind, may_be_drawn in kinds.items() if may_be_drawn):
            shards = source.splits.get(split, ())
            longest = max((shard.longest[kind] for shard in shards), default=0) + 1
            if longest > max_text:
                raise ConfigError(
                    f"The text window must hold every text; source `{name}` has {kind} of up to"
                    f" {longest} tokens (`<eos>` included) and `model.max_text` is {max_text}. Set"
                    f" it to {longest} (only for a new model), or shorten the texts."
                )


def tokenized_manifest(
    manifest: Manifest,
    split: str,
    tokenizers: TokenizerPair,
    folder: Path,
    *,
    may_skip: bool = False,
) -> Manifest:
    """The manifest with one split of every raw source tokenized, from the cache where it can be.

    Args:
        manifest: Raw and pre-tokenized sources.
        split: Split that is read.
        tokenizers: Of the run.
        folder: Cache; a source's shards lie under its name and a hash of shards and tokenizers.
        may_skip: Write marked rows for unusable samples instead of stopping.
    """
    sources = dict(manifest.sources)
    for name, source in sources.items():
        if source.codebooks is None and source.count(split):
            sources[name] = _from_cache(source, split, tokenizers, folder, may_skip)
    return replace(manifest, sources=sources)


def _from_cache(
    source: Source, split: str, tokenizers: TokenizerPair, folder: Path, may_skip: bool
) -> Source:
    identity: Sequence[object] = (
        [shard.sha256 for shard in source.splits[split]],
        tokenizers.codebooks.to_dict(),
    )
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    place = folder / f"{source.name}-{split}-{digest[:16]}"
    with tqdm(
        desc=f"tokenize {source.name}/{split}",
        total=source.count(split),
        unit=" samples",
        mininterval=2,
        delay=2,
    ) as bar:
        return tokenize_source(
            source, place, tokenizers, splits=[split], may_skip=may_skip, progress=bar.update
        )
