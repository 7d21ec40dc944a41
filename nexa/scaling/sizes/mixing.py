"""The data mixing law: losses as functions of the shares of sources (Ye et al., arXiv 2403.16952).

L_i(r) = c_i + k_i exp(sum_j t_ij r_j) for validation domain i and shares r of the sources, which sum to 1. Adding a
constant to all t_ij only rescales k_i, so that here sum_j t_ij = 0 and every k_i and t_ij is determined.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import LinearConstraint, least_squares, minimize

from nexa.errors import UserError

Floats = NDArray[np.float64]
DELTA = 0.01
"""Of the Huber loss, on the loss over its mean."""
PULL = 1e-3
"""Strength of the residuals PULL * t: with few runs t is free to grow, and predictions go wild."""
FLOORS = (0.0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98)
"""Starting points of c, over the least loss of the domain."""
BEYOND = 0.05
"""Shares so far outside those of the fit are worth a word."""


@dataclass(frozen=True)
class MixingLaw:
    """The law of several domains."""

    sources: list[str]
    domains: list[str]
    c: Floats
    """[domains]"""
    k: Floats
    """[domains]"""
    t: Floats
    """[domains, sources]"""
    low: Floats
    """Least share of each source among the runs of the fit [sources]."""
    high: Floats

    def losses(self, shares: Floats) -> Floats:
        """Loss of each domain [..., domains] for shares [..., sources]."""
        return self.c + self.k * np.exp(np.asarray(shares) @ self.t.T)

    def best(self, weights: Floats, low: Floats, high: Floats) -> Floats:
        """Shares [sources] of the least weighted loss, `low` <= share <= `high`. The problem is convex.

        Raises:
            UserError: no shares within these bounds sum to 1.
        """
        if (low > high).any() or low.sum() > 1 + 1e-9 or high.sum() < 1 - 1e-9:
            raise UserError(
                f"bounds of shares sum to {low.sum():g} and {high.sum():g}; the lower ones must sum to at most 1, the "
                "upper ones to at least 1"
            )

        def weighted(shares: Floats) -> tuple[float, Floats]:
            grown = weights * self.k * np.exp(self.t @ shares)
            return float(weights @ self.c + grown.sum()), grown @ self.t

        room = high - low
        start = low + room * ((1 - low.sum()) / room.sum() if room.sum() > 0 else 0)
        found = minimize(
            weighted,
            start,
            jac=True,
            method="SLSQP",
            bounds=list(zip(low, high, strict=True)),
            constraints=[LinearConstraint(np.ones((1, len(low))), 1.0, 1.0)],
            options={"maxiter": 500, "ftol": 1e-12},
        )
        shares = np.clip(found.x, low, high)
        return shares / shares.sum()

    def outside(self, shares: Floats) -> list[str]:
        """Sources whose share is outside what the fit has seen, by more than `BEYOND`."""
        far = (shares < self.low - BEYOND) | (shares > self.high + BEYOND)
        return [name for name, is_far in zip(self.sources, far, strict=True) if is_far]


def fit(sources: Sequence[str], domains: Sequence[str], shares: Floats, losses: Floats) -> MixingLaw:
    """The law on runs: `shares` [runs, sources], `losses` [runs, domains].

    Each domain by itself. For each start of c the rest is least squares of log(loss - c); then Huber loss.

    Raises:
        UserError: shares that do not sum to 1 or are negative, or not more runs than parameters of a domain.
    """
    wrong = np.flatnonzero((np.abs(shares.sum(1) - 1) > 1e-3) | (shares < 0).any(1))
    if len(wrong):
        raise UserError(f"run {wrong[0] + 1}: shares are {shares[wrong[0]].tolist()}; they must be >= 0 and sum to 1")
    if len(shares) < len(sources) + 2:
        raise UserError(f"{len(shares)} runs for {len(sources) + 1} parameters of a domain; give more runs")
    if np.linalg.matrix_rank(shares, tol=1e-6) < len(sources):
        raise UserError("the shares of the runs do not vary independently; give runs that differ in every source")
    fitted = [_domain(shares, losses[:, number]) for number in range(len(domains))]
    c, k, t = (np.array(part) for part in zip(*fitted, strict=True))
    return MixingLaw(list(sources), list(domains), c, k, t, shares.min(0), shares.max(0))


def _domain(shares: Floats, losses: Floats) -> tuple[float, float, Floats]:
    """c, k and t [sources] of one domain."""
    unit = float(losses.mean())
    scaled, least = losses / unit, float(losses.min() / unit)
    count = shares.shape[1]
    centring = np.eye(count) - 1 / count

    def residuals(theta: Floats) -> Floats:
        law = theta[0] + np.exp(np.minimum(shares @ theta[1:], 50.0))
        return np.concatenate([law - scaled, PULL * centring @ theta[1:]])

    def slopes(theta: Floats) -> Floats:
        grown = np.exp(np.minimum(shares @ theta[1:], 50.0))
        runs = np.hstack([np.ones((len(scaled), 1)), grown[:, None] * shares])
        return np.vstack([runs, np.hstack([np.zeros((count, 1)), PULL * centring])])

    best, theta = np.inf, np.zeros(count + 1)
    for floor in FLOORS:
        start = np.linalg.lstsq(shares, np.log(scaled - floor * least), rcond=None)[0]
        found = least_squares(
            residuals,
            np.concatenate([[floor * least], start]),
            jac=slopes,
            bounds=([0.0] + [-np.inf] * count, [least] + [np.inf] * count),
            loss="huber",
            f_scale=DELTA,
            x_scale="jac",
            max_nfev=500,
        )
        if found.cost < best:
            best, theta = found.cost, found.x
    shift = float(theta[1:].mean())
    return unit * float(theta[0]), unit * float(np.exp(shift)), theta[1:] - shift
