"""Commit rules: which drawn tokens are sure enough to be committed before the plan asks for them.

The plan of a scheduler says how many tokens a step commits at least. A commit rule adds every
token it calls sure, so that easy windows end in fewer forwards; the bound on forwards and the
guarantee of one commit a forward stay those of the plan. All rules are training-free, work row by
row, and read the distribution the confidence is taken from: temperature 1, restricted to the
columns a position may take, before top-k and top-p.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from multimodal_dlm.errors import ConfigError, make_named
from multimodal_dlm.schedulers.shaping import rank_descending


@dataclass(frozen=True)
class Candidates:
    """The drawn tokens of one step, as a commit rule sees them.

    Args:
        is_masked: Positions that may be committed.
        confidence: Log-probability of the drawn token; 0 where not masked.
        log_probabilities: Distributions at the masked positions, in the order of `is_masked`.
        num_done: Steps of the group that are over after this one, 1 or more.
        num_steps: Steps of the group.
        memory: What the rule kept at the last step; empty at the first.
    """

    is_masked: Bool[Tensor, "batch seq"]
    confidence: Float[Tensor, "batch seq"]
    log_probabilities: Float[Tensor, "masked columns"]
    num_done: int
    num_steps: int
    memory: Mapping[str, Tensor] = field(default_factory=dict)

    def spread(
        self, values: Float[Tensor, " masked"], elsewhere: float
    ) -> Float[Tensor, "batch seq"]:
        """Values of the masked positions in the shape of the canvas, float64."""
        full = values.new_full(self.is_masked.shape, elsewhere, dtype=torch.float64)
        return full.masked_scatter_(self.is_masked, values.to(torch.float64))


@dataclass(frozen=True)
class Selection:
    """What a rule decides.

    Args:
        is_sure: Positions to commit now; a subset of `is_masked`.
        memory: Tensors (batch, seq, ...) the rule wants to see at the next step.
    """

    is_sure: Bool[Tensor, "batch seq"]
    memory: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class CommitRule(ABC):
    """Base of the commit rules: a frozen dataclass of its options, called once per step."""

    @abstractmethod
    def __call__(self, candidates: Candidates) -> Selection:
        """Choose the tokens that are sure."""


@dataclass(frozen=True)
class ThresholdRule(CommitRule):
    """Commit every token whose probability is above a threshold.

    Wu et al. 2025, Fast-dLLM, arXiv 2505.22618.

    Args:
        threshold: Probability in (0, 1].
    """

    threshold: float = 0.9

    def __post_init__(self) -> None:
        _check_range("threshold", self.threshold, 0.0, 1.0, "0.9")

    def __call__(self, candidates: Candidates) -> Selection:
        """Compare each confidence with the threshold."""
        is_sure = candidates.confidence > math.log(self.threshold)
        return Selection(is_sure & candidates.is_masked)


@dataclass(frozen=True)
class FactorRule(CommitRule):
    """Commit the n most probable tokens, n the largest with p_(n) >= 1 - factor / (n + 1).

    With factor 1, and every probability of the n at least 1 - 1 / (n + 1), the tokens that are
    likeliest one by one are also likeliest together (Wu et al. 2025, Fast-dLLM, arXiv 2505.22618,
    Theorem 1): sure in parallel, not only alone.

    Args:
        factor: Above 0; the larger the bolder.
    """

    factor: float = 1.0

    def __post_init__(self) -> None:
        _check_range("factor", self.factor, 0.0, math.inf, "1.0")

    def __call__(self, candidates: Candidates) -> Selection:
        """Sort by probability and find the longest prefix that keeps the bound."""
        confidence = candidates.confidence.to(torch.float64)
        confidence = confidence.masked_fill(~candidates.is_masked, -torch.inf)
        rank = rank_descending(confidence)
        is_within = confidence.exp() >= 1.0 - self.factor / (rank + 2.0)
        count = _longest(is_within & candidates.is_masked, rank)
        return Selection(candidates.is_masked & (rank < count[:, None]))


@dataclass(frozen=True)
class EntropyBoundRule(CommitRule):
    """Commit the positions of lowest entropy while the rest of their entropies sum to the bound.

    Of the positions sorted by entropy, the longest prefix with sum - maximum <= bound: an upper
    bound on the error of drawing them at once (Ben-Hamu et al. 2025, EB-Sampler, arXiv 2505.24857).

    Args:
        bound: Nats, above 0.
    """

    bound: float = 0.1

    def __post_init__(self) -> None:
        _check_range("bound", self.bound, 0.0, math.inf, "0.1")

    def __call__(self, candidates: Candidates) -> Selection:
        """Sort by entropy and sum up."""
        entropy = candidates.spread(_entropy(candidates.log_probabilities), torch.inf)
        rank = rank_descending(-entropy)
        order = rank.argsort(dim=1)
        ordered = entropy.gather(1, order)
        before = torch.zeros_like(ordered)
        before[:, 1:] = ordered[:, :-1].cumsum(dim=1)
        is_within = (before <= self.bound).gather(1, rank)
        count = _longest(is_within & candidates.is_masked, rank)
        return Selection(candidates.is_masked & (rank < count[:, None]))


@dataclass(frozen=True)
class StabilityRule(CommitRule):
    """Commit sure tokens whose distribution has stopped moving.

    A position is stable when KL(now || last step) stayed below `kl_bound` for `num_steps` steps;
    stable positions above the threshold are committed (Kim et al. 2025, KLASS, arXiv 2511.05664).

    Args:
        threshold: Probability in (0, 1].
        kl_bound: Nats, above 0.
        num_steps: Consecutive stable steps, 1 or more.
    """

    threshold: float = 0.9
    kl_bound: float = 0.01
    num_steps: int = 2

    def __post_init__(self) -> None:
        _check_range("threshold", self.threshold, 0.0, 1.0, "0.9")
        _check_range("kl_bound", self.kl_bound, 0.0, math.inf, "0.01")
        _check_range("num_steps", self.num_steps, 0.0, math.inf, "2", whole=True)

    def __call__(self, candidates: Candidates) -> Selection:
        """Count the stable steps of each position and compare."""
        is_masked = candidates.is_masked
        now = candidates.log_probabilities
        num_stable = torch.zeros_like(is_masked, dtype=torch.long)
        if candidates.memory:
            divergence = _kl_divergence(now, candidates.memory["log_probabilities"][is_masked])
            is_stable = candidates.spread(divergence, torch.inf) < self.kl_bound
            num_stable = torch.where(is_stable, candidates.memory["num_stable"] + 1, 0)
        # What was not masked has no past: the divergence from it is infinite.
        full = now.new_full((*is_masked.shape, now.shape[-1]), -torch.inf)
        full[is_masked] = now
        is_likely = candidates.confidence > math.log(self.threshold)
        return Selection(
            is_masked & is_likely & (num_stable >= self.num_steps),
            {"log_probabilities": full, "num_stable": num_stable},
        )


@dataclass(frozen=True)
class EarlyExitRule(CommitRule):
    """Commit everything that is left once the best tokens stand clear of the second best.

    The gap of a position is the difference in log-probability between its best and second-best
    token; its mean over the masked positions of a row that have a choice must exceed a bound that
    falls with the progress of the run (Li et al. 2025, Prophet, arXiv 2508.19982).

    Args:
        early: Gap in nats that ends the run in its first third.
        middle: The same in the second third.
        late: The same in the last third.
    """

    early: float = 7.5
    middle: float = 5.0
    late: float = 2.5

    def __post_init__(self) -> None:
        for name in ("early", "middle", "late"):
            _check_range(name, getattr(self, name), 0.0, math.inf, "7.5, 5.0 and 2.5")

    def __call__(self, candidates: Candidates) -> Selection:
        """Compare each row's mean gap with the bound of this third."""
        is_masked = candidates.is_masked
        if candidates.log_probabilities.shape[-1] < 2:
            return Selection(is_masked)
        best = candidates.log_probabilities.topk(2, dim=-1).values.to(torch.float64)
        gaps = candidates.spread(best[:, 0] - best[:, 1], torch.inf)
        has_choice = is_masked & gaps.isfinite()
        count = has_choice.sum(dim=1)
        mean = gaps.masked_fill(~has_choice, 0.0).sum(dim=1) / count.clamp(min=1)
        third = (candidates.num_done - 1) * 3 // candidates.num_steps
        bound = (self.early, self.middle, self.late)[third]
        return Selection(is_masked & ((mean > bound) | (count == 0))[:, None])


COMMIT_RULES: dict[str, type[CommitRule]] = {
    "threshold": ThresholdRule,
    "factor": FactorRule,
    "entropy_bound": EntropyBoundRule,
    "stability": StabilityRule,
    "early_exit": EarlyExitRule,
}


def get_commit_rule(name: str, **options: Any) -> CommitRule:
    """Make a commit rule by name.

    Args:
        name: `threshold`, `factor`, `entropy_bound`, `stability` or `early_exit`.
        options: Options of that rule.

    Raises:
        ConfigError: When the name is unknown, has no such option, or refuses its value.
    """
    return make_named("commit rule", COMMIT_RULES, name, options)


def _check_range(
    name: str, value: Any, low: float, high: float, remedy: str, *, whole: bool = False
) -> None:
    kinds = int if whole else (int, float)
    is_number = isinstance(value, kinds) and not isinstance(value, bool)
    if not (is_number and math.isfinite(value) and low < value <= high):
        kind = "a whole number" if whole else "a finite number"
        limit = f"above {low:g}" if math.isinf(high) else f"in ({low:g}, {high:g}]"
        raise ConfigError(f"`{name}` must be {kind} {limit}; got {value!r}. Use {remedy}.")


def _longest(
    is_within: Bool[Tensor, "batch seq"], rank: Int[Tensor, "batch seq"]
) -> Int[Tensor, " batch"]:
    """Length of the longest prefix, by rank, whose last element is within the bound."""
    return torch.where(is_within, rank + 1, 0).amax(dim=1) if rank.shape[1] else rank.sum(dim=1)


def _entropy(log_probabilities: Float[Tensor, "masked columns"]) -> Float[Tensor, " masked"]:
    """Entropy in nats; columns of probability 0 add nothing."""
    values = log_probabilities.to(torch.float64)
    return -torch.where(values > -torch.inf, values.exp() * values, 0.0).sum(dim=-1)


def _kl_divergence(
    now: Float[Tensor, "masked columns"], before: Float[Tensor, "masked columns"]
) -> Float[Tensor, " masked"]:
    """KL(now || before) in nats; infinite where something has become possible."""
    now, before = now.to(torch.float64), before.to(torch.float64)
    terms = torch.where(now > -torch.inf, now.exp() * (now - before), 0.0)
    return terms.sum(dim=-1)
