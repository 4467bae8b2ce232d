"""Reverse processes: how masked tokens are drawn and in which order they are committed.

A scheduler works in the column space of one modality: columns 0..V-1 are tokens, V is the mask. It
never sees the unified vocabulary, a canvas or a model. A new scheduler is one file, one import line
here and one row in `tests/schedulers/registry.py`.
"""

from multimodal_dlm.schedulers.absorbing_ancestral import AbsorbingAncestralScheduler
from multimodal_dlm.schedulers.base import (
    DiscreteScheduler,
    DiscreteSchedulerOutput,
    SchedulerState,
)
from multimodal_dlm.schedulers.confidence import ConfidenceScheduler
from multimodal_dlm.schedulers.settings import ModalitySettings

__all__ = [
    "AbsorbingAncestralScheduler",
    "ConfidenceScheduler",
    "DiscreteScheduler",
    "DiscreteSchedulerOutput",
    "ModalitySettings",
    "SchedulerState",
]
