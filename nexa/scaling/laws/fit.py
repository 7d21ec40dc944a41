"""Fit a law to curves: Huber loss of log residuals, many starts, and what is to be said about the result."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.optimize import least_squares, minimize, nnls

from nexa.errors import UserError
from nexa.scaling.laws.base import Law
from nexa.scaling.laws.curves import Curve
from nexa.scaling.laws.limits import overlooked
from nexa.scaling.laws.rates import Floats, distinct

DELTA = 1e-3
"""Of the Huber loss, on log loss (Tissue et al.; Luo et al.)."""
INTERVAL = (2.5, 97.5)
"""Percentiles of the bootstrap."""
ILL_CONDITIONED = 1e4
AT_BOUND = 1e-6
LAMBDAS = (0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9995, 0.9998)
Note = Callable[[str], None]


@dataclass
class Fit:
    """Parameters found, and what they are worth."""

    law: Law
    params: dict[str, float]
    objective: float
    """Sum of Huber losses over all rows."""
    rows: int
    condition: float
    """Ratio of the largest to the smallest singular value of d log L / d log parameter."""
    prior: float
    seconds: float
    warnings: list[str]
    samples: list[list[float]] = field(default_factory=list)
    """Bootstrap: parameters in the order of `params`, of each replicate."""
    profile: list[dict[str, float]] = field(default_factory=list)
    """Objective for each lambda, when it was asked for."""

    def intervals(self) -> dict[str, list[float]]:
        """95 % interval of each parameter; {} without bootstrap."""
        return intervals(self.params, self.samples)


def intervals(names: Iterable[str], samples: Sequence[Sequence[float]]) -> dict[str, list[float]]:
    """95 % interval of each parameter from replicates, which have them in this order; {} without any."""
    if not samples:
        return {}
    low, high = np.percentile(np.array(samples), INTERVAL, axis=0)
    return {name: [float(low[i]), float(high[i])] for i, name in enumerate(names)}


class Problem:
    """The residuals of a law on the rows after warm-up of some curves, r = log law - log loss.

    `prior`: strength of further residuals, prior * log(parameter / anchor), for the parameters that have an anchor.
    Under the Huber loss this is nearly prior * DELTA * |log ratio|: what the curves do not need stays at its anchor.
    `every`: use only every so-manieth row.
    """

    def __init__(self, law: Law, curves: Sequence[Curve], prior: float, every: int = 1) -> None:
        self.law = law
        rows = [np.flatnonzero(c.fitted)[::every] for c in curves]
        self.features = [law.features(c.rates, c.index[r], c.size) for c, r in zip(curves, rows, strict=True)]
        self.lengths = [len(r) for r in rows]
        self.logs = np.log(np.concatenate([c.loss[r] for c, r in zip(curves, rows, strict=True)]))
        lowest = float(np.exp(self.logs.min()))
        floors = [-np.inf if name in law.signed else 0.0 for name in law.linear]
        self.low = np.array(floors + [law.bounds[name][0] for name in law.shape])
        self.signed = np.flatnonzero(np.isinf(floors))
        self.high = np.array([np.inf] * len(law.linear) + [law.bounds[name][1] for name in law.shape])
        self.high[0] = np.inf if law.signed else lowest  # what may be negative may take the loss below L0
        names = list(law.anchor) if prior > 0 else []
        self.prior, self.anchored = prior, np.array([law.fitted.index(name) for name in names], dtype=np.int64)
        self.anchors = np.array([law.anchor[name] for name in names])

    def residuals(self, theta: Floats) -> Floats:
        """[rows + anchors]; a law that is not positive somewhere is far off there."""
        values = np.concatenate([self.law.evaluate(f, theta) for f in self.features])
        return np.concatenate([np.log(np.maximum(values, 1e-3)) - self.logs, self._pulls(theta)])

    def _pulls(self, theta: Floats) -> Floats:
        return self.prior * np.log(theta[self.anchored] / self.anchors)

    def slopes(self, theta: Floats) -> tuple[Floats, Floats]:
        """Residuals [rows + anchors] and their derivatives [rows + anchors, parameters]."""
        parts = [self.law.evaluate_with_slopes(f, theta) for f in self.features]
        values, slopes = (np.concatenate(each) for each in zip(*parts, strict=True))
        floored = np.maximum(values, 1e-3)
        pulls = np.zeros((len(self.anchored), len(theta)))
        pulls[np.arange(len(self.anchored)), self.anchored] = self.prior / theta[self.anchored]
        residuals = np.concatenate([np.log(floored) - self.logs, self._pulls(theta)])
        return residuals, np.vstack([np.where(values > 1e-3, 1.0, 0.0)[:, None] * slopes / floored[:, None], pulls])

    def objective(self, theta: Floats) -> float:
        """Sum of Huber losses."""
        return float(_huber(self.residuals(theta)).sum())

    def objective_with_gradient(self, theta: Floats) -> tuple[float, Floats]:
        """The same with its gradient."""
        residuals, slopes = self.slopes(theta)
        return float(_huber(residuals).sum()), np.clip(residuals, -DELTA, DELTA) @ slopes

    def start(self, shape: Floats) -> tuple[float, Floats]:
        """Objective and all parameters for a shape: least squares of relative residuals over coefficients >= 0.

        A coefficient with any sign is the difference of two.
        """
        terms = np.concatenate([self.law.basis(f, shape)[0] for f in self.features])
        scaled = terms / np.exp(self.logs)[:, None]
        coefficients = nnls(np.hstack([scaled, -scaled[:, self.signed]]), np.ones(len(scaled)))[0]
        coefficients, negative = np.split(coefficients, [terms.shape[1]])
        coefficients[self.signed] -= negative
        theta = np.clip(np.concatenate([coefficients, shape]), self.low, self.high)
        residuals = np.log(np.maximum(terms @ theta[: len(coefficients)], 1e-3)) - self.logs
        return float(_huber(np.concatenate([residuals, self._pulls(theta)])).sum()), theta


def _huber(residuals: Floats) -> Floats:
    size = np.abs(residuals)
    return np.where(size <= DELTA, 0.5 * size**2, DELTA * (size - 0.5 * DELTA))


def fit(
    law: Law,
    curves: Sequence[Curve],
    *,
    bootstrap: int = 0,
    profile: bool = False,
    prior: float | None = None,
    seed: int = 0,
    note: Note | None = None,
) -> Fit:
    """The law's parameters on these curves.

    Starting points are a grid over the law's shape with the best coefficients for each; from the best of them L-BFGS-B
    with exact gradients, then trust-region steps on the same objective until it is minimal. `bootstrap`: replicates
    with residuals drawn anew in blocks of neighbouring rows. `profile`: lambda is chosen from `LAMBDAS`, by the
    objective. `prior`: see `Problem`, the law's own unless given; 0 is the published objective.

    Raises:
        UserError: there are not more rows than parameters, or a curve lacks what the law needs.
    """
    begin = time.perf_counter()
    curves = [curve for curve in curves if curve.measured]
    _enough(law, curves)
    table: list[dict[str, float]] = []
    strength = law.prior if prior is None else prior
    if profile:
        law, table = _profiled(law, curves, strength, note)
    problem = Problem(law, curves, strength)
    coarse = problem if law.coarse == 1 else Problem(law, curves, strength, law.coarse)
    theta, objective = polish(problem, solve(coarse)[0])
    found = Fit(law, law.mapping(theta), objective, len(problem.logs), np.inf, strength, 0.0, [], profile=table)
    found.condition, found.warnings = _diagnosis(problem, theta, curves, table)
    if bootstrap:
        found.samples = _bootstrap(problem, theta, bootstrap, seed, note)
    found.seconds = time.perf_counter() - begin
    return found


def _enough(law: Law, curves: Sequence[Curve]) -> None:
    rows = sum(int(curve.fitted.sum()) for curve in curves)
    if rows <= len(law.fitted):
        raise UserError(f"law {law.name}: {rows} rows after warm-up for {len(law.fitted)} parameters; give more curves")
    lacking = [curve.path for curve in curves if law.needs_size and curve.size is None]
    if lacking:
        raise UserError(f"{lacking[0]}: law {law.name} needs the size of each model; give parameters: 25e6")


def solve(problem: Problem, starts: int | None = None) -> tuple[Floats, float]:
    """The best parameters and their objective over the best `starts` (the law's number) points of the grid."""
    law = problem.law
    grid = [np.array(shape) for shape in itertools.product(*(law.grid[name] for name in law.shape))]
    ranked = sorted((problem.start(shape) for shape in grid), key=lambda ranked: ranked[0])
    return min((_descend(problem, start) for _, start in ranked[: starts or law.starts]), key=lambda found: found[1])


def _descend(problem: Problem, start: Floats) -> tuple[Floats, float]:
    """L-BFGS-B in units of the start, then `_polish`."""
    unit = np.where(start != 0, np.abs(start), 1.0)
    bounds = list(zip(problem.low / unit, problem.high / unit, strict=True))

    def scaled(at: Floats) -> tuple[float, Floats]:
        value, gradient = problem.objective_with_gradient(at * unit)
        return value / DELTA, gradient * unit / DELTA

    found = minimize(
        scaled,
        start / unit,
        jac=True,
        method="L-BFGS-B",
        bounds=bounds,
        options={"maxiter": 100, "ftol": 1e-12, "gtol": 1e-8},
    )
    return polish(problem, found.x * unit)


def polish(problem: Problem, theta: Floats, evaluations: int = 100) -> tuple[Floats, float]:
    """From near the minimum to the minimum: Gauss-Newton in a trust region, same objective, same bounds."""
    room = 1e-9 * np.maximum(1e-3, np.abs(theta))
    inside = np.clip(theta, problem.low + room, problem.high - room)
    found = least_squares(
        problem.residuals,
        inside,
        jac=lambda at: problem.slopes(at)[1],
        bounds=(problem.low, problem.high),
        loss="huber",
        f_scale=DELTA,
        x_scale="jac",
        max_nfev=evaluations,
        ftol=1e-12,
        xtol=1e-12,
        gtol=1e-14,
    )
    return found.x, problem.objective(found.x)


def _profiled(law: Law, curves: Sequence[Curve], prior: float, note: Note | None) -> tuple[Law, list[dict[str, float]]]:
    """The law with the lambda of the smallest objective, and the objective of each."""
    if "lambda" not in law.fixed:
        raise UserError(f"law {law.name}: has no lambda to choose; leave the profile out")
    table = []
    for value in LAMBDAS:
        _, objective = solve(Problem(law.with_fixed(**{"lambda": value}), curves, prior), starts=2)
        table.append({"lambda": value, "objective": objective})
        if note:
            note(f"lambda {value}: objective {objective:.6g}")
    best = min(table, key=lambda row: (row["objective"], abs(row["lambda"] - law.fixed["lambda"])))
    return law.with_fixed(**{"lambda": best["lambda"]}), table


def _diagnosis(
    problem: Problem, theta: Floats, curves: Sequence[Curve], table: list[dict[str, float]]
) -> tuple[float, list[str]]:
    """Condition number at the fit, and warnings about what the curves cannot tell."""
    names, warnings = problem.law.fitted, [note for curve in curves for note in curve.notes]
    warnings += [f"{curve.path}: {text}" for curve in curves for text in overlooked(problem.law, curve.rates)]
    jacobian = problem.slopes(theta)[1][: len(problem.logs)] * theta
    lengths = np.linalg.norm(jacobian, axis=0)
    values = np.linalg.svd(jacobian, compute_uv=False)
    condition = float(values[0] / values[-1]) if values[-1] > 0 else float("inf")
    if distinct([curve.rates for curve in curves]) == 1:
        warnings.append(
            "all curves have one schedule: the law fits it but is not determined by it; add one with another shape "
            "(one constant and one decayed curve are the least)"
        )
    held = [problem.law.fitted[at] for at in problem.anchored]
    if condition > ILL_CONDITIONED and held:
        warnings.append(
            f"these curves alone do not tell {', '.join(held)} apart (condition number {condition:.2g}): the fit keeps "
            "them near usual values where it can; do not interpret them one by one"
        )
    elif condition > ILL_CONDITIONED:
        warnings.append(
            f"ill-conditioned: condition number {condition:.2g}; some parameters can change together without changing "
            "the fit, so do not interpret them one by one, and do not extrapolate"
        )
    unseen = [name for name, length in zip(names, lengths, strict=True) if length <= 1e-9 * lengths.max()]
    if unseen:
        warnings.append(f"these curves say nothing about {', '.join(unseen)}")
    at = [
        name
        for name, value, low, high in zip(names, theta, problem.low, problem.high, strict=True)
        if name not in unseen
        and (value - low <= AT_BOUND * max(low, AT_BOUND) or (np.isfinite(high) and high - value <= AT_BOUND * high))
    ]
    if at:
        warnings.append(f"{', '.join(at)} ended at a bound of its range")
    if table and min(table, key=lambda row: row["objective"]) in (table[0], table[-1]):
        warnings.append(f"lambda is at the end of what was tried ({LAMBDAS[0]} to {LAMBDAS[-1]})")
    return condition, warnings


def _bootstrap(problem: Problem, theta: Floats, count: int, seed: int, note: Note | None) -> list[list[float]]:
    """Parameters of `count` replicates of the curves; each curve's residuals are drawn in blocks of sqrt(rows)."""
    generator = np.random.default_rng(seed)
    residuals, logs = problem.residuals(theta)[: len(problem.logs)], problem.logs
    clean = logs + residuals
    cuts = np.cumsum([0, *problem.lengths])
    samples = []
    for number in range(count):
        drawn = [_blocks(residuals[low:high], generator) for low, high in itertools.pairwise(cuts)]
        problem.logs = clean - np.concatenate(drawn)
        samples.append(list(problem.law.mapping(polish(problem, theta, 30)[0]).values()))
        if note and (number + 1) % 20 == 0:
            note(f"bootstrap {number + 1} of {count}")
    problem.logs = logs
    return samples


def _blocks(residuals: Floats, generator: np.random.Generator) -> Floats:
    """As many residuals, in random blocks of neighbours: noise of neighbouring rows is alike."""
    count = len(residuals)
    length = max(1, round(count**0.5))
    starts = generator.integers(0, count - length + 1, -(-count // length))
    return residuals[(starts[:, None] + np.arange(length)).ravel()[:count]]


def measures(loss: Floats, predicted: Floats) -> dict[str, float]:
    """mean |r|, mean |r|/loss, max |r|/loss and R2 of a curve, r = loss - predicted, both [rows]."""
    off = np.abs(loss - predicted)
    around = float(((loss - loss.mean()) ** 2).sum())
    return {
        "mae": float(off.mean()),
        "mean_relative_error": float((off / loss).mean()),
        "worst_relative_error": float((off / loss).max()),
        "r2": 1 - float((off**2).sum()) / around if around > 0 else float("nan"),
    }


def score(law: Law, params: dict[str, float], curve: Curve) -> dict[str, Any]:
    """`measures` of a curve's rows after warm-up, with its path first; without losses only the path."""
    entry: dict[str, Any] = {"path": curve.path}
    if curve.measured:
        rows = curve.fitted
        entry |= measures(curve.loss[rows], law.predict(curve.rates, curve.index, params, curve.size)[rows])
    return entry
