"""Objectives by name. A new one is its own file and one line here."""

from typing import Any

from multimodal_dlm.errors import ConfigError, unknown_name
from multimodal_dlm.training.objectives.autoregressive import Autoregressive
from multimodal_dlm.training.objectives.base import Objective, ObjectiveOutput, Term
from multimodal_dlm.training.objectives.masked_diffusion import MaskedDiffusion
from multimodal_dlm.training.objectives.reconstruction import Reconstruction

OBJECTIVES: dict[str, type[Objective]] = {
    "autoregressive": Autoregressive,
    "masked_diffusion": MaskedDiffusion,
    "reconstruction": Reconstruction,
}


def build_objective(name: str, **options: Any) -> Objective:
    """An objective by name.

    Raises:
        ConfigError: When the name or an option does not exist.
    """
    if name not in OBJECTIVES:
        raise unknown_name("objective", name, OBJECTIVES)
    try:
        return OBJECTIVES[name](**options)
    except TypeError as error:
        raise ConfigError(f"`objective.options` of `{name}`: {error}.") from error


__all__ = [
    "OBJECTIVES",
    "Autoregressive",
    "MaskedDiffusion",
    "Objective",
    "ObjectiveOutput",
    "Reconstruction",
    "Term",
    "build_objective",
]
