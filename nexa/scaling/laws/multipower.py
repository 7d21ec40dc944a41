"""The Multi-Power law (arXiv 2503.12811), with its double sum in n log n."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from nexa.scaling.laws.base import Law, area, drops, power
from nexa.scaling.laws.rates import Floats, Rates

SMALLEST_RATE = 1e-10
"""A rate of 0 counts as this much, as in the official schedule search: rate^-gamma must exist."""
LEAF = 32
NODES = 10
SMOOTH = 1e-8
"""Largest error, in log rate, with which a block's rates may be interpolated."""


@dataclass(frozen=True)
class Terms:
    """The sum over falls at the rows: row `row[p]` gets `weight[p]` G(exp(log_area[p] - gamma log_rate[p])).

    `forward` [n] is S1; the other four [pairs], sorted by row.
    """

    forward: Floats
    row: np.ndarray
    weight: Floats
    log_area: Floats
    log_rate: Floats


class _Blocks:
    """The updates cut in blocks of one length, and what one number at each of a few nodes says about a whole block."""

    def __init__(self, length: int, falls: Floats, log_rate: Floats) -> None:
        self.length = length
        count = -(-len(falls) // length)
        room = count * length - len(falls)
        fallen = np.pad(falls, (0, room)).reshape(count, length)
        self.empty: NDArray[np.bool_] = np.all(fallen == 0, axis=1)
        spread = 0.5 * (1 - np.cos(np.pi * np.arange(NODES) / (NODES - 1)))
        self.nodes = np.round(spread * (length - 1)).astype(np.int64)
        matrix = _lagrange(np.arange(length) / length, self.nodes / length)
        self.weights = fallen @ matrix
        heights = np.pad(log_rate, (0, room), mode="edge").reshape(count, length)
        self.smooth = np.abs(heights[:, self.nodes] @ matrix.T - heights).max(1) < SMOOTH
        self.smooth[-1] &= room == 0


def _lagrange(at: Floats, nodes: Floats) -> Floats:
    """Value at each point of each node's Lagrange polynomial [points, nodes]."""
    apart = nodes[:, None] - nodes[None, :] + np.eye(len(nodes))
    factors = (at[:, None, None] - nodes[None, None, :]) / apart[None]
    factors[:, np.arange(len(nodes)), np.arange(len(nodes))] = 1.0
    return factors.prod(2)


def pair_terms(rates: Rates, index: np.ndarray, falls: Floats) -> Terms:
    """The pairs of (row, fall) of the double sum, with far blocks of falls replaced by ten of them.

    Seen from row t, the term of fall k is a smooth function of k once the sum of rates between them is as large as
    the one over a block around k: it is then a polynomial in k to about 1e-8 of itself, and the sum over the block
    needs only the polynomial's nodes. Blocks double in length with the distance; kinks and jumps of the schedule, and
    rows near by, are summed one by one. Constant stretches have no falls and cost nothing.
    """
    sums = area(rates)
    before = np.concatenate([[0.0], sums])
    log_rate = np.log(np.maximum(rates.values, SMALLEST_RATE))
    kept: list[tuple[np.ndarray, np.ndarray, Floats]] = []
    length = LEAF
    while length * 4 <= len(falls):
        length *= 2
    rows = np.repeat(np.arange(len(index)), -(-len(falls) // length))
    blocks = np.tile(np.arange(-(-len(falls) // length)), len(index))
    while len(rows):
        level = _Blocks(length, falls, log_rate)
        begin, end = blocks * length, np.minimum((blocks + 1) * length, len(falls))
        live = (begin <= index[rows]) & ~level.empty[blocks]
        rows, blocks, begin, end = rows[live], blocks[live], begin[live], end[live]
        within = before[end] - before[begin]
        far = (end <= index[rows]) & level.smooth[blocks] & (sums[index[rows]] - before[end] >= within)
        far &= length > LEAF
        for_far = begin[far, None] + level.nodes
        kept.append((np.repeat(rows[far], NODES), for_far.ravel(), level.weights[blocks[far]].ravel()))
        rows, blocks = rows[~far], blocks[~far]
        if length == LEAF:
            near = blocks[:, None] * LEAF + np.arange(LEAF)
            counted = near <= np.minimum(index[rows][:, None], len(falls) - 1)
            many = np.broadcast_to(rows[:, None], near.shape)[counted]
            kept.append((many, near[counted], falls[near[counted]]))
            break
        length //= 2
        rows, blocks = np.repeat(rows, 2), (2 * blocks[:, None] + np.arange(2)).ravel()
        inside = blocks * length < len(falls)
        rows, blocks = rows[inside], blocks[inside]
    row, fall, weight = (np.concatenate(parts) for parts in zip(*kept, strict=True))
    some = weight != 0
    row, fall, weight = row[some], fall[some], weight[some]
    by_row = np.argsort(row, kind="stable")
    row, fall, weight = row[by_row], fall[by_row], weight[by_row]
    reach = np.maximum(sums[index[row]] - before[fall], SMALLEST_RATE)
    return Terms(sums[index], row, weight, np.log(reach), log_rate[fall])


class MultiPower(Law):
    """L = L0 + A S1^-alpha - B sum_k (rate_{k-1} - rate_k) G(rate_k^-gamma S_k), G(x) = 1 - (1 + C x)^-beta.

    S_k is the sum of the rates from update k to the row's. `warmup`: `official` counts the rises of warm-up as negative
    falls, as the authors' code does, so that printed parameters can be used; L0 is then below the asymptote by up to
    B times the peak. `interpretable` leaves them out.
    """

    name = "multipower"
    linear = ("L0", "A", "B")
    shape = ("alpha", "C", "beta", "gamma")
    order = ("L0", "A", "alpha", "B", "C", "beta", "gamma")
    bounds: ClassVar = {"alpha": (1e-3, 10.0), "C": (1e-4, 1e4), "beta": (1e-3, 10.0), "gamma": (1e-3, 3.0)}
    grid: ClassVar = {
        "alpha": (0.3, 0.5, 0.8),
        "C": (0.5, 2.0),
        "beta": (0.3, 0.6),
        "gamma": (0.4, 0.7),
    }
    starts, coarse = 3, 4
    anchor: ClassVar = {"C": 1.0, "beta": 0.5, "gamma": 0.5}  # where the authors start, and do not get far from
    prior = 0.1  # chosen on left-out curves among those to fit, mean over 25M and 100M: docs/laws.md
    options: ClassVar = {"warmup": ("official", "interpretable")}

    def features(self, rates: Rates, index: np.ndarray, size: float | None) -> Terms:
        """S1 at the rows and the pairs of the double sum."""
        return pair_terms(rates, index, drops(rates, counted=self.chosen["warmup"] == "official"))

    def basis(self, features: Terms, shape: Floats) -> tuple[Floats, Floats]:
        """1, S1^-alpha, minus the sum."""
        alpha, scale, beta, gamma = shape
        forward, slope = power(features.forward, alpha)
        rows = len(forward)
        grown = scale * np.exp(features.log_area - gamma * features.log_rate)
        log = np.log1p(grown)
        left = np.exp(-beta * log) * features.weight
        rate = beta * left * (grown / (1 + grown))  # weight dG / dlog x

        def total(values: Floats) -> Floats:
            return np.bincount(features.row, values, rows).astype(np.float64, copy=False)

        terms = np.stack([np.ones(rows), forward, total(left) - total(features.weight)], 1)
        slopes = np.zeros((rows, 3, 4))
        slopes[:, 1, 0] = slope
        slopes[:, 2, 1] = -total(rate) / scale
        slopes[:, 2, 2] = -total(left * log)
        slopes[:, 2, 3] = total(rate * features.log_rate)
        return terms, slopes

    def final(self, rates: Rates, params: Mapping[str, float], size: float | None = None) -> tuple[float, Floats]:
        """See `Law.final`."""
        total = rates.total
        rate = np.maximum(rates.values[:total], SMALLEST_RATE)
        sums = np.cumsum(rate)
        reach = sums[-1] - sums + rate
        falls = drops(rates, counted=self.chosen["warmup"] == "official")[:total]
        beta, gamma = params["beta"], params["gamma"]
        grown = params["C"] * reach * rate**-gamma
        left = (1 + grown) ** -beta
        value = params["L0"] + params["A"] * sums[-1] ** -params["alpha"] - params["B"] * float(falls @ (1 - left))
        by_log = falls * beta * left * grown / (1 + grown)
        # rate i acts: in S1; in every S_k with k <= i; in its own power; in the falls to i and from i
        through = np.cumsum(by_log / reach) - gamma * by_log / rate
        counts = np.arange(total) > (0 if self.chosen["warmup"] == "official" else rates.warmup)
        own = np.where(counts, 1 - left, 0.0)
        through += np.append(own[1:], 0.0) - own
        slope = -params["alpha"] * params["A"] * sums[-1] ** (-params["alpha"] - 1)
        return float(value), slope - params["B"] * through
