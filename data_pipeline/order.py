"""The endless order of samples of a run: a pure function of the sample's number."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Protocol

import numpy as np

from data_pipeline.mixture import Mixture
from data_pipeline.permutation import Permutation, derive_key


class Order(Protocol):
    """`names` of the sources and how many `samples` each has, in the order of their numbers."""

    @property
    def names(self) -> list[str]:
        """Short and unique, for metrics."""
        ...

    @property
    def samples(self) -> list[int]:
        """Samples of one epoch of each source."""
        ...

    def locate(self, start: int, stop: int) -> list[tuple[int, int]]:
        """(source, sample of that source) of the samples [start, stop) of the order."""
        ...

    def counts(self, n: int) -> list[int]:
        """Samples of each source among the first `n`; they sum to n."""
        ...


@dataclass(frozen=True)
class Stage:
    """From sample number `start` of the order on, sources come in proportion to `weights` (0: not at all)."""

    start: int
    weights: Sequence[float]


class StagedOrder:
    """Sources in proportions that may change at given samples; each source goes on where it stopped.

    Item j of a source, counted over all stages, lies in epoch e = j // n of its n samples, and is its sample
    Permutation(n, key(seed, 0, name, e))(j % n), or j % n for a source in its file's order. So an epoch holds every
    sample once, wherever stages end.
    """

    def __init__(
        self,
        names: Sequence[str],
        samples: Sequence[int],
        stages: Sequence[Stage],
        seed: int,
        in_file_order: Sequence[bool] | None = None,
    ) -> None:
        """`stages`: from the first, which starts at 0, by rising start; each with a weight for every source.

        Raises `UserError` for impossible weights.
        """
        assert stages[0].start == 0 and all(len(stage.weights) == len(names) for stage in stages)
        self.names, self.samples = list(names), list(samples)
        self._seed, self._in_file_order = seed, in_file_order or [False] * len(names)
        self._starts = [stage.start for stage in stages]
        assert self._starts == sorted(self._starts)
        self._mixtures = [Mixture(stage.weights) for stage in stages]
        self._before = [[0] * len(names)]
        for mixture, start, end in zip(self._mixtures, self._starts, self._starts[1:], strict=False):
            self._before.append(_sum(self._before[-1], mixture.counts(end - start)))
        # Epochs change rarely: a handful of permutations serves every step.
        self._permutation = lru_cache(maxsize=4 * len(names))(self._make_permutation)

    def _make_permutation(self, source: int, epoch: int) -> Permutation:
        return Permutation(self.samples[source], derive_key(self._seed, 0, self.names[source], epoch))

    def counts(self, n: int) -> list[int]:
        """Samples of each source among the first `n`; they sum to n."""
        stage = bisect_right(self._starts, n) - 1
        return _sum(self._before[stage], self._mixtures[stage].counts(n - self._starts[stage]))

    def locate(self, start: int, stop: int) -> list[tuple[int, int]]:
        """(source, sample of that source) of the samples [start, stop) of the order."""
        places: list[tuple[int, int]] = []
        while start < stop:
            stage = bisect_right(self._starts, start) - 1
            end = min([stop, *self._starts[stage + 1 : stage + 2]])
            first, before = self._starts[stage], self._before[stage]
            inside = self._mixtures[stage].locate(start - first, end - first)
            places += [(source, before[source] + own) for source, own in inside]
            start = end
        self._permute(places)
        return places

    def _permute(self, places: list[tuple[int, int]]) -> None:
        """Items of sources to samples of sources, in place."""
        groups: dict[tuple[int, int], list[int]] = {}
        for row, (source, own) in enumerate(places):
            groups.setdefault((source, own // self.samples[source]), []).append(row)
        for (source, epoch), rows in groups.items():
            inside = np.array([places[row][1] - epoch * self.samples[source] for row in rows])
            if not self._in_file_order[source]:
                inside = self._permutation(source, epoch)(inside)
            for row, sample in zip(rows, inside.tolist(), strict=True):
                places[row] = (source, sample)


class ReplayOrder:
    """A share of an older order, from its first sample on and as it was, among a new one.

    Sources of the old order follow those of the new one and are called `replay_<name>`.
    """

    def __init__(self, new: Order, old: Order, share: float) -> None:
        """`share`: of all samples, in [0, 1); among the first n the old order has floor or ceil of share n."""
        self._parts, self._mixture = (new, old), replay_mixture(share)
        self._first = len(new.names)
        self.names = unique([*new.names, *(f"replay_{name}" for name in old.names)])
        self.samples = [*new.samples, *old.samples]

    def counts(self, n: int) -> list[int]:
        """Samples of each source among the first `n`; they sum to n."""
        parts = zip(self._parts, self._mixture.counts(n), strict=True)
        return [count for part, own in parts for count in part.counts(own)]

    def locate(self, start: int, stop: int) -> list[tuple[int, int]]:
        """(source, sample of that source) of the samples [start, stop) of the order."""
        mixed = self._mixture.locate(start, stop)
        taken = [[own for which, own in mixed if which == part] for part in (0, 1)]
        found = [
            iter(part.locate(own[0], own[-1] + 1) if own else []) for part, own in zip(self._parts, taken, strict=True)
        ]
        places = ((which, next(found[which])) for which, _ in mixed)
        return [(which * self._first + source, sample) for which, (source, sample) in places]


def replay_mixture(share: float) -> Mixture:
    """Of a new order and an old one that has this share of all samples."""
    part = Fraction(str(share))
    return Mixture([1 - part, part])


def _sum(first: Sequence[int], second: Sequence[int]) -> list[int]:
    return [a + b for a, b in zip(first, second, strict=True)]


def unique(names: Sequence[str]) -> list[str]:
    """Names; a repeated one gets `_2`, `_3`, … so that metrics and orders of two sources never mix."""
    found: list[str] = []
    for given in names:
        name, number = given, 1
        while name in found:
            number += 1
            name = f"{given}_{number}"
        found.append(name)
    return found


def first_beyond(order: Order, source: int, limit: int, end: int) -> int | None:
    """The smallest n <= `end` for which the first n samples have more than `limit` of a source, None if there is none.

    O(log end): counts only grow.
    """
    if order.counts(end)[source] <= limit:
        return None
    low, high = 0, end
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if order.counts(middle)[source] <= limit else (low, middle)
    return high


def stage_starts(
    at_tokens: Sequence[int], sequence_length: int, batch: int, position: int = 0, passed: Sequence[int] = ()
) -> list[int]:
    """The samples at which stages begin: at `at_tokens` target tokens, rounded up to a whole global batch.

    position: the sample at which batches of size `batch` began, 0 unless a run goes on; passed: starts that held
    before, of which those up to `position` stay. So a run that goes on with another batch size changes the mixture
    between its own batches and leaves the past as it was.
    """
    starts = []
    for number, tokens in enumerate(at_tokens):
        if number < len(passed) and passed[number] <= position:
            starts.append(passed[number])
        else:
            samples = -(-tokens // sequence_length)
            starts.append(position + -(-(samples - position) // batch) * batch)
    return starts
