"""The forward-momentum law (arXiv 2512.13705)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from scipy.signal import lfilter

from nexa.errors import UserError
from nexa.scaling.laws.base import Law, area, power
from nexa.scaling.laws.rates import Floats, Rates

FIRST, SECOND = 0.9, 0.999
SECOND_SCALE, TINY = 1e5, 1e-8


@dataclass(frozen=True)
class Momenta:
    """S and M at the rows [n]."""

    forward: Floats
    momentum: Floats


def forward_momentum(falls: Floats) -> Floats:
    """M [n] of falls [n]: running sum of Adam's update for them, first moment over the root of 1e5 times the second.

    Bias is corrected with exponent i + 1 for entry i, from 0.
    """
    first = lfilter([1 - FIRST], [1.0, -FIRST], falls)
    second = lfilter([1 - SECOND], [1.0, -SECOND], falls**2)
    power_of = np.arange(len(falls)) + 1.0
    first, second = first / (1 - FIRST**power_of), SECOND_SCALE * second / (1 - SECOND**power_of)
    return np.cumsum(first / (np.sqrt(second + TINY) + TINY))


class ForwardMomentum(Law):
    """L = L0 + A S1^-alpha - C M, with M over the rows of the curve.

    M adds up over logged rows, not over updates: it depends on how often a curve is logged, and parameters fitted on
    one grid hold on that grid only. Curves of one fit should have one grid.
    """

    name = "forward_momentum"
    linear = ("L0", "A", "C")
    shape: ClassVar[tuple[str, ...]] = ("alpha",)
    order = ("L0", "A", "alpha", "C")
    bounds: ClassVar = {"alpha": (1e-3, 10.0)}
    grid: ClassVar = {"alpha": (0.15, 0.25, 0.35, 0.45, 0.55, 0.7, 0.9, 1.2)}

    def features(self, rates: Rates, index: np.ndarray, size: float | None) -> Momenta:
        """S1 over all updates and M over the rows."""
        at = rates.values[index]
        falls = -np.diff(at, prepend=at[0]) * np.diff(index, prepend=index[0])
        return Momenta(area(rates)[index], forward_momentum(falls))

    def basis(self, features: Momenta, shape: Floats) -> tuple[Floats, Floats]:
        """1, S1^-alpha, -M."""
        forward, slope = power(features.forward, shape[0])
        slopes = np.zeros((len(forward), 3, 1))
        slopes[:, 1, 0] = slope
        return np.stack([np.ones_like(forward), forward, -features.momentum], 1), slopes

    def final(self, rates: Rates, params: Mapping[str, float], size: float | None = None) -> tuple[float, Floats]:
        """Raises UserError: this law has no loss of a schedule as such, only one of rows."""
        raise UserError(
            f"law {self.name}: depends on the rows of a curve, so no best schedule; fit annealing or multipower"
        )
