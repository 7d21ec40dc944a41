"""A random order of any number of items in constant memory."""

from __future__ import annotations

import hashlib
import math

import numpy as np

TABLE_LIMIT = 1024
"""Sizes up to this are permuted by an explicit table, where every order is possible."""
MAX_SIZE = 1 << 60
ROUNDS = 8
_MASK = (1 << 64) - 1


def derive_key(*parts: object) -> int:
    """A 64-bit key from (seed, stage, source, epoch, …): any change of any part gives an unrelated key."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "little")


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014): uint64 to uint64, every bit depends on every bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Permutation:
    """A bijection of [0, size), a pure function of (size, key).

    A Feistel network on pairs (left, right) of a grid just larger than `size`, halves combined by modular addition
    (format-preserving encryption, Black and Rogaway 2002); a result outside [0, size) is permuted again until it falls
    inside ("cycle walking"), which is rare: the grid has at most 2 sqrt(size) + 1 surplus cells.
    """

    def __init__(self, size: int, key: int) -> None:
        """`size` from 1 to 2^60; `key` any 64-bit number, see `derive_key`."""
        if not 1 <= size <= MAX_SIZE:
            raise ValueError(f"size {size} is not in [1, 2^60]")
        self.size = size
        with np.errstate(over="ignore"):
            counters = np.arange(1, ROUNDS + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
            self._keys = _mix(np.uint64(key & _MASK) + counters)
        self._columns = math.isqrt(size - 1) + 1
        self._rows = -(-size // self._columns)
        self._table = self._small_table() if size <= TABLE_LIMIT else None

    def _small_table(self) -> np.ndarray:
        with np.errstate(over="ignore"):
            draws = _mix(self._keys[0] + np.arange(self.size, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))
        return np.argsort(_mix(draws ^ self._keys[1]), kind="stable").astype(np.int64)

    def _encrypt(self, index: np.ndarray) -> np.ndarray:
        rows, columns = np.uint64(self._rows), np.uint64(self._columns)
        left: np.ndarray = index // columns
        right: np.ndarray = index % columns
        with np.errstate(over="ignore"):
            for first, second in self._keys.reshape(-1, 2):
                left = (left + _mix(right * np.uint64(0x9E3779B97F4A7C15) + first) % rows) % rows
                right = (right + _mix(left * np.uint64(0x9E3779B97F4A7C15) + second) % columns) % columns
        return left * columns + right

    def __call__(self, indices: np.ndarray | int) -> np.ndarray:
        """Images of indices in [0, size), same shape, int64.

        Raises IndexError for an index outside.
        """
        given = np.asarray(indices, dtype=np.int64)
        if given.size and (given.min() < 0 or given.max() >= self.size):
            raise IndexError(f"index outside [0, {self.size})")
        if self._table is not None:
            return self._table[given]
        out = self._encrypt(given.ravel().astype(np.uint64))
        while (outside := np.flatnonzero(out >= self.size)).size:
            out[outside] = self._encrypt(out[outside])
        return out.astype(np.int64).reshape(given.shape)
