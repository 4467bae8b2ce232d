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
        prior_nats: Entropy of the labels, by their frequencies among these rows.
        predicted: Class that the probe of each row's fold gives to `other`; None without one.
    """

    right: list[bool]
    nats: list[float]
    prior_nats: float
    predicted: list[int] | None

    @property
    def information(self) -> float:
        """H(y) - CE(y | x) in nats: what a linear reader learns.

        In expectation at most the true information: the plug-in entropy of the labels is too small
        on average, and the cross-entropy of rows not fitted to is too large.
        """
        return self.prior_nats - float(np.mean(self.nats))


def probe(
    features: Float[Tensor, "rows width"],
    labels: Int[Tensor, " rows"],
    *,
    seed: int = 0,
    other: Float[Tensor, "rows width"] | None = None,
    groups: Sequence[int] | None = None,
) -> ProbeResult:
    """Multinomial logistic regression, cross-validated (Alain and Bengio 2016, arXiv 1610.01644).

    Features are standardised by the rows fitted to; the L2 weight is fixed, the fit is convex and
    deterministic.

    Args:
        features: Vectors.
        labels: Classes 0..C - 1.
        seed: Of the folds.
        other: Other vectors of the same rows, classified by the probe of their row's fold.
        groups: Unit of each row, such as the name of what it shows: rows of a unit are in one fold,
            so that no twin of a judged row is fitted to. None for one unit a row.

    Raises:
        DataError: When there are fewer units than folds.
    """
    rows, classes = len(labels), int(labels.max()) + 1
    found, unit = np.unique(np.arange(rows) if groups is None else groups, return_inverse=True)
    if len(found) < NUM_FOLDS:
        raise DataError(
            f"A probe needs {NUM_FOLDS} units, one for each fold; got {len(found)}. Measure samples"
            " of more names."
        )
    folds = np.random.default_rng(seed).permutation(len(found)) % NUM_FOLDS
    fold = torch.from_numpy(folds[unit])
    right, nats = torch.zeros(rows, dtype=torch.bool), torch.zeros(rows)
    predicted = torch.zeros(rows, dtype=torch.long)
    for number in range(NUM_FOLDS):
        held = fold == number
        mean, std = features[~held].mean(dim=0), features[~held].std(dim=0) + 1e-6
        weight, bias = _fit((features[~held] - mean) / std, labels[~held], classes)
        scores = ((features[held] - mean) / std) @ weight + bias
        right[held] = scores.argmax(dim=1) == labels[held]
        nats[held] = F.cross_entropy(scores, labels[held], reduction="none")
        if other is not None:
            predicted[held] = (((other[held] - mean) / std) @ weight + bias).argmax(dim=1)
    shares = torch.bincount(labels, minlength=classes).double() / rows
    entropy = float(torch.special.entr(shares).sum())
    others = predicted.tolist() if other is not None else None
    return ProbeResult(right.tolist(), nats.tolist(), entropy, others)


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
