"""Every scheduler under contract test, one row each: class and constructor options."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from multimodal_dlm.schedulers import (
    AbsorbingAncestralScheduler,
    ConfidenceScheduler,
    DiscreteScheduler,
)

# Two modalities with a mask each: a text-like one under the length rule, a picture-like one.
MODALITIES: dict[str, Any] = {
    "words": {
        "temperature": 1.0,
        "choice_temperature": 1.0,
        "eos_column": 0,
        "fill_column": 1,
    },
    "codes": {"mask_schedule": "cosine", "temperature": 1.0, "choice_temperature": 4.5},
}

SCHEDULERS: dict[str, tuple[type[DiscreteScheduler], dict[str, Any]]] = {
    "confidence": (ConfidenceScheduler, {}),
    "absorbing_ancestral": (AbsorbingAncestralScheduler, {}),
    "absorbing_ancestral_binomial": (AbsorbingAncestralScheduler, {"counts": "binomial"}),
}


# Options of every modality of a registered scheduler, beside its constructor's.
MODALITY_OPTIONS: dict[str, dict[str, Any]] = {
    f"confidence_{rule}": {"commit_rule": rule, "commit_rule_options": options}
    for rule, options in {
        "threshold": {"threshold": 0.4},
        "factor": {"factor": 2.0},
        "entropy_bound": {"bound": 3.0},
        "stability": {"threshold": 0.3, "kl_bound": 0.5, "num_steps": 1},
        "early_exit": {"early": 3.0, "middle": 2.0, "late": 1.0},
    }.items()
}
MODALITY_OPTIONS["confidence_profile"] = {"step_profile": [5.0, 2.5, 2.0, 1.8]}
SCHEDULERS.update({name: (ConfidenceScheduler, {}) for name in MODALITY_OPTIONS})


def make_scheduler(name: str, modalities: dict[str, Any] | None = None) -> DiscreteScheduler:
    """A registered scheduler with the test modalities, or others."""
    cls, options = SCHEDULERS[name]
    extra = MODALITY_OPTIONS.get(name, {})
    modalities = {key: {**own, **extra} for key, own in (modalities or MODALITIES).items()}
    return cls(modalities=modalities, **options)


def seeds_to_generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """One fresh generator per seed."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def logits_of(sample: Tensor, num_columns: int, seed: int = 0) -> Tensor:
    """Logits of a fixed random row-wise model: they depend on the row's own columns alone."""
    table = torch.Generator().manual_seed(seed)
    length = sample.shape[1]
    embed = torch.randn(num_columns + 1, 64, 8, generator=table, dtype=torch.float64)[:, :length]
    head = torch.randn(8, 64, num_columns, generator=table, dtype=torch.float64)[:, :length]
    positions = torch.arange(length)
    # Summed in a fixed order, row by row, so that a batch and a single row agree bit for bit.
    rows = [embed[row, positions].cumsum(dim=0)[-1:] + embed[row, positions] for row in sample]
    return torch.stack([torch.einsum("nd,dnv->nv", row, head) for row in rows])


def run(
    scheduler: DiscreteScheduler,
    sample: Tensor,
    is_free: Tensor,
    modality: str,
    *,
    num_columns: int,
    num_inference_steps: int,
    seeds: Sequence[int],
    seed: int = 0,
    allowed: Tensor | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Run one group to its end as the loop does; returns the columns and each step's commits."""
    scheduler.set_timesteps(num_inference_steps)
    generators = seeds_to_generators(seeds)
    state = scheduler.begin(sample, is_free, modality)
    commits = []
    for timestep in scheduler.timesteps:
        if not bool((is_free & (sample == num_columns)).any()):
            break
        output = scheduler.step(
            logits_of(sample, num_columns, seed),
            timestep,
            sample,
            state=state,
            is_free=is_free,
            generator=generators,
            allowed=allowed,
        )
        sample, state = output.prev_sample, output.state
        commits.append(output.committed)
    return sample, commits


def masked_start(
    batch: int, length: int, num_columns: int, share_known: float, seed: int, lowest: int = 2
) -> tuple[Tensor, Tensor]:
    """Rows with some known tokens, `lowest` or above, and masks elsewhere; (sample, is_free)."""
    generator = torch.Generator().manual_seed(seed)
    is_known = torch.rand(batch, length, generator=generator) < share_known
    known = torch.randint(lowest, num_columns, (batch, length), generator=generator)
    return torch.where(is_known, known, num_columns), ~is_known
