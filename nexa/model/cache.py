"""Keys and values of the tokens that a model has read, so that a new token need not read those again.

Kept are the keys after their norm and rotation and the values after their norm: what attention compares.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Cache(Protocol):
    """What the decoder asks of a cache. transformers' DynamicCache is one too, hence the names."""

    def get_seq_length(self) -> int:
        """Tokens read before this forward pass."""

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Put new keys and values [B, kv_heads, T, head_dim] of a block behind its old ones; all of them."""


class KeyValueCache:
    """Room for `capacity` tokens, taken in one piece per block when the block first writes. Without gradient."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._blocks: list[tuple[Tensor, Tensor]] = []
        self._lengths: list[int] = []

    def get_seq_length(self) -> int:
        """Tokens read before this forward pass."""
        return self._lengths[0] if self._lengths else 0

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """As `Cache.update`; views of the store. Raises ValueError when the new tokens have no room."""
        batch, heads, new, head_dim = key_states.shape
        if layer_idx == len(self._blocks):
            shape = batch, heads, self.capacity, head_dim
            self._blocks.append((key_states.new_empty(shape), value_states.new_empty(shape)))
            self._lengths.append(0)
        start = self._lengths[layer_idx]
        stop = start + new
        if stop > self.capacity:
            raise ValueError(f"the cache has room for {self.capacity} tokens and was given {stop}")
        self._lengths[layer_idx] = stop
        keys, values = self._blocks[layer_idx]
        keys[:, :, start:stop] = key_states
        values[:, :, start:stop] = value_states
        return keys[:, :, :stop], values[:, :, :stop]

    def keep(self, rows: Tensor) -> None:
        """Keep these rows of the batch (int64 indices) and forget the others."""
        self._blocks = [(keys[rows], values[rows]) for keys, values in self._blocks]
