"""What a cache changes: its logits against exact ones on the states of the exact run."""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from multimodal_dlm.canvas import Canvas, noise_levels
from multimodal_dlm.errors import ConfigError
from multimodal_dlm.models.attention_plan import AttentionPlan

Run = Callable[[Callable[[int, float, Canvas], Canvas]], Any]


@dataclass(frozen=True)
class CacheDivergence:
    """How far a cache is from exact, over the masked positions of every step of an exact run.

    Args:
        kl_mean: Mean KL(exact || cached), nats.
        kl_p95: Its 95th percentile.
        argmax_agreement: Share of positions whose likeliest token is the same.
        first_divergence: First step after which the run with the cache holds other ids than the
            exact run; None when they end alike.
        num_positions: Positions compared.
    """

    kl_mean: float
    kl_p95: float
    argmax_agreement: float
    first_divergence: int | None
    num_positions: int


@torch.no_grad()
def cache_divergence(
    transformer: Any, config: Any, canvas: Canvas, run: Run, *, noise_conditioning: bool = True
) -> CacheDivergence:
    """Measure a cache, teacher-forced: on the states of the exact run, errors do not add up.

    Args:
        transformer: Backbone, no cache enabled.
        config: What `enable_cache` takes.
        canvas: The canvas the run begins with.
        run: Runs the loop on it with the callback given, the same draws each time.
        noise_conditioning: False switches the conditioning on noise levels off.

    Raises:
        ConfigError: When a cache is enabled already, or no position is masked.
    """
    if transformer.is_cache_enabled:
        raise ConfigError("A cache is enabled; got one already. Call `disable_cache()` first.")
    with _conditioning(transformer, noise_conditioning):
        exact = _states_of(run)
        transformer.enable_cache(config)
        try:
            free = _states_of(run)
            parts = _compare(transformer, [canvas, *exact[:-1]])
        finally:
            transformer.disable_cache()
    if not parts:
        raise ConfigError("`canvas` must have free masked positions; got none.")
    divergences = torch.cat([kl for kl, _ in parts])
    agreed = torch.cat([same for _, same in parts]).double()
    different = [
        step
        for step, (ours, theirs) in enumerate(zip(free, exact, strict=False))
        if not torch.equal(ours.input_ids, theirs.input_ids)
    ]
    first = different[0] if different else None
    if first is None and len(free) != len(exact):
        first = min(len(free), len(exact))
    return CacheDivergence(
        kl_mean=float(divergences.mean()),
        kl_p95=float(divergences.quantile(0.95)),
        argmax_agreement=float(agreed.mean()),
        first_divergence=first,
        num_positions=len(divergences),
    )


def _states_of(run: Run) -> list[Canvas]:
    """The canvas after every step."""
    seen: list[Canvas] = []

    def record(step: int, timestep: float, canvas: Canvas) -> Canvas:
        seen.append(canvas)
        return canvas

    run(record)
    return seen


def _compare(transformer: Any, states: list[Canvas]) -> list[tuple[Tensor, Tensor]]:
    """KL and agreement at the masked free positions of each state, by modality."""
    vocabulary, parts = transformer.vocabulary, []
    plan = AttentionPlan.from_canvas(states[0])
    cache = transformer.new_cache(plan, states[0].is_free)
    for canvas in states:
        is_masked = vocabulary.is_masked(canvas.input_ids) & canvas.is_free
        if cache is not None:
            cache.read(canvas.is_free.any(dim=0).nonzero().flatten().tolist())
        cached, exact = (_forward(transformer, canvas, plan, kept) for kept in (cache, None))
        for index, name in enumerate(vocabulary.modalities):
            chosen = is_masked & (canvas.modality_ids == index)
            if bool(chosen.any()):
                ours = _log_probabilities(transformer, cached[chosen], name)
                theirs = _log_probabilities(transformer, exact[chosen], name)
                kl = (theirs.exp() * (theirs - ours)).sum(dim=-1).clamp(min=0.0)
                parts.append((kl, ours.argmax(-1) == theirs.argmax(-1)))
    return parts


def _forward(transformer: Any, canvas: Canvas, plan: AttentionPlan, cache: Any) -> Tensor:
    return transformer(
        canvas.input_ids,
        noise_levels=noise_levels(canvas, transformer.vocabulary),
        modality_ids=canvas.modality_ids,
        position_ids=canvas.position_ids,
        attention_plan=plan,
        kv_cache=cache,
    ).hidden_states


def _log_probabilities(
    transformer: Any, states: Tensor, modality: str
) -> Float[Tensor, "positions columns"]:
    return transformer.compute_logits(states, modality).double().log_softmax(dim=-1)


@contextmanager
def _conditioning(transformer: Any, is_on: bool) -> Any:
    """The model with its conditioning on noise levels, or without for the time being."""
    kind = transformer.level_conditioning.kind
    if not is_on:
        transformer.level_conditioning.kind = "none"
    try:
        yield
    finally:
        transformer.level_conditioning.kind = kind
