"""Row numbers that take no memory: the rows of a split as ranges, and a random order of them as a function.

An order of n rows as an array takes 8n bytes, 80 GB for 10^10 rows. `Shuffled` computes the place of any row in it
instead: a Feistel network is a bijection of [0, 2^bits) for any round function, and where it leaves [0, n) it is
applied again until it comes back (Black and Rogaway 2002, "Ciphers with arbitrary finite domains", §3). Small
domains have too few round functions to reach every order alike, so there the order is an array after all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import numpy as np
import numpy.typing as npt

Int64 = npt.NDArray[np.int64]

_ROUNDS = 6
_SMALL = 1 << 16
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))  # of splitmix64


class Rows:
    """Ascending row numbers, kept as ranges; reads like an array of them."""

    def __init__(self, starts: Sequence[int] | Int64, lengths: Sequence[int] | Int64) -> None:
        """Ranges in ascending order that do not overlap; those that touch are joined."""
        start, length = np.asarray(starts, dtype=np.int64), np.asarray(lengths, dtype=np.int64)
        start, length = start[length > 0], length[length > 0]
        first = np.ones(len(start), dtype=bool)
        first[1:] = start[1:] > start[:-1] + length[:-1]
        self._starts = start[first]
        self._offsets = np.zeros(len(self._starts) + 1, dtype=np.int64)
        if len(start):
            self._offsets[1:] = np.cumsum(np.add.reduceat(length, np.flatnonzero(first)))

    @classmethod
    def of(cls, numbers: npt.ArrayLike) -> Rows:
        """The given ascending numbers."""
        rows = np.asarray(numbers, dtype=np.int64)
        return cls(rows, np.ones_like(rows))

    def __len__(self) -> int:
        return int(self._offsets[-1])

    @overload
    def __getitem__(self, place: int) -> int: ...
    @overload
    def __getitem__(self, place: slice | Int64) -> Int64: ...
    def __getitem__(self, place: int | slice | Int64) -> int | Int64:
        if isinstance(place, slice):
            place = np.arange(*place.indices(len(self)), dtype=np.int64)
        elif not isinstance(place, np.ndarray):
            return int(self[np.array([place])][0])
        if len(place) and not -1 < place.min() <= place.max() < len(self):
            raise IndexError(
                f"there are {len(self)} rows, asked for {place.min()} to {place.max()}"
            )
        which = np.searchsorted(self._offsets, place, side="right") - 1
        found: Int64 = self._starts[which] + (place - self._offsets[which])
        return found

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        return self[:].astype(dtype or np.int64)


class Shuffled:
    """A random order of 0 to n - 1, the same for the same seed; any part of it at the cost of that part."""

    def __init__(self, n: int, seed: Sequence[int]) -> None:
        self.n = n
        self._array: Int64 | None = None
        if n <= _SMALL:
            self._array = np.random.default_rng(list(seed)).permutation(n)
        bits = max(2, int(n - 1).bit_length())
        self._right = np.uint64(bits // 2)
        self._left = np.uint64(bits - bits // 2)
        self._keys = np.random.default_rng(list(seed)).integers(0, 2**64, _ROUNDS, dtype=np.uint64)

    def at(self, places: Int64) -> Int64:
        """What stands at those places of the order."""
        if self._array is not None:
            return self._array[places]
        found = self._network(places.astype(np.uint64))
        outside = found >= self.n
        while outside.any():
            found[outside] = self._network(found[outside])
            outside = found >= self.n
        return found.astype(np.int64)

    def _network(self, x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        """The bijection of [0, 2^bits): halves change places in every round, and so do their widths."""
        one = np.uint64(1)
        low_bits, high_bits = self._right, self._left
        for key in self._keys:
            low_mask, high_mask = (one << low_bits) - one, (one << high_bits) - one
            high, low = x >> low_bits, x & low_mask
            mixed = (high ^ (_mixed(low ^ key) & high_mask)) & high_mask
            x = (low << high_bits) | mixed
            low_bits, high_bits = high_bits, low_bits
        return x


def _mixed(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finalizer of splitmix64 (Steele, Lea and Flood 2014)."""
    x = (x ^ (x >> np.uint64(30))) * _MIX[0]
    x = (x ^ (x >> np.uint64(27))) * _MIX[1]
    return x ^ (x >> np.uint64(31))
