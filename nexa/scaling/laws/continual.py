"""The annealing law of continual pre-training (arXiv 2505.07796), its forms with replay and over model sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from nexa.scaling.laws.annealing import MILLION, WithMomentum, annealed
from nexa.scaling.laws.base import area, power
from nexa.scaling.laws.rates import Floats, Rates


@dataclass(frozen=True)
class Transfer:
    """What the law knows of a schedule at the rows [n]; in a curve of pre-training `new` and `annealed` are 0."""

    forward: Floats
    """S1 of both parts."""
    new: Floats
    """S1 of the continual part, 0 where its data is the old one."""
    before: Floats
    """S2 of the pre-training."""
    annealed: Floats
    """S2 of the continual part."""
    replay: float = 0.0
    size: float = 1.0
    """Of the model, in millions of parameters."""


def shift(new: Floats, speed: float, exponent: float) -> tuple[Floats, Floats, Floats]:
    """1 - (1 + E S1cpt)^-beta [n], the way of the loss to that of the new data, and its slopes by E and beta."""
    log = np.log1p(speed * new)
    left = np.exp(-exponent * log)
    return 1 - left, exponent * new * np.exp(-(exponent + 1) * log), left * log


class Continual(WithMomentum):
    """L = L0 + A (S1pt + S1cpt)^-alpha - C1 S2pt - C2 S2cpt + B (1 - (1 + E S1cpt)^-beta).

    A curve of pre-training has S1cpt = S2cpt = 0. Each part is a schedule of its own: falls count after its warm-up,
    the momentum of S2cpt starts at 0, S2pt stays what it was, the jump of the rate between the parts counts nowhere.
    B is below 0 on data like the new one, above on data like the old.
    """

    name = "continual"
    linear: ClassVar[tuple[str, ...]] = ("L0", "A", "C1", "C2", "B")
    shape: ClassVar[tuple[str, ...]] = ("alpha", "E", "beta")
    order: ClassVar[tuple[str, ...]] = ("L0", "A", "alpha", "C1", "C2", "B", "E", "beta", "lambda")
    bounds: ClassVar = {"alpha": (1e-3, 10.0), "E": (1e-2, 1e6), "beta": (1e-3, 10.0)}
    grid: ClassVar = {"alpha": (0.3, 0.5, 0.8), "E": (3.0, 30.0, 300.0, 3000.0), "beta": (0.15, 0.4, 1.0)}
    signed = ("B",)
    continual = True

    def features(self, rates: Rates, index: np.ndarray, size: float | None) -> Transfer:
        """The sums at the rows; of a continual run `index` counts its own updates."""
        decay, sums, falls = self.fixed["lambda"], area(rates)[index], annealed(rates, self.fixed["lambda"])[index]
        millions, nothing = 1.0 if size is None else size / MILLION, np.zeros(len(index))
        if rates.before is None:
            return Transfer(sums, nothing, falls, nothing, rates.replay, millions)
        last = rates.before.total - 1
        old, fallen = area(rates.before)[last], annealed(rates.before, decay)[last]
        new = nothing if rates.replay >= 1 else sums
        return Transfer(old + sums, new, nothing + fallen, falls, rates.replay, millions)

    def basis(self, features: Transfer, shape: Floats) -> tuple[Floats, Floats]:
        """1, S1^-alpha, -S2pt, -S2cpt, 1 - (1 + E S1cpt)^-beta."""
        alpha, speed, exponent = shape
        forward, by_alpha = power(features.forward, alpha)
        moved, by_speed, by_exponent = shift(features.new, speed, exponent)
        slopes = np.zeros((len(forward), 5, 3))
        slopes[:, 1, 0], slopes[:, 4, 1], slopes[:, 4, 2] = by_alpha, by_speed, by_exponent
        return np.stack([np.ones_like(forward), forward, -features.before, -features.annealed, moved], 1), slopes

    def final(self, rates: Rates, params: Mapping[str, float], size: float | None = None) -> tuple[float, Floats]:
        """See `Law.final`; of a continual run the rates of its own part."""
        last = np.array([rates.total - 1])
        value = float(self.predict(rates, last, params, size)[0])
        features, theta = self.features(rates, last, size), self.vector(params)
        through_area = -params["alpha"] * params["A"] * features.forward[0] ** (-params["alpha"] - 1)
        if features.new[0] > 0:
            through_area += self._drift(features, theta)
        weight = params["C1" if rates.before is None else "C2"] * self._grown(rates, params, size)
        return value, through_area - weight * self._reach(rates)

    def _drift(self, features: Transfer, theta: Floats) -> float:
        """Derivative of the shift by S1cpt: that by E, times E / S1cpt, for E and S1cpt occur as a product only."""
        terms, slopes = self.basis(features, theta[len(self.linear) :])
        at = self.shape.index("E")
        by_speed = float(slopes[0, :, at] @ theta[: terms.shape[1]])
        return by_speed * float(theta[len(self.linear) + at] / features.new[0])

    def _grown(self, rates: Rates, params: Mapping[str, float], size: float | None) -> float:
        """By what the size multiplies C1 or C2."""
        return 1.0


class ContinualReplay(Continual):
    """The same over shares r of replay: B e^(b r) for B, E e^(e r) for E (both exponential in r, as in Eq. 8)."""

    name = "continual_replay"
    shape = ("alpha", "E", "beta", "b", "e")
    order = ("L0", "A", "alpha", "C1", "C2", "B", "b", "E", "e", "beta", "lambda")
    bounds: ClassVar = Continual.bounds | {"b": (-20.0, 20.0), "e": (-20.0, 20.0)}
    grid: ClassVar = Continual.grid | {"E": (10.0, 1000.0), "b": (-2.0, 0.0), "e": (-2.0, 2.0)}

    def basis(self, features: Transfer, shape: Floats) -> tuple[Floats, Floats]:
        """As `Continual`, the last term times e^(b r), E times e^(e r)."""
        alpha, speed, exponent, by_replay, speed_by_replay = shape
        faster = np.exp(speed_by_replay * features.replay)
        terms, inner = super().basis(features, np.array([alpha, speed * faster, exponent]))
        scale = np.exp(by_replay * features.replay)
        terms[:, 4] *= scale
        inner[:, 4] *= scale
        slopes = np.zeros((*terms.shape, 5))
        slopes[:, :, :3] = inner
        slopes[:, 4, 1] *= faster
        slopes[:, 4, 3] = features.replay * terms[:, 4]
        slopes[:, 4, 4] = features.replay * speed * slopes[:, 4, 1]
        return terms, slopes


class ContinualSize(Continual):
    """The same over sizes: C1 N^g1 for C1, C2 N^g2 for C2, and + F N^-phi, with N in millions of parameters."""

    name = "continual_size"
    linear = ("L0", "A", "C1", "C2", "B", "F")
    shape = ("alpha", "E", "beta", "g1", "g2", "phi")
    order = ("L0", "A", "alpha", "C1", "g1", "C2", "g2", "B", "E", "beta", "F", "phi", "lambda")
    bounds: ClassVar = Continual.bounds | {"g1": (-3.0, 3.0), "g2": (-3.0, 3.0), "phi": (1e-3, 5.0)}
    grid: ClassVar = {
        "alpha": (0.4, 0.7),
        "E": (10.0, 1000.0),
        "beta": (0.15, 0.6),
        "g1": (0.2,),
        "g2": (0.2,),
        "phi": (0.1, 0.2, 0.4),
    }
    needs_size = True

    def basis(self, features: Transfer, shape: Floats) -> tuple[Floats, Floats]:
        """As `Continual`, with -S2pt N^g1, -S2cpt N^g2, and N^-phi."""
        inner, inner_slopes = super().basis(features, shape[:3])
        log, (first, second, fall) = np.log(features.size), shape[3:]
        slopes = np.zeros((len(inner), 6, 6))
        slopes[:, :5, :3] = inner_slopes
        for column, exponent in ((2, first), (3, second)):
            inner[:, column] *= features.size**exponent
            slopes[:, column, column + 1] = inner[:, column] * log
        small = np.full((len(inner), 1), features.size**-fall)
        slopes[:, 5, 5] = -small[:, 0] * log
        return np.hstack([inner, small]), slopes

    def _grown(self, rates: Rates, params: Mapping[str, float], size: float | None) -> float:
        return ((size or MILLION) / MILLION) ** params["g1" if rates.before is None else "g2"]
