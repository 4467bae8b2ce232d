"""Estimates of the negative log-likelihood of one row, given any denoiser, in nats and float64.

A *scorer* answers one question: with these positions masked, what is the nll of the true token at
each of them? `denoiser_scorer` makes one from a denoiser of a single modality; a caller with a
canvas writes its own three lines. So nothing here knows modalities, and a condition is whatever the
scorer holds. `is_hidden` are positions masked throughout and not counted, as the picture is while
the text's own law is scored. What is no bound on the negative log-likelihood says so: `is_bound`.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from multimodal_dlm.diffusion.forward_process import UniformProcess
from multimodal_dlm.diffusion.losses import exact_count_nelbo, uniform_nelbo_rate
from multimodal_dlm.diffusion.masking import exact_count_mask
from multimodal_dlm.diffusion.timesteps import counts_from_uniforms
from multimodal_dlm.errors import ConfigError

Scorer = Callable[[Bool[Tensor, "draws length"]], Float[Tensor, "draws length"]]
Denoiser = Callable[[Int[Tensor, "draws length"]], Float[Tensor, "draws length columns"]]
TimeDenoiser = Callable[
    [Int[Tensor, "draws length"], Float[Tensor, " draws"]], Float[Tensor, "draws length columns"]
]

MAX_ENUMERATED = 16
NORMAL_95 = 1.959963984540054
BATCH_ROWS = 1024


@dataclass(frozen=True)
class LikelihoodEstimate:
    """A negative log-likelihood in nats, with its standard error.

    Args:
        value: The estimate; an upper bound in expectation where `is_bound`.
        standard_error: Of the value; 0 when nothing was drawn.
        num_draws: Denoiser rows that were evaluated.
        is_bound: The expectation of `value` is at least the negative log-likelihood.
    """

    value: float
    standard_error: float
    num_draws: int
    is_bound: bool

    @property
    def low(self) -> float:
        """Lower end of the 95 % confidence interval (normal approximation)."""
        return self.value - NORMAL_95 * self.standard_error

    @property
    def high(self) -> float:
        """Upper end of the 95 % confidence interval (normal approximation)."""
        return self.value + NORMAL_95 * self.standard_error

    def chain(self, other: "LikelihoodEstimate") -> "LikelihoodEstimate":
        """NELBO(a) + NELBO(b | a), from independent draws.

        A joint bound when both are bounds and exactly one of them saw the other's tokens, clean.

        Args:
            other: Estimate of the other factor.
        """
        return LikelihoodEstimate(
            self.value + other.value,
            math.hypot(self.standard_error, other.standard_error),
            self.num_draws + other.num_draws,
            self.is_bound and other.is_bound,
        )


def mean_estimate(estimates: Sequence[LikelihoodEstimate]) -> LikelihoodEstimate:
    """Mean over independent rows of a data set; the error covers both rows and draws.

    Args:
        estimates: One per row, at least 2.

    Raises:
        ConfigError: When there are fewer than 2 rows, which leave no spread to measure.
    """
    if len(estimates) < 2:
        raise ConfigError(
            f"`estimates` must hold at least 2 rows; got {len(estimates)}. Report the single"
            " estimate with its own error instead."
        )
    values = torch.tensor([estimate.value for estimate in estimates], dtype=torch.float64)
    return LikelihoodEstimate(
        float(values.mean()),
        float(values.std()) / math.sqrt(len(estimates)),
        sum(estimate.num_draws for estimate in estimates),
        all(estimate.is_bound for estimate in estimates),
    )


def denoiser_scorer(
    denoiser: Denoiser, columns: Int[Tensor, " length"], *, num_columns: int
) -> Scorer:
    """A scorer from a denoiser over one modality.

    Args:
        denoiser: Columns, `num_columns` meaning masked -> logits over the columns.
        columns: The row's true tokens.
        num_columns: Columns V of the modality.
    """

    def score(is_masked: Bool[Tensor, "draws length"]) -> Float[Tensor, "draws length"]:
        rows = columns.expand(len(is_masked), -1)
        logits = denoiser(rows.masked_fill(is_masked, num_columns)).double()
        log_probs = logits.log_softmax(dim=-1)
        return -log_probs.gather(-1, rows[..., None])[..., 0].masked_fill(~is_masked, 0.0)

    return score


def enumerated_nelbo(
    scorer: Scorer,
    is_free: Bool[Tensor, " length"],
    *,
    is_hidden: Bool[Tensor, " length"] | None = None,
) -> LikelihoodEstimate:
    """The any-order bound without sampling: every count, every subset.

    NELBO = (1 / L) sum over k of the mean over subsets of size k of (L / k) x their summed nll, the
    mean over all orders of the autoregressive nll (Uria et al. 2014, arXiv 1310.1757; Ou et al.
    2024, arXiv 2406.03736). 2^L - 1 rows of the denoiser.

    Args:
        scorer: Nll at the masked positions.
        is_free: Positions whose likelihood is asked for, 1 to 16.
        is_hidden: Other positions that are masked throughout; None for none.

    Raises:
        ConfigError: When there are no free positions, or too many.
    """
    masks, weights = _subsets(is_free)
    hidden = _hidden(is_free, is_hidden)
    value = 0.0
    for part, part_weights in zip(masks.split(BATCH_ROWS), weights.split(BATCH_ROWS), strict=True):
        nll = scorer(part | hidden).double().masked_fill(~part, 0.0).sum(dim=1)
        value += float(nll @ part_weights)
    return LikelihoodEstimate(value, 0.0, len(masks), is_bound=True)


def monte_carlo_nelbo(
    scorer: Scorer,
    is_free: Bool[Tensor, " length"],
    *,
    num_draws: int,
    generator: torch.Generator,
    is_hidden: Bool[Tensor, " length"] | None = None,
) -> LikelihoodEstimate:
    """The any-order bound by sampling: stratified counts, two independent masks per stratum.

    Two draws in each stratum make the standard error unbiased without giving up stratification.
    With num_draws = 2 L every count 1..L is drawn exactly twice.

    Args:
        scorer: Nll at the masked positions.
        is_free: Positions whose likelihood is asked for, at least 1.
        num_draws: Masks, even and at least 2; 16 and more for a useful interval.
        generator: Source of all randomness.
        is_hidden: Other positions that are masked throughout; None for none.

    Raises:
        ConfigError: When there are no free positions, or `num_draws` is odd or too small.
    """
    uniforms = _stratum_pairs(num_draws, generator).to(is_free.device)
    hidden = _hidden(is_free, is_hidden)
    rows = is_free.expand(num_draws, -1)
    counts = counts_from_uniforms(uniforms, rows.sum(dim=1))
    is_masked = exact_count_mask(rows, counts, generator=generator)
    values = []
    for part in is_masked.split(BATCH_ROWS):
        nll = scorer(part | hidden).double()
        values.append(exact_count_nelbo(nll, part, is_free.expand(len(part), -1)))
    return _from_pairs(torch.cat(values), is_bound=True)


def chain_nelbo(
    scorer: Scorer,
    is_first: Bool[Tensor, " length"],
    is_second: Bool[Tensor, " length"],
    *,
    num_draws: int | None = None,
    generator: torch.Generator | None = None,
) -> LikelihoodEstimate:
    """Joint bound NELBO(first | second masked) + NELBO(second | first clean).

    Two corners of the noise square; for text first, then the picture, both are trained tasks. With
    the perfect denoiser it is the joint entropy, by the chain rule. (The other joint bound is the
    diagonal: one estimate whose free positions are those of both modalities.)

    Args:
        scorer: Nll at the masked positions.
        is_first: Positions of the modality scored without the other.
        is_second: Positions of the modality scored given the first.
        num_draws: Masks of each of the two estimates; None enumerates all.
        generator: Source of all randomness, needed with `num_draws`.

    Raises:
        ConfigError: When draws are asked for without a generator, or either estimate is refused.
    """
    if num_draws is None:
        first = enumerated_nelbo(scorer, is_first, is_hidden=is_second)
        return first.chain(enumerated_nelbo(scorer, is_second))
    if generator is None:
        raise ConfigError(
            f"`generator` must be given with `num_draws`; got None and {num_draws}. Use"
            " torch.Generator().manual_seed(0)."
        )
    options = {"num_draws": num_draws, "generator": generator}
    first = monte_carlo_nelbo(scorer, is_first, is_hidden=is_second, **options)
    return first.chain(monte_carlo_nelbo(scorer, is_second, **options))


def enumerated_square(
    scorer: Scorer, is_first: Bool[Tensor, " length"], is_second: Bool[Tensor, " length"]
) -> LikelihoodEstimate:
    """Sum of both modalities' losses with independent noise levels; NOT a bound.

    Each term alone bounds a conditional nll: of one modality given a random part of the other. The
    sum counts what the modalities say of each other twice: with the perfect denoiser it is H(a) +
    H(b) - I(a; part of b) - I(b; part of a), which can be below the joint entropy H(a) + H(b) -
    I(a; b). For watching training only.

    Args:
        scorer: Nll at the masked positions.
        is_first: Positions of one modality.
        is_second: Positions of the other.

    Raises:
        ConfigError: When a modality has no positions, or too many.
    """
    first, first_weights = _subsets(is_first)
    second, second_weights = _subsets(is_second)
    # The share of draws with a given mask: weight x k / L.
    first_share = first_weights * first.sum(dim=1) / int(is_first.sum())
    second_share = second_weights * second.sum(dim=1) / int(is_second.sum())
    value = 0.0
    for index, mask in enumerate(first):
        nll = scorer(mask | second).double()
        of_first = nll[:, is_first & mask].sum(dim=1)
        of_second = nll.masked_fill(~second, 0.0).sum(dim=1)
        value += float(first_weights[index] * (of_first @ second_share))
        value += float(first_share[index] * (of_second @ second_weights))
    return LikelihoodEstimate(value, 0.0, len(first) * len(second), is_bound=False)


def monte_carlo_uniform_nelbo(
    denoiser: TimeDenoiser,
    columns: Int[Tensor, " length"],
    process: UniformProcess,
    *,
    num_draws: int,
    generator: torch.Generator,
) -> LikelihoodEstimate:
    """The uniform process's bound by sampling: stratified t, two independent draws per stratum.

    Args:
        denoiser: (x_t, t) -> logits of x_0.
        columns: The row's true tokens, all of them free.
        process: Gives alpha and draws x_t.
        num_draws: Draws of (t, x_t), even and at least 2.
        generator: Source of all randomness.

    Raises:
        ConfigError: When `num_draws` is odd or too small.
    """
    times = _stratum_pairs(num_draws, generator).to(columns.device)
    rows = columns.expand(num_draws, -1)
    is_free = torch.ones_like(rows, dtype=torch.bool)
    noisy = process.add_noise(rows, times, is_free=is_free, generator=generator)
    values = []
    for start in range(0, num_draws, BATCH_ROWS):
        part = slice(start, start + BATCH_ROWS)
        logits = denoiser(noisy[part], times[part]).double()
        rate = uniform_nelbo_rate(
            logits, rows[part], noisy[part], times[part], mask_schedule=process.mask_schedule
        )
        values.append(rate.sum(dim=1))
    return _from_pairs(torch.cat(values), is_bound=True)


def _subsets(
    is_free: Bool[Tensor, " length"],
) -> tuple[Bool[Tensor, "subsets length"], Float[Tensor, " subsets"]]:
    """All non-empty subsets, each with (L / k) / (L x number of subsets of its size)."""
    places = is_free.nonzero().flatten().tolist()
    length = len(places)
    if not 1 <= length <= MAX_ENUMERATED:
        raise ConfigError(
            f"Enumeration takes 1 to {MAX_ENUMERATED} free positions; got {length}. Use"
            " `monte_carlo_nelbo` for longer rows."
        )
    masks, weights = [], []
    for count in range(1, length + 1):
        for subset in itertools.combinations(places, count):
            mask = torch.zeros_like(is_free)
            mask[list(subset)] = True
            masks.append(mask)
            weights.append(1.0 / (count * math.comb(length, count)))
    weight = torch.tensor(weights, dtype=torch.float64, device=is_free.device)
    return torch.stack(masks), weight


def _hidden(
    is_free: Bool[Tensor, " length"], is_hidden: Bool[Tensor, " length"] | None
) -> Bool[Tensor, " length"]:
    if not bool(is_free.any()):
        raise ConfigError("`is_free` must hold at least one position; got none. Nothing to score.")
    if is_hidden is None:
        return torch.zeros_like(is_free)
    if bool((is_hidden & is_free).any()):
        raise ConfigError(
            "`is_hidden` and `is_free` must not share positions; got"
            f" {int((is_hidden & is_free).sum())} in both. A hidden position is not scored."
        )
    return is_hidden


def _stratum_pairs(num_draws: int, generator: torch.Generator) -> Float[Tensor, " draws"]:
    """Two uniform numbers in each of num_draws / 2 strata: all first ones, then all second ones."""
    if num_draws < 2 or num_draws % 2:
        raise ConfigError(f"`num_draws` must be even and at least 2; got {num_draws}. Use 64.")
    strata = num_draws // 2
    offsets = torch.rand(
        2, strata, generator=generator, dtype=torch.float64, device=generator.device
    )
    return ((torch.arange(strata, device=generator.device) + offsets) / strata).flatten()


def _from_pairs(values: Float[Tensor, " draws"], *, is_bound: bool) -> LikelihoodEstimate:
    """Mean of a stratified sample of pairs, with its standard error."""
    # (a - b)^2 / 4 is unbiased for the variance of a pair's mean.
    first, second = values.view(2, -1)
    error = float(((first - second) ** 2 / 4).sum().sqrt()) / len(first)
    return LikelihoodEstimate(float(values.mean()), error, len(values), is_bound)
