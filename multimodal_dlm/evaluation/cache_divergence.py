"""What caches change: their logits against exact ones on the states of the exact run.

What the denoising loop asks of its forwards in the exact run is noted and asked again with a cache:
the same branches in the same lanes, the same rows, and the columns of the groups that were open. So
the cache that is measured is the one that runs, for pictures, for text in blocks and for both.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from multimodal_dlm.canvas import Canvas
from multimodal_dlm.errors import ConfigError
from multimodal_dlm.pipelines import denoising
from multimodal_dlm.pipelines.guidance import Branch, BranchBuilder, combine
from multimodal_dlm.pipelines.lanes import Forwards
from multimodal_dlm.pipelines.noise_groups import Group

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
    branches: BranchBuilder | None = None,
    noise_conditioning: bool = True,
) -> dict[str, CacheDivergence]:
    """Measure caches, teacher-forced: on the states of the exact run, errors do not add up.

    No other thread may run the denoising loop meanwhile: its steps would be taken for those of the
    run.

    Args:
        transformer: Backbone, no cache enabled.
        configs: By name, what `enable_cache` takes.
        canvas: The canvas the run begins with.
        run: Runs the loop on it with the callback given, the same draws each time: `denoise`, or a
            pipeline whose `callback_on_step_end` calls it.
        branches: None compares the guided logits of the run, with the weights of each step; others
            are compared on the same states with their own weights.
        noise_conditioning: False switches the conditioning on noise levels off.

    Returns:
        The record of each config, of one run.

    Raises:
        ConfigError: When a cache is enabled already, no position is masked, or the run begins with
            another canvas.
    """
    if transformer.is_cache_enabled:
        raise ConfigError("A cache is enabled; got one already. Call `disable_cache()` first.")
    found = {}
    with _conditioning(transformer, noise_conditioning):
        with _steps_noted() as steps:
            exact = _states_of(run)
        if not steps:
            raise ConfigError("`canvas` must have free masked positions; got none.")
        shapes = [tuple(each.input_ids.shape) for each in (canvas, steps[0].canvas)]
        if shapes[0] != shapes[1]:
            raise ConfigError(
                f"`canvas` must be the one `run` begins with; got one of shape {shapes[0]}, and it"
                f" began with one of {shapes[1]}. Build it with the arguments of the run."
            )
        expected = _log_probabilities(transformer, steps, branches)
        for name, config in configs.items():
            with _enabled(transformer, config):
                free = _states_of(run)
            with _enabled(transformer, config):  # Anew: it knows nothing of the run before.
                cached = _log_probabilities(transformer, steps, branches)
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


@dataclass(frozen=True)
class _Step:
    """What the loop asked of its forwards in one step.

    Args:
        canvas: The canvas before the step.
        made: All branches, where the forwards were made for this step; None goes on with them.
        taking: Branches that took part, with their weights in this step.
        rows: Rows that were computed.
        groups: Groups that were read.
    """

    canvas: Canvas
    made: Sequence[Branch] | None
    taking: Sequence[Branch]
    rows: Int[Tensor, " rows"]
    groups: Sequence[Group]


@contextmanager
def _steps_noted() -> Iterator[list[_Step]]:
    """The steps of the loops that run meanwhile."""
    steps: list[_Step] = []

    class Noted(Forwards):
        """Forwards of the loop, which note what they are asked for."""

        def __init__(
            self, transformer: Any, branches: Sequence[Branch], num_forwards: int = 0
        ) -> None:
            super().__init__(transformer, branches, num_forwards)
            self._canvas = branches[0].canvas
            self._made: Sequence[Branch] | None = self.branches

        def __call__(
            self, branches: Sequence[Branch], rows: Tensor, groups: Sequence[Group] | None = None
        ) -> None:
            if groups is not None:  # Else the loop fills what a stopped run has left.
                steps.append(_Step(self._canvas, self._made, branches, rows, groups))
                self._made = None
            super().__call__(branches, rows, groups)

        def write(self, canvas: Canvas, windows: Iterable[int]) -> None:
            self._canvas = canvas
            super().write(canvas, windows)

    denoising.Forwards = Noted
    try:
        yield steps
    finally:
        denoising.Forwards = Forwards


def _log_probabilities(
    transformer: Any, steps: Sequence[_Step], builder: BranchBuilder | None
) -> list[Float[Tensor, "positions columns"]]:
    """Of the masked free positions of each group of each step; by the cache that is enabled."""
    found, forwards = [], None
    for step in steps:
        if step.made is not None:
            made = step.made if builder is None else builder(step.canvas)
            forwards = Forwards(transformer, made)
        assert forwards is not None
        forwards.write(step.canvas, step.canvas.free_windows())
        taking = step.taking if builder is None else forwards.branches
        taking = [b for b in taking if any(b.serves(group.window) for group in step.groups)]
        forwards(taking, step.rows, step.groups)
        is_waiting = transformer.vocabulary.is_masked(step.canvas.input_ids) & step.canvas.is_free
        for group in step.groups:
            rows, positions = is_waiting[:, group.columns(step.canvas)].nonzero(as_tuple=True)
            logits, weights = {}, {}
            for branch in (branch for branch in taking if branch.serves(group.window)):
                states = forwards.lane(branch).states(branch, group, rows, positions)
                logits[branch.name] = transformer.compute_logits(states, group.modality)
                weights[branch.name] = branch.weight
            found.append(combine(logits, weights).double().log_softmax(dim=-1))
    return found


@contextmanager
def _enabled(transformer: Any, config: Any) -> Iterator[None]:
    """The model with a cache for the time being."""
    transformer.enable_cache(config)
    try:
        yield
    finally:
        transformer.disable_cache()


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
