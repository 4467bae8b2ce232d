"""An image-text scorer: which of many names a picture is likely to have.

A picture's EfficientNet-Lite0 features and a text's MiniLM embedding, both frozen, each through a
small head into one space; the score of a pair is the cosine there. It judges pictures relative to
others of the same kind: read it beside the score of real pictures that it was not fitted to. That
is no ceiling: it names the pictures that it was fitted to, and copies of them, far better. It must
never be a training reward and a metric at once.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from multimodal_dlm.datasets.sampling import KeyedDraws, hash_fraction
from multimodal_dlm.errors import CheckpointError, ConfigError, DataError

FORMAT = "multimodal_dlm.scorer/1"
CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
PICTURE_WIDTH, TEXT_WIDTH = 1280, 384
MAX_SCALE = 100.0
WEIGHT_DECAY = 0.1
DEFAULT_FOLDER = "scorers/emoji"


@dataclass(frozen=True)
class ScorerConfig:
    """Sizes of the heads.

    Args:
        hidden: Width inside the picture head.
        width: Width of the common space.
        dropout: Share of the hidden numbers left out while fitting.
    """

    hidden: int = 256
    width: int = 256
    dropout: float = 0.2


class ImageTextScorer(nn.Module):
    """Heads over frozen features: MLP for pictures, one linear layer for texts.

    Args:
        config: Sizes.
    """

    def __init__(self, config: ScorerConfig | None = None) -> None:
        super().__init__()
        self.config = config or ScorerConfig()
        hidden, width = self.config.hidden, self.config.width
        self.picture = nn.Sequential(
            nn.LayerNorm(PICTURE_WIDTH),
            nn.Linear(PICTURE_WIDTH, hidden),
            nn.GELU(),
            nn.Dropout(self.config.dropout),
            nn.Linear(hidden, width),
        )
        self.text = nn.Linear(TEXT_WIDTH, width)
        self.log_scale = nn.Parameter(torch.tensor(math.log(14.0)))

    def embed_pictures(
        self, features: Float[Tensor, "pictures 1280"]
    ) -> Float[Tensor, "pictures width"]:
        """Unit vectors of pictures, from `PictureFeatures`."""
        return F.normalize(self.picture(features), dim=1)

    def embed_texts(self, embeddings: Float[Tensor, "texts 384"]) -> Float[Tensor, "texts width"]:
        """Unit vectors of texts, from `TextEmbedder`."""
        return F.normalize(self.text(embeddings), dim=1)

    @torch.no_grad()
    def score(
        self,
        features: Float[Tensor, "pictures 1280"],
        embeddings: Float[Tensor, "texts 384"],
    ) -> Float[Tensor, "pictures texts"]:
        """Cosine of every picture with every text, in [-1, 1]."""
        return self.embed_pictures(features) @ self.embed_texts(embeddings).T

    def save(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors` (float16)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"format": FORMAT, **asdict(self.config)}, indent=2)
        (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
        tensors = {name: value.half().contiguous() for name, value in self.state_dict().items()}
        save_file(tensors, folder / WEIGHTS_FILE)

    @classmethod
    def load(cls, folder: str | Path) -> "ImageTextScorer":
        """Read a scorer, ready to score.

        Raises:
            CheckpointError: When the folder holds none, or one of another form.
        """
        folder = Path(folder)
        try:
            content = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
            if content.pop("format") != FORMAT:
                raise ValueError("format")
            scorer = cls(ScorerConfig(**content))
            tensors = load_file(folder / WEIGHTS_FILE)
            scorer.load_state_dict({name: value.float() for name, value in tensors.items()})
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
            raise CheckpointError(
                f"`scorer` must be a folder with a `{CONFIG_FILE}` of the format {FORMAT} and its"
                f" `{WEIGHTS_FILE}`; `{folder}` is not ({type(error).__name__}). Use"
                f" `{DEFAULT_FOLDER}` in the root of the repository, or fit one with"
                " `multimodal-dlm study scorer`."
            ) from error
        return scorer.eval().requires_grad_(False)


def fit_scorer(
    features: Float[Tensor, "pictures 1280"],
    labels: Int[Tensor, " pictures"],
    embeddings: Float[Tensor, "names 384"],
    *,
    config: ScorerConfig | None = None,
    num_epochs: int = 12,
    batch_size: int = 512,
    learning_rate: float = 2e-3,
    seed: int = 0,
) -> ImageTextScorer:
    """Train the heads so that each picture's own name scores above all others, and back.

    Symmetric contrastive loss (Radford et al. 2021, arXiv 2103.00020); from pictures to texts the
    other texts are all names at once, from texts to pictures the pictures of the batch.

    Args:
        features: Of the pictures fitted to.
        labels: Place of each picture's name in `embeddings`.
        embeddings: Of all names.
        config: Sizes.
        num_epochs: Passes over the pictures.
        batch_size: Pictures at once.
        learning_rate: Of AdamW at the start; falls to 0 along a cosine.
        seed: Of weights and batches.

    Raises:
        DataError: When a label has no name.
    """
    if int(labels.max()) >= len(embeddings):
        raise DataError(
            f"Every label must be the place of a name; got {int(labels.max())} with"
            f" {len(embeddings)} names."
        )
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(seed)
        scorer = ImageTextScorer(config)
        optimizer = torch.optim.AdamW(
            scorer.parameters(), lr=learning_rate, weight_decay=WEIGHT_DECAY
        )
        per_epoch = -(-len(labels) // batch_size)
        falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_epochs * per_epoch)
        for epoch in range(num_epochs):
            order = KeyedDraws(seed, f"scorer/{epoch}").permutation(len(labels))
            for rows in torch.as_tensor(order).split(batch_size):
                optimizer.zero_grad()
                _contrastive(scorer, features[rows], labels[rows], embeddings).backward()
                optimizer.step()
                falling.step()
    return scorer.eval().requires_grad_(False)


def _contrastive(
    scorer: ImageTextScorer, features: Tensor, labels: Tensor, embeddings: Tensor
) -> Tensor:
    scale = scorer.log_scale.exp().clamp(max=MAX_SCALE)
    pictures, texts = scorer.embed_pictures(features), scorer.embed_texts(embeddings)
    logits = scale * pictures @ texts.T
    forward = F.cross_entropy(logits, labels)
    present, place = labels.unique(return_inverse=True)
    own = F.one_hot(place, len(present)).T.float()
    backward = F.log_softmax(logits[:, present].T, dim=1)
    return (forward - (backward * own / own.sum(dim=1, keepdim=True)).sum(dim=1).mean()) / 2


def name_ranks(
    scores: Float[Tensor, "pictures names"], own: Sequence[int]
) -> Float[Tensor, " pictures"]:
    """Rank of each picture's own name, 1 the best; a tie counts as half a place each.

    Args:
        scores: Of every picture with every name.
        own: Place of each picture's name.

    Raises:
        ConfigError: When there is not one place for each picture.
    """
    if len(own) != len(scores):
        raise ConfigError(f"`own` must name one place a picture; got {len(own)} for {len(scores)}.")
    mine = scores[torch.arange(len(scores)), torch.as_tensor(own)][:, None]
    return 0.5 + (scores > mine).sum(dim=1) + 0.5 * (scores == mine).sum(dim=1)


def held_out_pair(concept: str, artist: str, share: float) -> bool:
    """Whether the pictures of a concept by an artist are kept out of the fit, by their hash."""
    return hash_fraction("scorer", concept, artist) < share
