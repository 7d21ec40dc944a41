"""What one rank owns of one logical parameter."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

WEIGHT = "weight"
"""Key of the master weight in `Fragment.tensors`; every other key is optimizer state."""


@dataclass(frozen=True)
class Fragment:
    """What this rank owns of one logical parameter: flat elements [start, stop) of the full row-major tensor.

    Raises ValueError when the numbers do not fit each other.
    """

    name: str
    """Checkpoint name, e.g. `model.layers.0.self_attn.q_proj.weight`."""
    shape: tuple[int, ...]
    """Shape of the whole parameter."""
    start: int
    """First element owned."""
    stop: int
    """One past the last element owned."""
    tensors: dict[str, torch.Tensor]
    """1-D contiguous views of live memory, length stop - start: `weight` (master), `exp_avg`, …; loading writes
    into them."""
    scalars: dict[str, float]
    """State that is one number per parameter, such as {"step": 12.0}."""

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.stop <= math.prod(self.shape):
            raise ValueError(f"{self.name}: [{self.start}, {self.stop}) is no range of shape {self.shape}")
        for state, tensor in self.tensors.items():
            if tensor.shape != (self.numel,) or not tensor.is_contiguous():
                raise ValueError(f"{self.name}: {state} is {tuple(tensor.shape)}, not ({self.numel},) contiguous")

    @property
    def numel(self) -> int:
        """Elements owned; the length of each tensor."""
        return self.stop - self.start

    @property
    def ranges(self) -> tuple[tuple[int, int, int], ...]:
        """(start, stop, offset): elements [start, stop) of the whole lie from `offset` on in the tensors.

        Planning, sending and loading know a fragment by this list alone, so a fragment of several ranges
        (a tensor-parallel slice) needs no more than another list here.
        """
        return ((self.start, self.stop, 0),) if self.numel else ()
