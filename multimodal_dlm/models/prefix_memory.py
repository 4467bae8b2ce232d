"""What calls leave to later ones: prefixes, and the tables of noise levels that were met."""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from multimodal_dlm.models.cache_base import LayerStore, Tokens
from multimodal_dlm.models.native.weights import sample
from multimodal_dlm.models.noise_conditioning import Modulation, NoiseConditioning, level_index

NUM_LEVEL_SETS = 64  # A window of n tokens written one by one meets n of them.


@dataclass(frozen=True)
class Prefix:
    """What a row's prefix left: (keys, heads, dim) twice for each layer, (keys, width) states.

    Padding is left out, so that it serves the same tokens wherever they stand.
    """

    keys_values: Mapping[int, tuple[Tensor, Tensor]]
    states: Float[Tensor, "keys width"]


class Recorder(LayerStore):
    """A layer store that keeps what passes through, for a forward of prefixes alone."""

    def __init__(self) -> None:
        self._length = 0
        self._keys_values: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def length(self) -> int:
        """Columns of the prefixes."""
        return self._length

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values given."""
        self._length = keys.shape[1]
        self._keys_values[layer] = (keys.detach(), values.detach())
        return keys, values

    def prefix(self, states: Tensor, row: int, is_there: Bool[Tensor, " columns"]) -> Prefix:
        """What one row left in the columns where it has a token."""
        parts = {
            layer: (keys[row, is_there], values[row, is_there])
            for layer, (keys, values) in self._keys_values.items()
        }
        return Prefix(parts, states[row, is_there].detach())


class LevelMemory:
    """Features and finished tables by the set of levels present, the oldest dropped first."""

    def __init__(self) -> None:
        self._entries: OrderedDict[tuple[int, ...], tuple[Tensor, dict]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()

    def modulation(self, conditioning: NoiseConditioning, tokens: Tokens) -> Modulation | None:
        """What `conditioning` says of some tokens; its network runs on new sets of levels only."""
        if conditioning.kind == "none" or tokens.has_conditioning:
            return conditioning(tokens.noise_levels, tokens.conditioning_embeds)
        levels, rows = level_index(tokens.noise_levels).unique(return_inverse=True)
        key = tuple(levels.tolist())
        if key not in self._entries:
            made = conditioning(tokens.noise_levels)
            self._entries[key] = (made.features, {})
            if len(self._entries) > NUM_LEVEL_SETS:
                self._entries.popitem(last=False)
        features, known = self._entries[key]
        self._entries.move_to_end(key)
        return Modulation(features, rows, known)


class PrefixMemory:
    """Prefixes by content, the least recently used dropped first; emptied when weights change.

    Args:
        capacity: Rows' prefixes to keep.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.levels = LevelMemory()
        self._entries: OrderedDict[bytes, Prefix] = OrderedDict()
        self._weights: tuple[Any, ...] | None = None

    def __contains__(self, key: bytes) -> bool:
        return key in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: bytes) -> Prefix | None:
        """The prefix of this content, or None."""
        if key in self._entries:
            self._entries.move_to_end(key)
        return self._entries.get(key)

    def add(self, prefixes: Mapping[bytes, Prefix]) -> None:
        """Keep prefixes, and drop the oldest beyond the capacity."""
        for key, prefix in prefixes.items():
            self._entries[key] = prefix
        while len(self._entries) > self.capacity:
            self._entries.popitem(last=False)

    def check(self, model: torch.nn.Module) -> None:
        """Forget everything if the weights are not those of the last call.

        Versions tell in-place changes, and a sample of the values of every parameter those that
        PyTorch does not count, such as adapters merged through `.data`.
        """
        parameters = list(model.parameters())
        device = parameters[0].device.type
        is_cast = torch.is_autocast_enabled(device)
        now = (
            sum(0 if p.is_inference() else p._version for p in parameters),
            (
                torch.get_autocast_dtype(device) if is_cast else None,
                *((p.data_ptr(), p.dtype) for p in parameters),
            ),
            torch.cat([_probe(p) for p in parameters]),
        )
        before, self._weights = self._weights, now
        if before is None or before[:2] != now[:2] or not torch.equal(before[2], now[2]):
            self._entries.clear()
            self.levels.clear()


@torch.no_grad()
def _probe(parameter: Tensor) -> Float[Tensor, " sampled"]:
    """Some of its values, in float32 where they are so and else in float64."""
    values = sample(parameter).cpu()
    return values if values.dtype == torch.float32 else values.double()
