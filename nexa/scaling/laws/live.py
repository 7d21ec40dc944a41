"""What loss a run will end at, from its own first part: the annealing law with priors, refitted as the run goes on.

One run with one schedule does not determine a law (docs/laws.md): before the rate has fallen nothing tells what a fall
gives. Priors on dimensionless parameters say what is usual, and the curve overrules them as far as it can; what neither
knows widens the interval.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nexa.scaling.laws.annealing import annealed
from nexa.scaling.laws.base import area
from nexa.scaling.laws.rates import Floats, Rates

BINS = 64
"""Rows are averaged into so many at most: their noise falls, and a fit costs the same at any length."""
FEWEST = 8
"""Bins needed for a word."""
FORGOTTEN = 0.25
"""Share of the updates so far, the first ones, that is left out: early training follows no power law."""
HORIZON = 0.03
"""1 / (1 - lambda) as a share of all updates."""
CENTRE = (1.0, 0.045, 0.55, 0.08)
SPREAD = np.array([1.0, 1.5, 0.3, 0.5])
"""Normal priors on the logarithms of: L0 and A over the loss now, alpha, and C over the loss now."""
RATE, RATES, WITH_RATE = 1e-3, (1e-4, 3e-3), (0.0, -0.4, 0.0, 0.33)
"""`CENTRE` is for a peak rate of `RATE`; by which powers of the peak it changes, within `RATES`. Centres, spreads and
powers are those of fits to complete public runs of AdamW, 25M to 166M parameters, peak 1e-4 to 3e-3."""
MISFIT, AHEAD = 0.004, 0.02
"""Least standard deviations, relative, however little noise there is: of the last bin, and of the end seen from the
start."""
AGEING = 2
"""An older bin's grows with this power of how much more area there is by now: a law that holds for the later part of
a run need not hold for its beginning. Against 0 the error after half of a run falls by a quarter (WSD) and a tenth."""
STEPS = 30
NORMAL = 1.96
"""Half of the width of a 95 % interval, in standard deviations."""
COOLDOWN = 0.1
"""Length of the decay to 0 that `annealed` supposes, over the updates so far."""


@dataclass(frozen=True)
class Forecast:
    """Expected loss at the last update of the schedule, its 95 % interval, and the loss of a decay to 0 from now on."""

    final: float
    low: float
    high: float
    annealed: float


class Live:
    """The rows of a run so far.

    The law is L = L0 + A u^-alpha - C v (arXiv 2408.11029 in other units): u is the sum of the rates over that of the
    whole run, v the annealed share of the peak, from 0 to 1, with momentum over `HORIZON` of the run.
    """

    def __init__(self, rates: Rates) -> None:
        """`rates`: of the whole run."""
        self._rates = rates
        self._decay = 1 - 1 / max(2.0, HORIZON * rates.total)
        self._area, self._annealed = self._features(rates)
        peak = float(np.clip(rates.peak, *RATES))
        self._centre = np.log(CENTRE) + np.array(WITH_RATE) * np.log(peak / RATE)
        self._index: list[int] = []
        self._loss: list[float] = []

    def _features(self, rates: Rates) -> tuple[Floats, Floats]:
        """u and v of every update; of another schedule in the units of this run."""
        scale = self._rates.values.sum()
        return area(rates) / scale, annealed(rates, self._decay) * (1 - self._decay) / self._rates.peak

    def add(self, index: int, loss: float) -> None:
        """The loss at an update, from 0; what is not finite, not positive, or of warm-up says nothing."""
        if np.isfinite(loss) and loss > 0 and index >= self._rates.warmup:
            self._index.append(index)
            self._loss.append(loss)

    def forecast(self) -> Forecast | None:
        """What the rows so far say; None while there are too few."""
        bins = self._bins()
        if bins is None:
            return None
        index, logs, counts = bins
        now = float(np.exp(logs[-4:].mean()))
        u, v = self._area[index], self._annealed[index]
        theta, covariance = _fit(u, v, logs - np.log(now), counts, self._centre)
        last = self._rates.total - 1
        value, slope = _law(self._area[[last]], self._annealed[[last]], theta)
        misfit = MISFIT**2 + (AHEAD * (1 - self._index[-1] / last)) ** 2
        spread = NORMAL * float(np.sqrt(slope[0] @ covariance @ slope[0] + misfit * value[0] ** 2))
        final = now * float(value[0])
        return Forecast(final, final - now * spread, final + now * spread, now * self._if_annealed(theta))

    def _bins(self) -> tuple[np.ndarray, Floats, Floats] | None:
        """Middle update, mean log loss and rows of each bin; None while there are too few."""
        index, losses = np.array(self._index), np.array(self._loss)
        kept = index >= FORGOTTEN * (index[-1] if len(index) else 0)
        index, logs = index[kept], np.log(losses[kept])
        if len(index) < FEWEST:
            return None
        cuts = np.array_split(np.arange(len(index)), min(BINS, len(index)))
        middle = np.array([round(index[cut].mean()) for cut in cuts])
        return middle, np.array([logs[cut].mean() for cut in cuts]), np.array([float(len(cut)) for cut in cuts])

    def _if_annealed(self, theta: Floats) -> float:
        """The law at the end of a linear decay to 0 from the last row on."""
        done = self._index[-1] + 1
        length = max(1, round(COOLDOWN * done))
        fall = self._rates.values[done - 1] * np.arange(length - 1, -1, -1.0) / length
        u, v = self._features(Rates(np.concatenate([self._rates.values[:done], fall]), self._rates.warmup))
        return float(_law(u[-1:], v[-1:], theta)[0][0])


def _law(u: Floats, v: Floats, theta: Floats) -> tuple[Floats, Floats]:
    """The loss [n] and its derivatives by theta, the logarithms of L0, A, alpha and C [n, 4]."""
    base, scale, alpha, gain = np.exp(theta)
    power = scale * np.maximum(u, 1e-12) ** -alpha
    slopes = np.stack([np.full_like(u, base), power, -power * alpha * np.log(np.maximum(u, 1e-12)), -gain * v], 1)
    return base + power - gain * v, slopes


def _fit(u: Floats, v: Floats, logs: Floats, counts: Floats, centre: Floats) -> tuple[Floats, Floats]:
    """Most probable theta and its covariance: Levenberg-Marquardt on residuals of log loss and of the priors.

    The noise of the bins is estimated from the residuals and the fit made anew, twice.
    """
    theta, sigma = centre.copy(), np.full(len(u), 0.02)
    hessian = np.eye(4)
    for _ in range(3):
        theta, residuals, hessian = _descend(u, v, logs, sigma, theta, centre)
        noise = np.median(np.abs(residuals) * np.sqrt(counts)) / 0.6745
        sigma = np.sqrt(noise**2 / counts + (MISFIT * (u[-1] / u) ** AGEING) ** 2)
    theta, _, hessian = _descend(u, v, logs, sigma, theta, centre)
    return theta, np.asarray(np.linalg.inv(hessian), dtype=np.float64)


def _descend(
    u: Floats, v: Floats, logs: Floats, sigma: Floats, theta: Floats, centre: Floats
) -> tuple[Floats, Floats, Floats]:
    """Theta, residuals of log loss [n], and the Hessian of half the sum of squares [4, 4]."""

    def system(at: Floats) -> tuple[float, Floats, Floats, Floats]:
        value, slopes = _law(u, v, at)
        floored = np.maximum(value, 1e-3)
        plain = np.log(floored) - logs
        residuals = np.concatenate([plain / sigma, (at - centre) / SPREAD])
        jacobian = np.vstack([slopes / (floored * sigma)[:, None], np.diag(1 / SPREAD)])
        return float(residuals @ residuals), plain, jacobian.T @ residuals, jacobian.T @ jacobian

    damping = 1e-3
    cost, plain, gradient, hessian = system(theta)
    for _ in range(STEPS):
        step = np.linalg.solve(hessian + damping * np.diag(np.diag(hessian)), gradient)
        trial = system(theta - np.clip(step, -1.0, 1.0))
        if trial[0] <= cost:
            done = cost - trial[0] < 1e-9 * cost
            theta, damping = theta - np.clip(step, -1.0, 1.0), damping / 5
            cost, plain, gradient, hessian = trial
            if done:
                break
        else:
            damping *= 5
    return theta, plain, hessian
