"""The annealing law (arXiv 2408.11029) and its form over model sizes (arXiv 2505.07796)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from scipy.signal import lfilter

from nexa.errors import UserError
from nexa.scaling.laws.base import Law, area, drops, power
from nexa.scaling.laws.rates import Floats, Rates

LAMBDA = 0.999
MILLION = 1e6


def annealed(rates: Rates, decay: float) -> Floats:
    """S2 [total + 1]: sum of the momentum m_i = decay m_{i-1} + (rate_{i-1} - rate_i) up to and with each update.

    Falls count after warm-up only.
    """
    momentum = lfilter([1.0], [1.0, -decay], drops(rates, counted=False))
    return np.cumsum(momentum)


@dataclass(frozen=True)
class Areas:
    """S1 and S2 at the rows [n]; model size in millions of parameters."""

    forward: Floats
    annealed: Floats
    size: float = 1.0


class WithMomentum(Law):
    """A law with S2, whose momentum `lambda` is fixed in one fit."""

    def __init__(self, fixed: Mapping[str, float] | None = None, **options: object) -> None:
        """`fixed`: {"lambda": momentum}, .999 unless given. Raises UserError when it is not in [0, 1)."""
        super().__init__({"lambda": LAMBDA} | dict(fixed or {}), **options)
        if not 0 <= self.fixed["lambda"] < 1:
            raise UserError(f"law {self.name}: lambda={self.fixed['lambda']!r}; give a number from 0 to below 1")

    def _reach(self, rates: Rates) -> Floats:
        """Derivative of the final S2 with respect to each rate [total].

        A fall at update j adds (1 - lambda^(total - j)) / (1 - lambda) to the final S2.
        """
        total, decay = rates.total, self.fixed["lambda"]
        left = (1 - decay ** np.arange(total, -1, -1.0)) / (1 - decay)
        left[: rates.warmup + 1] = 0.0  # falls that do not count
        return np.asarray(np.diff(left), dtype=np.float64)


class Annealing(WithMomentum):
    """L = L0 + A S1^-alpha - C S2; S2 with a momentum `lambda` that is fixed in one fit."""

    name = "annealing"
    linear: ClassVar[tuple[str, ...]] = ("L0", "A", "C")
    shape: ClassVar[tuple[str, ...]] = ("alpha",)
    order: ClassVar[tuple[str, ...]] = ("L0", "A", "alpha", "C", "lambda")
    bounds: ClassVar = {"alpha": (1e-3, 10.0)}
    grid: ClassVar = {"alpha": (0.15, 0.25, 0.35, 0.45, 0.55, 0.7, 0.9, 1.2)}

    def features(self, rates: Rates, index: np.ndarray, size: float | None) -> Areas:
        """S1 and S2 at the rows."""
        millions = 1.0 if size is None else size / MILLION
        return Areas(area(rates)[index], annealed(rates, self.fixed["lambda"])[index], millions)

    def basis(self, features: Areas, shape: Floats) -> tuple[Floats, Floats]:
        """1, S1^-alpha, -S2."""
        forward, slope = power(features.forward, shape[0])
        slopes = np.zeros((len(forward), 3, 1))
        slopes[:, 1, 0] = slope
        return np.stack([np.ones_like(forward), forward, -features.annealed], 1), slopes

    def final(self, rates: Rates, params: Mapping[str, float], size: float | None = None) -> tuple[float, Floats]:
        """See `Law.final`."""
        total = rates.total
        value = float(self.predict(rates, np.array([total - 1]), params, size)[0])
        weight = self._weight(params, size)
        sums = area(rates)[total - 1]
        through_area = -params["alpha"] * params["A"] * sums ** (-params["alpha"] - 1)
        return value, through_area - weight * self._reach(rates)

    def _weight(self, params: Mapping[str, float], size: float | None) -> float:
        """Of S2 in the loss."""
        return params["C"]


class SizedAnnealing(Annealing):
    """L = L0 + A S1^-alpha - C S2 N^gamma + B N^-beta, with N in millions of parameters."""

    name = "annealing_size"
    linear = ("L0", "A", "C", "B")
    shape = ("alpha", "gamma", "beta")
    order = ("L0", "A", "alpha", "C", "gamma", "B", "beta", "lambda")
    bounds: ClassVar = {"alpha": (1e-3, 10.0), "gamma": (-3.0, 3.0), "beta": (1e-3, 5.0)}
    grid: ClassVar = {
        "alpha": (0.25, 0.4, 0.55, 0.8),
        "gamma": (0.0, 0.2, 0.5),
        "beta": (0.1, 0.2, 0.35, 0.6),
    }
    needs_size = True

    def basis(self, features: Areas, shape: Floats) -> tuple[Floats, Floats]:
        """1, S1^-alpha, -S2 N^gamma, N^-beta."""
        alpha, gamma, beta = shape
        forward, slope = power(features.forward, alpha)
        fall, log = -features.annealed * features.size**gamma, np.log(features.size)
        small = np.full_like(forward, features.size**-beta)
        slopes = np.zeros((len(forward), 4, 3))
        slopes[:, 1, 0], slopes[:, 2, 1], slopes[:, 3, 2] = slope, fall * log, -small * log
        return np.stack([np.ones_like(forward), forward, fall, small], 1), slopes

    def _weight(self, params: Mapping[str, float], size: float | None) -> float:
        return params["C"] * ((size or MILLION) / MILLION) ** params["gamma"]
