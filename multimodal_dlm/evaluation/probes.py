"""Linear probes: what a vector tells about a label, in accuracy and in nats."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from multimodal_dlm.errors import DataError

NUM_FOLDS = 4
L2 = 1e-2
_MAX_ITERATIONS = 60


@dataclass(frozen=True)
class ProbeResult:
    """What a probe found on rows that it was not fitted to.

    Args:
        right: Whether each row's label was found.
        nats: Cross-entropy of each row's label given its vector.
        prior_nats: Cross-entropy of each row's label given its frequency alone.
        predicted: Class that the probe of each row's fold gives to `other`; None without one.
    """

    right: list[bool]
    nats: list[float]
    prior_nats: list[float]
    predicted: list[int] | None

    @property
    def information(self) -> float:
        """CE(y) - CE(y | x) in nats: what a linear reader learns, at most the true information."""
        return float(np.mean(self.prior_nats) - np.mean(self.nats))


def probe(
    features: Float[Tensor, "rows width"],
    labels: Int[Tensor, " rows"],
    *,
    seed: int = 0,
    other: Float[Tensor, "rows width"] | None = None,
) -> ProbeResult:
    """Multinomial logistic regression, cross-validated (Alain and Bengio 2016, arXiv 1610.01644).

    Features are standardised by the rows fitted to; the L2 weight is fixed, the fit is convex and
    deterministic.

    Args:
        features: Vectors.
        labels: Classes 0..C - 1.
        seed: Of the folds.
        other: Other vectors of the same rows, classified by the probe of their row's fold.
    """
    rows, classes = len(labels), int(labels.max()) + 1
    fold = torch.from_numpy(np.random.default_rng(seed).permutation(rows) % NUM_FOLDS)
    right, nats = torch.zeros(rows, dtype=torch.bool), torch.zeros(rows)
    prior, predicted = torch.zeros(rows), torch.zeros(rows, dtype=torch.long)
    for number in range(NUM_FOLDS):
        held = fold == number
        mean, std = features[~held].mean(dim=0), features[~held].std(dim=0) + 1e-6
        weight, bias = _fit((features[~held] - mean) / std, labels[~held], classes)
        scores = ((features[held] - mean) / std) @ weight + bias
        right[held] = scores.argmax(dim=1) == labels[held]
        nats[held] = F.cross_entropy(scores, labels[held], reduction="none")
        counts = torch.bincount(labels[~held], minlength=classes) + 1.0
        prior[held] = -(counts / counts.sum()).log()[labels[held]]
        if other is not None:
            predicted[held] = (((other[held] - mean) / std) @ weight + bias).argmax(dim=1)
    found = predicted.tolist() if other is not None else None
    return ProbeResult(right.tolist(), nats.tolist(), prior.tolist(), found)


class LinearProbe:
    """A probe fitted once, to be asked about other rows.

    Args:
        features: Vectors fitted to.
        labels: Their labels.
    """

    def __init__(self, features: Float[Tensor, "rows width"], labels: Sequence[str]) -> None:
        self.names = sorted(set(labels))
        places = {name: place for place, name in enumerate(self.names)}
        self._mean, self._std = features.mean(dim=0), features.std(dim=0) + 1e-6
        classes = torch.tensor([places[label] for label in labels])
        self._weight, self._bias = _fit(self._scaled(features), classes, len(self.names))

    def predict(self, features: Float[Tensor, "rows width"]) -> list[str]:
        """The most likely label of each row."""
        scores = self._scaled(features) @ self._weight + self._bias
        return [self.names[place] for place in scores.argmax(dim=1).tolist()]

    def _scaled(self, features: Tensor) -> Tensor:
        return (features - self._mean) / self._std


def encode_labels(values: Sequence[str], *, min_count: int = 8) -> tuple[list[int], Tensor]:
    """Rows whose value is frequent enough to probe, and their classes in alphabetical order.

    Raises:
        DataError: When fewer than two values are.
    """
    counts = Counter(values)
    names = sorted(name for name, count in counts.items() if count >= min_count)
    if len(names) < 2:
        raise DataError(
            f"A probe needs two labels with {min_count} rows each; the most frequent are"
            f" {dict(counts.most_common(3))}. Measure more samples."
        )
    kept = [row for row, value in enumerate(values) if value in set(names)]
    return kept, torch.tensor([names.index(values[row]) for row in kept])


def _fit(features: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        weight = torch.zeros(features.shape[1], classes, requires_grad=True)
        bias = torch.zeros(classes, requires_grad=True)
        optimizer = torch.optim.LBFGS(
            [weight, bias], max_iter=_MAX_ITERATIONS, line_search_fn="strong_wolfe"
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(features @ weight + bias, labels) + L2 * weight.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
    return weight.detach(), bias.detach()
