"""Which part of a whole tensor a process holds: the word that model, engine and checkpoint share. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Run:
    """Elements that lie contiguously in a shard and at regular distances in the whole tensor.

    `rows` stretches of `width` elements: the k-th is [start + k stride, start + k stride + width) of the row-major
    whole and [offset + k width, offset + (k + 1) width) of the row-major shard.
    """

    start: int
    width: int
    rows: int
    stride: int
    offset: int


@dataclass(frozen=True, order=True)
class Shard:
    """Indices [start, stop) of dimension `dim` of a tensor of shape `shape`; everything along the other dimensions.

    Memory that pads a shard to an equal size on all ranks lies behind it and is no part of it.
    """

    shape: tuple[int, ...]
    dim: int
    start: int
    stop: int

    def __post_init__(self) -> None:
        if not (0 <= self.dim < len(self.shape) and 0 <= self.start <= self.stop <= self.shape[self.dim]):
            raise ValueError(f"no shard: {self}")

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> Shard:
        """All of a tensor; a scalar has shape (1,)."""
        return cls(shape, 0, 0, shape[0])

    @property
    def is_whole(self) -> bool:
        """Whether nothing is missing."""
        return self.stop - self.start == self.shape[self.dim]

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of the part."""
        return (*self.shape[: self.dim], self.stop - self.start, *self.shape[self.dim + 1 :])

    @property
    def numel(self) -> int:
        """Elements of the part."""
        return math.prod(self.local_shape)

    def take(self, whole: Tensor) -> Tensor:
        """The part, as a view of `whole`."""
        assert tuple(whole.shape) == self.shape, (whole.shape, self)
        return whole.narrow(self.dim, self.start, self.stop - self.start)

    def runs(self, start: int, stop: int) -> Iterator[Run]:
        """Where elements [start, stop) of the flattened part lie in the flattened whole; at most three runs.

        `offset` of the runs counts from the beginning of the part.
        """
        assert 0 <= start <= stop <= self.numel, (start, stop, self)
        inner = math.prod(self.shape[self.dim + 1 :])
        width, stride, first = (self.stop - self.start) * inner, self.shape[self.dim] * inner, self.start * inner
        at = start
        while at < stop:
            row, inside = divmod(at, width)
            whole_rows = (stop - at) // width if inside == 0 else 0
            length = width if whole_rows else min(width - inside, stop - at)
            yield Run(first + row * stride + inside, length, whole_rows or 1, stride, at)
            at += length * (whole_rows or 1)


def shard_of(parameter: Tensor) -> Shard:
    """What `parameter`, or a buffer, is a part of; without a mark it is whole. Works for partitioned (ZeRO-3) ones."""
    mark: Shard | None = getattr(parameter, "nexa_shard", None)
    return Shard.whole(tuple(getattr(parameter, "ds_shape", parameter.shape))) if mark is None else mark
