"""Exponential moving average of the weights, in float32."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from typing import Self

import torch
from torch import Tensor, nn

from multimodal_dlm.errors import CheckpointError
from multimodal_dlm.training.shards import copy_whole, whole_tensors


class ExponentialMovingAverage:
    """avg <- d avg + (1 - d) w with d = min(decay, (1 + n) / (10 + n)) after n updates.

    Args:
        model: Gives names and first values.
        decay: In [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.num_updates = 0
        self.weights = {name: _copy(tensor) for name, tensor in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take the present weights in; integer tensors are copied."""
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        averages, values = [], []
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                averages.append(self.weights[name])
                values.append(tensor.to(self.weights[name].dtype))
            else:
                self.weights[name].copy_(tensor)
        torch._foreach_lerp_(averages, values, 1 - decay)

    def load(self, weights: Mapping[str, Tensor], num_updates: int) -> None:
        """Continue from saved averages.

        Raises:
            CheckpointError: When the names are not those of the model.
        """
        if set(weights) != set(self.weights):
            different = sorted(set(weights) ^ set(self.weights))[:3]
            raise CheckpointError(
                f"The averaged weights must have the model's tensor names; {different} differ."
            )
        for name, tensor in weights.items():
            copy_whole(self.weights[name], tensor)
        self.num_updates = num_updates

    def gathered(self, *, keep: bool) -> Self:
        """The same averages as whole tensors, if this process keeps them; all take part."""
        other = copy(self)
        other.weights = whole_tensors(self.weights, keep=keep)
        return other

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[nn.Module]:
        """The model with averaged weights inside, its own weights again after."""
        own = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        model.load_state_dict(self.weights)
        try:
            yield model
        finally:
            model.load_state_dict(own)


def _copy(tensor: Tensor) -> Tensor:
    kind = torch.float32 if tensor.dtype in (torch.float16, torch.bfloat16) else tensor.dtype
    return tensor.detach().clone().to(kind)
