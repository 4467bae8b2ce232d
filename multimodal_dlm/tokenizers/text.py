"""The text tokenizer: byte-level BPE trained on a mixture's own texts, as a Hugging Face tokenizer.

Byte-level BPE (Radford et al. 2019) has no unknown token. `<eos>` is id 0 and `<fill>` id 1, so a
modality's columns are one contiguous range. Text of a user is always encoded with
`split_special_tokens=True`: a typed `<eos>` is five characters, never the token.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from multimodal_dlm.errors import CheckpointError, ConfigError

EOS, FILL = "<eos>", "<fill>"
MIN_VOCAB_SIZE = 258


def train_text_tokenizer(texts: Iterable[str], *, vocab_size: int) -> PreTrainedTokenizerFast:
    """Train byte-level BPE.

    Args:
        texts: Captions, questions and answers of the training split.
        vocab_size: Entries, `<eos>` and `<fill>` included; at least 258.

    Raises:
        ConfigError: When `vocab_size` cannot hold all bytes.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ConfigError(
            f"`vocab_size` must be at least {MIN_VOCAB_SIZE} (all bytes, `<eos>`, `<fill>`); got"
            f" {vocab_size}. Use 2048."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS, FILL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS)
    wrapped.init_kwargs["fingerprint"] = text_fingerprint(wrapped)
    return wrapped


def text_fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """SHA-256 of the sorted vocabulary and the merges."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    content = {"vocab": sorted(model["vocab"].items()), "merges": model["merges"]}
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Codes of a text, without `<eos>`; special tokens typed in it are plain characters."""
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


def load_text_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast:
    """Load a saved tokenizer and check it against its stored fingerprint.

    Raises:
        CheckpointError: When the files changed since they were saved.
    """
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    stored = tokenizer.init_kwargs.get("fingerprint")
    if stored is not None and stored != text_fingerprint(tokenizer):
        raise CheckpointError(
            f"The text tokenizer in `{folder}` does not match its fingerprint {stored[:12]}...;"
            " the files changed since they were saved. Fetch it again."
        )
    return tokenizer
