"""Which source serves which sample: a pure function of the sample's number, with exact shares."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from nexa.errors import UserError

SMALLEST_SHARE = Fraction(1, 10**6)
"""Of a source; how far back the order must look to know a place grows with 1 / share."""
CHUNK = 2048
"""Samples whose sources are worked out at once."""
_KEPT = 4
"""Chunks remembered on either side of the last one: steps read ahead and steps reported are near each other."""


@dataclass(frozen=True)
class _Chunk:
    """counts: samples of each source before the chunk, and before the next one. sources: who serves each sample."""

    before: np.ndarray
    after: np.ndarray
    sources: np.ndarray


class Mixture:
    """A fixed interleaving of sources in proportion to their weights; none is ever a whole sample off its share.

    Among the first n samples, every source with share w has floor(n w) or ceil(n w) of them. Its item j = 1, 2, …
    may therefore come at sample floor((j - 1) / w) at the earliest and must come before sample ceil(j / w). Taking of
    all that may come the one that is due first (ties: the first source) keeps every date, because no stretch of
    samples [a, b) has more items that must fall inside, sum of floor(b w) - ceil(a w), than its length b - a, and
    there is always one that may come (Steiner and Yeomans 1993, "Level schedules for mixed-model, just-in-time
    processes", Management Science 39). Rational arithmetic: no drift, however long the run.

    The place of any sample is found without playing through those before it, see `_counts_at`.
    """

    def __init__(self, weights: Sequence[float | Fraction]) -> None:
        """`weights`: relative, at least one above 0.

        Raises `UserError` naming a weight that is not a number of 0 or more, or a share that is too small.
        """
        if not weights:
            raise UserError("data.source: an empty mixture; give at least one source")
        for number, weight in enumerate(weights):
            if not math.isfinite(weight) or weight < 0:
                raise UserError(f"data.source[{number}].weight: {weight}; must be a number of 0 or more")
        exact = [Fraction(str(weight)) for weight in weights]
        total = sum(exact, Fraction(0))
        if not total:
            raise UserError("data.source: all weights are 0; at least one must be larger")
        for number, weight in enumerate(exact):
            if 0 < weight < total * SMALLEST_SHARE:
                raise UserError(
                    f"data.source[{number}].weight: {weights[number]} is less than one sample in a million of this "
                    "mixture; raise it or leave the source out"
                )
        self._shares = [weight / total for weight in exact]
        self._active = [(source, share) for source, share in enumerate(self._shares) if share]
        # Before it, whatever may come is due within the window of the smallest source.
        self._memory = math.ceil(1 / min(share for _, share in self._active)) + 2
        self._chunks: dict[int, _Chunk] = {}

    def locate(self, start: int, stop: int) -> list[tuple[int, int]]:
        """(source, number of the sample within that source) of the samples [start, stop)."""
        places: list[tuple[int, int]] = []
        while start < stop:
            number, first = divmod(start, CHUNK)
            last = min(CHUNK, first + stop - start)
            counts = self.counts(start)
            for source in self._chunk(number).sources[first:last].tolist():
                places.append((source, counts[source]))
                counts[source] += 1
            start += last - first
        return places

    def counts(self, n: int) -> list[int]:
        """Samples of each source among the first `n`; they sum to n."""
        number, inside = divmod(n, CHUNK)
        chunk = self._chunk(number)
        return (chunk.before + np.bincount(chunk.sources[:inside], minlength=len(self._shares))).tolist()

    def _chunk(self, number: int) -> _Chunk:
        found = self._chunks.get(number)
        if found is None:
            before = self._chunks.get(number - 1)
            counts = self._counts_at(number * CHUNK) if before is None else before.after
            found = self._serve(number * CHUNK, counts)
            # A new table each time: two threads may ask at once.
            near = {other: chunk for other, chunk in self._chunks.items() if abs(other - number) < _KEPT}
            self._chunks = near | {number: found}
        return found

    def _serve(self, first: int, counts: np.ndarray) -> _Chunk:
        """The samples [first, first + CHUNK), given what each source has had before."""
        have = counts.tolist()
        waiting = [(_earliest(have[source] + 1, share), source, share) for source, share in self._active]
        ready: list[tuple[int, int, Fraction]] = []
        heapq.heapify(waiting)
        sources = np.empty(CHUNK, np.int32)
        for sample in range(first, first + CHUNK):
            while waiting and waiting[0][0] <= sample:
                _, source, share = heapq.heappop(waiting)
                heapq.heappush(ready, (_due(have[source] + 1, share), source, share))
            _, source, share = heapq.heappop(ready)
            sources[sample - first] = source
            have[source] += 1
            heapq.heappush(waiting, (_earliest(have[source] + 1, share), source, share))
        return _Chunk(counts, np.array(have, np.int64), sources)

    def _counts_at(self, n: int) -> np.ndarray:
        """Samples of each source before sample `n`, from the items of the last `_memory` samples alone.

        Each source has had floor(n w), and perhaps its next item too. Items that are due no later than a given one are
        served as if the others did not exist, so by sample n there have been min over s <= n of A(s) + n - s of
        them, with A(s) how many may come before sample s (the departures of a queue with one server). Where s lies
        before the window, A(s) >= s. Adding the possible next items in the order of their dates shows which were
        served.
        """
        counts = np.array([n * share.numerator // share.denominator for share in self._shares], np.int64)
        begin = max(0, n - self._memory)
        arrivals = np.zeros(n - begin + 1, np.int64)
        backlog = -begin
        for source, share in self._active:
            first = -(-begin * share.numerator // share.denominator)
            backlog += first
            items = range(first + 1, int(counts[source]) + 1)
            np.add.at(arrivals, np.array([_earliest(item, share) for item in items], np.int64) - begin + 1, 1)
        ahead = np.cumsum(arrivals) - np.arange(n - begin + 1) + backlog  # A(s) - s for s in [begin, n]
        served = int(counts.sum())
        possible = [(_due(int(counts[source]) + 1, share), source, share) for source, share in self._active]
        for _, source, share in sorted(possible):
            came = _earliest(int(counts[source]) + 1, share) - begin + 1
            if came < len(ahead):
                ahead[came:] += 1
            now = n + min(0, int(ahead.min()))
            counts[source] += now - served
            served = now
        return counts


def _earliest(item: int, share: Fraction) -> int:
    """First sample that item number `item` (from 1) of a source may be."""
    return (item - 1) * share.denominator // share.numerator


def _due(item: int, share: Fraction) -> int:
    """Sample before which item number `item` (from 1) of a source must have come."""
    return -(-item * share.denominator // share.numerator)
