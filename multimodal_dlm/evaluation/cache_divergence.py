"""What caches change: their logits against exact ones on the states of the exact run."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from multimodal_dlm.canvas import Canvas, noise_levels
from multimodal_dlm.errors import ConfigError
from multimodal_dlm.models.attention_plan import AttentionPlan
from multimodal_dlm.pipelines.guidance import BranchBuilder, combine, conditional_only

Run = Callable[[Callable[[int, float, Canvas], Canvas]], Any]


@dataclass(frozen=True)
class CacheDivergence:
    """How far a cache is from exact, over the masked positions of every step of exact runs.

    Args:
        kl: KL(exact || cached) at each position, nats, float64.
        is_agreed: Positions whose likeliest token is the same.
        first_divergences: Of each run the first step after which the run with the cache holds
            other ids than the exact one; None where they end alike.
    """

    kl: Float[Tensor, " positions"]
    is_agreed: Bool[Tensor, " positions"]
    first_divergences: tuple[int | None, ...]

    @classmethod
    def join(cls, parts: Sequence["CacheDivergence"]) -> "CacheDivergence":
        """Several runs as one record."""
        return cls(
            torch.cat([part.kl for part in parts]),
            torch.cat([part.is_agreed for part in parts]),
            tuple(first for part in parts for first in part.first_divergences),
        )

    @property
    def kl_mean(self) -> float:
        """Mean KL, nats."""
        return float(self.kl.mean())

    @property
    def kl_p95(self) -> float:
        """95th percentile of the KL, nats."""
        return float(self.kl.quantile(0.95))

    @property
    def argmax_agreement(self) -> float:
        """Share of positions whose likeliest token is the same."""
        return float(self.is_agreed.double().mean())

    @property
    def num_positions(self) -> int:
        """Positions compared."""
        return len(self.kl)


@torch.no_grad()
def cache_divergence(
    transformer: Any,
    configs: Mapping[str, Any],
    canvas: Canvas,
    run: Run,
    *,
    branches: BranchBuilder = conditional_only,
    noise_conditioning: bool = True,
) -> dict[str, CacheDivergence]:
    """Measure caches, teacher-forced: on the states of the exact run, errors do not add up.

    Args:
        transformer: Backbone, no cache enabled.
        configs: By name, what `enable_cache` takes.
        canvas: The canvas the run begins with.
        run: Runs the loop on it with the callback given, the same draws each time.
        branches: Those of the run: guided logits are compared, each branch with its own cache.
        noise_conditioning: False switches the conditioning on noise levels off.

    Returns:
        The record of each config, of one run.

    Raises:
        ConfigError: When a cache is enabled already, or no position is masked.
    """
    if transformer.is_cache_enabled:
        raise ConfigError("A cache is enabled; got one already. Call `disable_cache()` first.")
    found = {}
    with _conditioning(transformer, noise_conditioning):
        exact = _states_of(run)
        states = [canvas, *exact[:-1]]
        expected = _log_probabilities(transformer, states, branches)
        if not expected:
            raise ConfigError("`canvas` must have free masked positions; got none.")
        for name, config in configs.items():
            transformer.enable_cache(config)
            try:
                free = _states_of(run)
                cached = _log_probabilities(transformer, states, branches)
            finally:
                transformer.disable_cache()
            pairs = list(zip(expected, cached, strict=True))
            found[name] = CacheDivergence(
                torch.cat([_kl(theirs, ours) for theirs, ours in pairs]),
                torch.cat([theirs.argmax(-1) == ours.argmax(-1) for theirs, ours in pairs]),
                (_first_difference(exact, free),),
            )
    return found


def _states_of(run: Run) -> list[Canvas]:
    """The canvas after every step."""
    seen: list[Canvas] = []

    def record(step: int, timestep: float, canvas: Canvas) -> Canvas:
        seen.append(canvas)
        return canvas

    run(record)
    return seen


def _first_difference(exact: Sequence[Canvas], free: Sequence[Canvas]) -> int | None:
    """The first step after which ids differ, or after which one run has ended."""
    for step, (theirs, ours) in enumerate(zip(exact, free, strict=False)):
        if not torch.equal(theirs.input_ids, ours.input_ids):
            return step
    return None if len(exact) == len(free) else min(len(exact), len(free))


def _kl(exact: Tensor, cached: Tensor) -> Float[Tensor, " positions"]:
    """KL of log-probabilities (positions, columns), nats."""
    return (exact.exp() * (exact - cached)).sum(dim=-1).clamp(min=0.0)


def _log_probabilities(
    transformer: Any, states: Sequence[Canvas], builder: BranchBuilder
) -> list[Float[Tensor, "positions columns"]]:
    """Of the masked free positions of each window of each state; by the cache that is enabled."""
    lanes = {}
    for branch in builder(states[0]):
        plan = AttentionPlan.from_canvas(branch.canvas)
        lanes[branch.name] = (plan, transformer.new_cache(plan, branch.canvas.is_free))
    vocabulary, found = transformer.vocabulary, []
    for state in states:
        branches = builder(state)
        hidden = {b.name: _forward(transformer, b.canvas, *lanes[b.name]) for b in branches}
        is_masked = vocabulary.is_masked(state.input_ids) & state.is_free
        for window in state.free_windows():
            picked = is_masked[:, state.window_slice(window)]
            if not bool(picked.any()):
                continue
            modality = vocabulary.modalities[state.window_modality(window)]
            logits, weights = {}, {}
            for branch in (branch for branch in branches if branch.serves(window)):
                states_here = hidden[branch.name][:, branch.part(window, picked.shape[1])]
                logits[branch.name] = transformer.compute_logits(states_here[picked], modality)
                weights[branch.name] = branch.weight
            found.append(combine(logits, weights).double().log_softmax(dim=-1))
    return found


def _forward(transformer: Any, canvas: Canvas, plan: AttentionPlan, cache: Any) -> Tensor:
    if cache is not None:
        cache.read(canvas.is_free.any(dim=0).nonzero().flatten().tolist())
    return transformer(
        canvas.input_ids,
        noise_levels=noise_levels(canvas, transformer.vocabulary),
        modality_ids=canvas.modality_ids,
        position_ids=canvas.position_ids,
        attention_plan=plan,
        kv_cache=cache,
    ).hidden_states


@contextmanager
def _conditioning(transformer: Any, is_on: bool) -> Iterator[None]:
    """The model with its conditioning on noise levels, or without for the time being."""
    kind = transformer.level_conditioning.kind
    if not is_on:
        transformer.level_conditioning.kind = "none"
    try:
        yield
    finally:
        transformer.level_conditioning.kind = kind
