"""Counts the bytes of tensors that are alive, so that peaks are the same in every run."""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Present and highest sum of the sizes of all storages that operators returned and still live.

    What a single operator allocates and frees inside itself is not seen.

    Args:
        tensors: Alive from before: parameters, optimizer state, inputs.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        self.present = self.peak = 0
        self._storages: dict[int, Any] = {}
        for tensor in tensors:
            self._add(tensor)

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf)
        return result

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return
        size = storage.nbytes()

        def forget(_: Any) -> None:
            del self._storages[key]
            self.present -= size

        self._storages[key] = weakref.ref(storage, forget)
        self.present += size
        self.peak = max(self.peak, self.present)


def peak_bytes(step: Callable[[], Any], tensors: Iterable[Tensor]) -> int:
    """Highest sum of live tensor bytes during a call."""
    with LiveBytes(tensors) as counter:
        step()
    return counter.peak


def held_tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Parameters, buffers and optimizer state."""
    state = [value for entry in optimizer.state.values() for value in entry.values()]
    held = [*model.parameters(), *model.buffers(), *state]
    return [tensor for tensor in held if isinstance(tensor, Tensor)]
