"""A joint law small enough to enumerate, and its perfect denoisers."""

import itertools
import math

import torch
from hypothesis import settings
from torch import Tensor

EXAMPLES = settings(max_examples=25, deadline=None, derandomize=True, database=None)


class Joint:
    """A law over all sequences whose token i has `sizes[i]` values, float64.

    With sizes (3, 3, 2, 2) the first two tokens are one modality and the last two another. The
    mask is `num_columns`, the largest size.
    """

    def __init__(self, *sizes: int, seed: int = 0, scale: float = 1.5):
        self.sizes, self.num_columns = sizes, max(sizes)
        self.sequences = torch.tensor(list(itertools.product(*map(range, sizes))))
        generator = torch.Generator().manual_seed(seed)
        logits = scale * torch.randn(len(self.sequences), generator=generator, dtype=torch.float64)
        self.probs = logits.softmax(dim=0)

    @property
    def entropy(self) -> float:
        return float(-(self.probs * self.probs.log()).sum())

    def clean_law(self, evidence: Tensor) -> Tensor:
        """Law of each token given likelihoods (batch, sequences): (batch, length, columns)."""
        weights = self.probs * evidence
        weights = weights / weights.sum(dim=1, keepdim=True)
        one_hot = torch.nn.functional.one_hot(self.sequences, self.num_columns).double()
        return torch.einsum("bs,slv->blv", weights, one_hot)

    def absorbing_denoiser(self, columns: Tensor) -> Tensor:
        """Log-law of each token given the known ones; `num_columns` is the mask."""
        is_masked = columns == self.num_columns
        agrees = (columns[:, None] == self.sequences) | is_masked[:, None]
        return self.clean_law(agrees.all(dim=-1).double()).log()

    def uniform_evidence(self, columns: Tensor, alpha: Tensor) -> Tensor:
        """Likelihood q(x_t | x_0) of every clean sequence: (batch, sequences)."""
        same = (columns[:, None] == self.sequences).double()
        keep = alpha.double()[:, None, None]
        return (keep * same + (1 - keep) / self.num_columns).prod(dim=-1)

    def uniform_denoiser(self, columns: Tensor, alpha: Tensor) -> Tensor:
        """Log-law of each clean token given uniformly corrupted ones."""
        return self.clean_law(self.uniform_evidence(columns, alpha)).log()


def perturb(denoiser, seed: int, size: float):
    """The same denoiser with a fixed error of its logits, different for each input."""

    def wrong(columns, *args):
        log_probs = denoiser(columns, *args).clamp(min=-30.0)
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(
            1, columns.shape[1], log_probs.shape[-1], generator=generator, dtype=torch.float64
        )
        slope = torch.randn(log_probs.shape[-1], generator=generator, dtype=torch.float64)
        return log_probs + size * (noise + slope * columns.double().sum(dim=1)[:, None, None])

    return wrong


def chi_square_z(counts: Tensor, law: Tensor) -> float:
    """Chi-square statistic as a normal deviate (Wilson and Hilferty 1931)."""
    expected = law * counts.sum()
    freedom = len(law) - 1
    share = float(((counts - expected) ** 2 / expected).sum()) / freedom
    spread = 2.0 / (9.0 * freedom)
    return (share ** (1 / 3) - (1.0 - spread)) / math.sqrt(spread)


def gauss_legendre(num_points: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights on (0, 1), by the Jacobi matrix (Golub and Welsch 1969)."""
    k = torch.arange(1, num_points, dtype=torch.float64)
    off = k / (4 * k * k - 1).sqrt()
    values, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    return (values + 1) / 2, vectors[0] ** 2
