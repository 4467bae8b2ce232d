"""Counter-based draws: a number is a pure function of its key, never of what was drawn before.

The generator is Philox 4x64-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"),
read as raw 64-bit words: NumPy promises that the words of a bit generator never change, while the
methods of `numpy.random.Generator` may. So the same key gives the same draws in every process, on
every machine and in every later version.
"""

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")
_WORD = 1 << 64


@lru_cache(maxsize=4096)
def _stream_key(seed: int, stream: str) -> int:
    """128-bit Philox key of a seed and the name of what is drawn."""
    digest = hashlib.sha256(f"{seed}|{stream}".encode()).digest()
    return int.from_bytes(digest[:16], "little")


class KeyedDraws:
    """A short sequence of draws that belongs to (seed, stream, counters).

    Args:
        seed: Any integer.
        stream: What is drawn, for example `"order/emoji"`; streams are independent of each other.
        counters: Up to three integers in 0..2^64 - 1, for example epoch and sample.

    Examples:
        >>> KeyedDraws(0, "demo", 3, 7).integer(10) == KeyedDraws(0, "demo", 3, 7).integer(10)
        True
    """

    def __init__(self, seed: int, stream: str, *counters: int) -> None:
        if len(counters) > 3:
            raise ValueError(f"`counters` must be at most three integers; got {len(counters)}.")
        # Word 0 of the counter runs while drawing; the words above it name the sequence.
        counter = sum((c % _WORD) << (64 * (i + 1)) for i, c in enumerate(counters))
        self._bits = np.random.Philox(key=_stream_key(seed, stream), counter=counter)

    def words(self, count: int) -> np.ndarray:
        """The next `count` raw 64-bit words."""
        return np.atleast_1d(self._bits.random_raw(count))

    def uniforms(self, count: int) -> np.ndarray:
        """The next `count` float64 numbers in [0, 1)."""
        return (self.words(count) >> np.uint64(11)) * (1.0 / (1 << 53))

    def uniform(self) -> float:
        """The next number in [0, 1)."""
        return float(self.uniforms(1)[0])

    def integer(self, stop: int) -> int:
        """The next integer in 0..stop - 1."""
        return min(int(self.uniform() * stop), stop - 1)

    def choice(self, options: Sequence[T], weights: Sequence[float] | None = None) -> T:
        """One of `options`, in proportion to `weights` (equal when None)."""
        return options[pick(self.uniform(), weights or [1.0] * len(options))]

    def permutation(self, count: int) -> np.ndarray:
        """A random order of 0..count - 1."""
        return np.argsort(self.words(count), kind="stable")


def pick(u: float, weights: Sequence[float]) -> int:
    """Index drawn with probabilities in proportion to `weights` by one uniform number u."""
    edges = np.cumsum(np.asarray(weights, dtype=np.float64))
    return min(int(np.searchsorted(edges, u * edges[-1], side="right")), len(weights) - 1)


def hash_fraction(*parts: Any) -> float:
    """Number in [0, 1) from the SHA-256 of the parts: decides splits, for ever the same."""
    digest = hashlib.sha256("|".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") / _WORD
