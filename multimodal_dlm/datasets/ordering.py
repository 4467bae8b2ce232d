"""The order in which a source's samples and tasks come: a pure function of seed and draw number."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import accumulate

import numpy as np

from multimodal_dlm.datasets.sampling import KeyedDraws

WINDOW_SHARDS = 8


class SourceOrder:
    """Numbers of samples, pass after pass: shards permuted, then samples inside windows of shards.

    Every pass holds every sample once. Only the window in use is ever laid out, so a source may
    have any number of samples.

    Args:
        counts: Samples of each shard.
        seed: Seed of the run.
        stream: Name of the source.
        window_shards: Shards that are shuffled together; more mixes better and reads less locally.
    """

    def __init__(
        self, counts: Sequence[int], *, seed: int, stream: str, window_shards: int = WINDOW_SHARDS
    ) -> None:
        self.counts = tuple(counts)
        self.seed = seed
        self.stream = stream
        self.window_shards = window_shards
        self.size = sum(self.counts)
        self._starts = [0, *accumulate(self.counts)][:-1]
        self._windows = lru_cache(maxsize=4)(self._lay_out)
        self._passes = lru_cache(maxsize=2)(self._plan_pass)

    def __getitem__(self, draw: int) -> int:
        """Number of the sample that draw `draw` of the run gets."""
        which_pass, position = divmod(draw, self.size)
        ends = self._passes(which_pass)[1]
        window = int(np.searchsorted(ends, position, side="right"))
        first = int(ends[window - 1]) if window else 0
        return int(self._windows(which_pass, window)[position - first])

    def __getstate__(self) -> dict[str, object]:
        kept = ("counts", "seed", "stream", "window_shards")
        return {name: getattr(self, name) for name in kept}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def _plan_pass(self, which_pass: int) -> tuple[np.ndarray, np.ndarray]:
        """Order of the shards in a pass, and where its windows end."""
        draws = KeyedDraws(self.seed, f"shards/{self.stream}", which_pass)
        shards = draws.permutation(len(self.counts))
        ends = np.cumsum([self.counts[shard] for shard in shards])
        last = list(range(self.window_shards - 1, len(shards) - 1, self.window_shards))
        return shards, ends[[*last, len(shards) - 1]]

    def _lay_out(self, which_pass: int, window: int) -> np.ndarray:
        """Samples of one window in their order."""
        shards = self._passes(which_pass)[0]
        chosen = shards[window * self.window_shards : (window + 1) * self.window_shards]
        samples = np.concatenate(
            [np.arange(self._starts[s], self._starts[s] + self.counts[s]) for s in chosen]
        )
        draws = KeyedDraws(self.seed, f"window/{self.stream}", which_pass, window)
        return samples[draws.permutation(len(samples))]


class QuotaOrder:
    """Names in blocks: each block of `size` draws holds every name exactly as often as its share.

    Args:
        shares: Integer share of each name.
        seed: Seed of the run.
        stream: Name of what is shared out.
    """

    def __init__(self, shares: Mapping[str, int], *, seed: int, stream: str) -> None:
        self.shares = {name: share for name, share in shares.items() if share}
        self.seed = seed
        self.stream = stream
        divisor = int(np.gcd.reduce(list(self.shares.values())))
        self.quotas = {name: share // divisor for name, share in self.shares.items()}
        self.size = sum(self.quotas.values())
        self._block = [name for name, quota in self.quotas.items() for _ in range(quota)]
        self._firsts = dict(
            zip(self.quotas, [0, *accumulate(self.quotas.values())][:-1], strict=True)
        )
        self._orders = lru_cache(maxsize=8)(self._permute)

    def __getitem__(self, draw: int) -> tuple[str, int]:
        """Name of draw `draw`, and how many earlier draws of the run had that name's places."""
        block, position = divmod(draw, self.size)
        place = int(self._orders(block)[position])
        name = self._block[place]
        return name, block * self.quotas[name] + place - self._firsts[name]

    def __getstate__(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in ("shares", "seed", "stream")}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def _permute(self, block: int) -> np.ndarray:
        return KeyedDraws(self.seed, f"quota/{self.stream}", block).permutation(self.size)
