"""Optimizer state as named tensors and JSON, whole on every kind of parallelism."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

_OPTIONS = StateDictOptions(full_state_dict=True, cpu_offload=True)
_SEPARATOR = "//"
# What a config sets in every group; the learning rate is set anew in each step.
_SETTINGS = ("betas", "eps", "weight_decay", "momentum")


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Full weights by name, copied; on the main process alone when there are several."""
    full: dict[str, Any] = get_model_state_dict(model, options=_OPTIONS)
    return {name: _owned(tensor) for name, tensor in full.items()}


def restore_model(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load what `model_tensors` gave."""
    options = StateDictOptions(full_state_dict=True)
    set_model_state_dict(model, dict(tensors), options=options)


def optimizer_tensors(
    model: nn.Module, optimizer: Optimizer
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """State tensors named `<parameter>//<entry>`, and the parameter groups as JSON values.

    On the main process alone when there are several.
    """
    full: Any = get_optimizer_state_dict(model, optimizer, options=_OPTIONS)
    tensors = {
        f"{name}{_SEPARATOR}{entry}": _owned(torch.as_tensor(value))
        for name, entries in full.get("state", {}).items()
        for entry, value in entries.items()
    }
    groups = [
        {key: value for key, value in group.items() if not isinstance(value, Tensor)}
        for group in full.get("param_groups", [])
    ]
    return tensors, groups


def restore_optimizer(
    model: nn.Module,
    optimizer: Optimizer,
    tensors: Mapping[str, Tensor],
    groups: list[dict[str, Any]],
) -> None:
    """Load what `optimizer_tensors` gave; betas, eps and weight decay stay the optimizer's own."""
    groups_now = optimizer.param_groups
    own = [{name: group[name] for name in _SETTINGS if name in group} for group in groups_now]
    state: dict[str, Any] = {}
    for name, tensor in tensors.items():
        parameter, entry = name.split(_SEPARATOR)
        state.setdefault(parameter, {})[entry] = tensor
    whole: dict[str, Any] = {"state": state, "param_groups": [dict(group) for group in groups]}
    set_optimizer_state_dict(
        model,
        optimizer,
        whole,
        options=StateDictOptions(full_state_dict=True),
    )
    for group, settings in zip(optimizer.param_groups, own, strict=True):
        group.update(settings)


def _owned(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()
