"""Where laws are known to go wrong: schedules unlike those they were fitted on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nexa.scaling.laws.base import Law
from nexa.scaling.laws.rates import Rates

NOTHING = 1e-6
"""A rate below this share of the peak trains nothing."""
PADDING = 0.01
"""Share of a run that may pass with such a rate: the end of a decay to 0, not a pause."""
HIGHER, REFUSED_HIGHER = 1.02, 1.5
"""Peak over the largest seen from which it is worth a word, and from which it is refused."""
SMALLER = 0.75
"""Peak over the largest seen below which it is worth a word: at half of it published runs are off by .02 to .19."""
LONGER, LOWER = 4.0, 0.5


@dataclass(frozen=True)
class Seen:
    """The range of the schedules of a fit."""

    peak_lr: float
    lowest_lr: float
    """After warm-up."""
    steps: int
    rises: bool
    """Whether a rate rose after warm-up."""


def seen(many: Sequence[Rates]) -> Seen:
    """The range of some schedules."""
    return Seen(
        max(rates.peak for rates in many),
        min(rates.lowest for rates in many),
        max(rates.total for rates in many),
        any(rises(rates) for rates in many),
    )


def rises(rates: Rates) -> bool:
    """Whether the rate ever rises after warm-up."""
    after = rates.values[rates.warmup : rates.total]
    return bool((np.diff(after) > 1e-9 * rates.peak).any())


def refusals(law: Law, range_: Seen | None, rates: Rates) -> list[str]:
    """Why the law's word on this schedule is worth nothing; [] when it may be used."""
    found = []
    idle = int((rates.values[rates.warmup : rates.total] <= NOTHING * rates.peak).sum())
    if "lambda" in law.fixed and idle > max(1, PADDING * rates.total):
        found.append(
            f"the rate is 0 for {idle} of {rates.total} steps: nothing is learned there, but the momentum of this law "
            "lets the loss fall on for about 1 / (1 - lambda) steps; end the schedule where the rate reaches 0"
        )
    if range_ is not None and rates.peak > REFUSED_HIGHER * range_.peak_lr:
        found.append(
            f"the peak rate {rates.peak:g} is {rates.peak / range_.peak_lr:.2g} times the largest fitted, "
            f"{range_.peak_lr:g}: laws of this kind reward any peak, however large; fit on runs with such a peak"
        )
    return found


def remarks(range_: Seen | None, rates: Rates) -> list[str]:
    """In what the schedule goes beyond those of the fit, short of a refusal."""
    if range_ is None:
        return []
    found = []
    if HIGHER * range_.peak_lr < rates.peak <= REFUSED_HIGHER * range_.peak_lr:
        found.append(f"peak rate {rates.peak:g} above the largest fitted ({range_.peak_lr:g}): expect too low a loss")
    if rates.peak < SMALLER * range_.peak_lr:
        found.append(
            f"peak rate {rates.peak:g}, fitted up to {range_.peak_lr:g}: no law carries over from peak to peak"
        )
    if rates.lowest < LOWER * range_.lowest_lr:
        found.append(f"rates down to {rates.lowest:g}, fitted down to {range_.lowest_lr:g}: the end is extrapolated")
    if rates.total > LONGER * range_.steps:
        found.append(f"{rates.total} steps, fitted on {range_.steps} at most")
    if rises(rates) and not range_.rises:
        found.append(
            "the rate rises again after warm-up, which no fitted curve does: the law takes a rise for a fall undone"
        )
    return found


def overlooked(law: Law, rates: Rates) -> list[str]:
    """What the law leaves out of account of what a run goes on from."""
    if rates.before is None or law.continual:
        return []
    return [
        f"goes on from a run of {rates.before.total} steps, which law {law.name} does not count; law continual does"
    ]
