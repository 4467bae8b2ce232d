"""What the native halves of a block take: tables of modulation, and weights in their own layout."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from multimodal_dlm.models.fused import is_bare_linear

MAX_KEPT = 2**25  # Bytes of a weight in a second layout.
NUM_SAMPLED = 64  # Values by which a change of a weight is noticed.


class Tables(NamedTuple):
    """What a half block does to a token beside its layers, by the token's level; float32.

    Attributes:
        factor: Multiplied into the normalised token.
        shift: Added to it.
        gate: Multiplied into the half's output before it is added.
        rows: Row of the tables for each token, int32.
    """

    factor: Float[Tensor, "levels width"]
    shift: Float[Tensor, "levels width"]
    gate: Float[Tensor, "levels width"]
    rows: Int[Tensor, " tokens"]


def weights_of(layers: Iterable[Any]) -> list[Tensor]:
    """The weight of each linear layer."""
    return [layer.weight for layer in layers]


def are_bare(layers: Iterable[nn.Module], *dtypes: torch.dtype) -> bool:
    """True for linear layers that are only their weights, on the CPU and in one of some dtypes."""
    return all(is_bare_linear(layer) for layer in layers) and all(
        weight.device.type == "cpu" and weight.dtype in dtypes for weight in weights_of(layers)
    )


def sample(weight: Tensor) -> Float[Tensor, " sampled"]:
    """About `NUM_SAMPLED` values from all over a weight, as a view of it where it is contiguous."""
    flat = weight.detach().contiguous().view(-1)
    step = max(1, flat.numel() // NUM_SAMPLED)
    columns = max(1, weight.shape[-1:].numel())
    return flat[:: step + (step % columns == 0)]  # Of many columns, not of one.


class Layout(NamedTuple):
    """How kernels read a weight.

    Attributes:
        pack: From the weight to the tensor that they read, of as many values.
        itemsize: Bytes of a value there.
    """

    pack: Callable[[Tensor], Tensor]
    itemsize: int

    def can_keep(self, weight: Tensor) -> bool:
        """True for a weight small enough to be kept in this layout beside its own."""
        return weight.numel() * self.itemsize <= MAX_KEPT


class _Packed(NamedTuple):
    layout: Layout
    version: int
    pointer: int
    sample: Tensor  # A view of the weight: while it lives no other tensor has the storage.
    sampled: Tensor
    panels: Tensor


class PackedWeights:
    """Weights of one half of a block as the kernels read them, kept between forwards.

    A weight counts as unchanged while its storage, its version and a sample of its values are the
    same: PyTorch counts no changes through `.data`, such as merged adapters. Copies of a model and
    pickles begin with none.
    """

    def __init__(self) -> None:
        self._kept: dict[int, _Packed] = {}

    def __call__(self, weights: Sequence[Tensor], layout: Layout) -> list[Tensor]:
        """The weights laid out, always asked for in the same order."""
        return [self._panels(place, weight, layout) for place, weight in enumerate(weights)]

    def _panels(self, place: int, weight: Tensor, layout: Layout) -> Tensor:
        kept = self._kept.get(place)
        version = 0 if weight.is_inference() else weight._version
        if (
            kept is None
            or (kept.version, kept.pointer) != (version, weight.data_ptr())
            or kept.layout is not layout
            or kept.sample.dtype != weight.dtype
            or not torch.equal(kept.sample, kept.sampled)
        ):
            view = sample(weight)
            panels = layout.pack(weight)
            pointer = weight.data_ptr()
            kept = _Packed(layout, version, pointer, view, view.clone(), panels)
            self._kept[place] = kept
        return kept.panels

    def __reduce__(self) -> tuple[type["PackedWeights"], tuple[()]]:
        return PackedWeights, ()
