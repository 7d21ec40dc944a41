"""Which source serves which sample: a pure function of the sample's number, with exact shares."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from nexa.errors import UserError


class Mixture:
    """A fixed interleaving of sources in proportion to their weights.

    The stream of samples is split by a chain of Bresenham splits: source 1 takes item g iff
    floor((g + 1) p) > floor(g p) with p its share; what is left, renumbered, goes on to source 2, and so on. So every
    source sees its own samples in order without a gap, and two sources never stray from their shares by a whole sample
    (more sources: by less than two in practice). Rational arithmetic: no drift, however long the run.
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
        rest = [sum(exact[number:], Fraction(0)) for number in range(len(exact))]
        self._shares = [weight / left if left else Fraction(0) for weight, left in zip(exact, rest, strict=True)]

    def locate(self, start: int, stop: int) -> list[tuple[int, int]]:
        """(source, number of the sample within that source) of the samples [start, stop)."""
        places = []
        for item in range(start, stop):
            for source, share in enumerate(self._shares):
                taken = item * share.numerator // share.denominator
                if (item + 1) * share.numerator // share.denominator > taken:
                    places.append((source, taken))
                    break
                item -= taken
        return places

    def counts(self, n: int) -> list[int]:
        """Samples of each source among the first `n`; they sum to n."""
        counts = []
        for share in self._shares:
            taken = n * share.numerator // share.denominator
            counts.append(taken)
            n -= taken
        return counts
