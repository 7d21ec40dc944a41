"""Which source serves which sample: a pure function of the sample's number, with exact shares."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from nexa.errors import UserError


class Mixture:
    """A fixed interleaving of sources in proportion to their weights.

    A chain of Bresenham splits, the heaviest source first: it takes item g iff floor((g + 1) p + 1/2) >
    floor(g p + 1/2) with p its share; what is left, renumbered, goes on to the next source with p its share of the
    rest, and so on. So every source sees its own samples in order without a gap. Two sources never stray from their
    shares by more than half a sample; with eight, 1.2 is the largest distance found (without the halves and the
    sorting, 4.7). Rational arithmetic: no drift, however long the run.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        """`weights`: relative, at least one above 0. Raises `UserError` naming the weight."""
        if not weights:
            raise UserError("data.source: an empty mixture; give at least one source")
        for number, weight in enumerate(weights):
            if not math.isfinite(weight) or weight < 0:
                raise UserError(f"data.source[{number}].weight: {weight}; must be a number of 0 or more")
        exact = [Fraction(str(weight)) for weight in weights]
        if not sum(exact):
            raise UserError("data.source: all weights are 0; at least one must be larger")
        self._order = sorted(range(len(exact)), key=lambda source: -exact[source])
        rest, self._shares = sum(exact, Fraction(0)), []
        for source in self._order:
            self._shares.append(exact[source] / rest if rest else Fraction(0))
            rest -= exact[source]

    def locate(self, start: int, stop: int) -> list[tuple[int, int]]:
        """(source, number of the sample within that source) of the samples [start, stop)."""
        places = []
        for item in range(start, stop):
            for source, share in zip(self._order, self._shares, strict=True):
                taken = _rounded(item, share)
                if _rounded(item + 1, share) > taken:
                    places.append((source, taken))
                    break
                item -= taken
        return places

    def counts(self, n: int) -> list[int]:
        """Samples of each source among the first `n`; they sum to n."""
        counts = [0] * len(self._order)
        for source, share in zip(self._order, self._shares, strict=True):
            counts[source] = _rounded(n, share)
            n -= counts[source]
        return counts


def _rounded(n: int, share: Fraction) -> int:
    """floor(n share + 1/2)."""
    return (2 * n * share.numerator + share.denominator) // (2 * share.denominator)
