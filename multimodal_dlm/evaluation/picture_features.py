"""Pictures -> EfficientNet-Lite0 features, and distances of sets of pictures in them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from multimodal_dlm.errors import ConfigError
from multimodal_dlm.models.efficientnet import load_efficientnet_lite0

SIDE = 128


class PictureFeatures:
    """Pooled features of the last layer, 1,280 numbers a picture.

    Figures made of them are not comparable with those of Inception features.

    Args:
        batch_size: Pictures at once.

    Raises:
        ConfigError: When the weight package is not installed.
    """

    def __init__(self, *, batch_size: int = 64) -> None:
        self._network: Any = load_efficientnet_lite0()
        self._batch_size = batch_size

    @torch.no_grad()
    def __call__(self, pictures: Sequence[np.ndarray]) -> Float[Tensor, "pictures 1280"]:
        """Features of uint8 (height, width, 3) pictures, resized to 128 x 128."""
        found = []
        for first in range(0, len(pictures), self._batch_size):
            part = np.stack(pictures[first : first + self._batch_size])
            pixels = torch.from_numpy(part).permute(0, 3, 1, 2).float()
            pixels = F.interpolate(pixels, (SIDE, SIDE), mode="bilinear", antialias=True)
            hidden = self._network.forward_features((pixels - 127) / 128)
            found.append(self._network.forward_head(hidden, pre_logits=True))
        return torch.cat(found)


def kernel_distance(first: Float[Tensor, "m width"], second: Float[Tensor, "n width"]) -> float:
    """Squared maximum mean discrepancy, unbiased, kernel (x y / width + 1)^3.

    The kernel inception distance of Binkowski et al. 2018 (arXiv 1801.01401, section 4.1) on other
    features; 0 in expectation for two samples of one distribution, so it may be negative.

    Args:
        first: Features, at least 2 rows.
        second: Features, at least 2 rows.

    Raises:
        ConfigError: When a set has fewer than two rows.
    """
    m, n = len(first), len(second)
    if min(m, n) < 2:
        raise ConfigError(f"`kernel_distance` needs two sets of 2 rows or more; got {m} and {n}.")
    x, y = first.double(), second.double()

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1).pow(3)

    within = []
    for rows in (x, y):
        values, count = kernel(rows, rows), len(rows)
        within.append((values.sum() - values.diagonal().sum()) / (count * (count - 1)))
    return float(within[0] + within[1] - 2 * kernel(x, y).mean())


def nearest_cosine(
    features: Float[Tensor, "rows width"], others: Float[Tensor, "others width"]
) -> list[float]:
    """Cosine distance (1 - cosine) of each row to the nearest of the others."""
    a, b = F.normalize(features, dim=1), F.normalize(others, dim=1)
    return (1 - (a @ b.T).amax(dim=1)).tolist()


def rank_of_own(
    features: Float[Tensor, "rows width"], targets: Float[Tensor, "rows width"]
) -> list[int]:
    """Rank of target i among all targets by cosine to row i, 1 for the nearest; ties count half."""
    similarity = F.normalize(features, dim=1) @ F.normalize(targets, dim=1).T
    own = similarity.diagonal()[:, None]
    above = (similarity > own).sum(dim=1) + (similarity == own).sum(dim=1).sub(1) // 2
    return (above + 1).tolist()
