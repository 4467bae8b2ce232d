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
        """Features of uint8 (height, width, 3) pictures of any sides, resized to 128 x 128."""
        found = []
        for first in range(0, len(pictures), self._batch_size):
            part = [_resized(picture) for picture in pictures[first : first + self._batch_size]]
            hidden = self._network.forward_features((torch.cat(part) - 127) / 128)
            found.append(self._network.forward_head(hidden, pre_logits=True))
        return torch.cat(found)


def _resized(picture: np.ndarray) -> Float[Tensor, "1 3 side side"]:
    pixels = torch.tensor(picture)[None].permute(0, 3, 1, 2).float()
    return F.interpolate(pixels, (SIDE, SIDE), mode="bilinear", antialias=True)


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
    within = sum(
        float(_within(rows).sum()) / (len(rows) * (len(rows) - 1)) for rows in (first, second)
    )
    return within - 2 * float(_kernel(first, second).mean())


def kernel_distance_error(
    first: Float[Tensor, "n width"], second: Float[Tensor, "n width"]
) -> float:
    """Standard error of `kernel_distance` over n pairs, by the jackknife (Tukey 1958).

    Args:
        first: Features, at least 3 rows.
        second: Features of as many rows; row i is left out together with row i of `first`.

    Raises:
        ConfigError: When there are fewer than 3 pairs.
    """
    n = len(first)
    if n != len(second) or n < 3:
        raise ConfigError(
            f"`kernel_distance_error` needs 3 pairs or more; got {n} and {len(second)} rows."
        )
    across = _kernel(first, second)
    left = torch.zeros(n, dtype=torch.float64)
    for rows in (first, second):
        values = _within(rows)
        left += (values.sum() - 2 * values.sum(dim=1)) / ((n - 1) * (n - 2))
    kept = across.sum() - across.sum(dim=0) - across.sum(dim=1) + across.diagonal()
    left -= 2 * kept / (n - 1) ** 2
    return float(((n - 1) / n * (left - left.mean()).square().sum()).sqrt())


def _kernel(first: Tensor, second: Tensor) -> Float[Tensor, "m n"]:
    return (first.double() @ second.double().T / first.shape[1] + 1).pow(3)


def _within(rows: Tensor) -> Float[Tensor, "n n"]:
    """The kernel of a set with itself, 0 on the diagonal."""
    return _kernel(rows, rows).fill_diagonal_(0.0)


def nearest_cosine(
    features: Float[Tensor, "rows width"], others: Float[Tensor, "others width"]
) -> list[float]:
    """Cosine distance (1 - cosine) of each row to the nearest of the others."""
    a, b = F.normalize(features, dim=1), F.normalize(others, dim=1)
    return (1 - (a @ b.T).amax(dim=1)).tolist()


def nearest_difference(
    features: Float[Tensor, "rows width"], others: Float[Tensor, "others width"]
) -> list[float]:
    """Root mean square difference of each row to the nearest of the others."""
    return (torch.cdist(features, others).amin(dim=1) / features.shape[1] ** 0.5).tolist()


def hits_of_own(
    features: Float[Tensor, "rows width"], targets: Float[Tensor, "rows width"], count: int
) -> list[float]:
    """Whether target i is among the `count` targets nearest to row i, by cosine.

    Targets that tie share the places left: the probability of a hit under a random order of them.
    """
    similarity = F.normalize(features, dim=1) @ F.normalize(targets, dim=1).T
    own = similarity.diagonal()[:, None]
    above, equal = (similarity > own).sum(dim=1), (similarity == own).sum(dim=1)
    return ((count - above) / equal).clamp(0, 1).tolist()
