"""Whole tensors of shards, and shards of whole tensors; both leave plain tensors alone."""

from collections.abc import Mapping

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def whole_tensors(tensors: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Gather tensors one after the other, in every process, into the memory of those that keep.

    Args:
        tensors: Shards or plain tensors, the same names in every process.
        keep: Whether this process wants them; others only take part.

    Returns:
        Shards gathered on the CPU, plain tensors as they are; nothing without `keep`.
    """
    whole: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        full = tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor
        if keep:
            whole[name] = full
    return whole


def copy_whole(target: Tensor, whole: Tensor) -> None:
    """Write a whole tensor, the same in every process, into a tensor or its shards."""
    if isinstance(target, DTensor):
        local = whole.to(device=target.device, dtype=target.dtype)
        whole = distribute_tensor(local, target.device_mesh, target.placements)
    target.copy_(whole)
