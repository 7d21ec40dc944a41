"""Losses of mixtures at a size and length that were not run, from small and short runs (arXiv 2403.16952).

For each mixture, first the law of steps, then the law of sizes: both c + b x^-e, x the tokens of a run or the
parameters of its model. The exponent is one for all mixtures of a domain, c and b >= 0 are each mixture's (and, over
tokens, each size's) own; so that three runs of each are enough. The mixing law is then fitted on what they say.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import minimize_scalar, nnls

from nexa.errors import UserError
from nexa.scaling.sizes.mixing import Floats

EXPONENTS = (0.02, 2.0)
FEWEST = 3
"""Different x of each mixture."""
LEVELS = ("tokens", "parameters")
"""Columns of a table, in the order in which they are taken to their targets: steps within sizes."""
SAME = 6
"""Digits of a share by which mixtures are the same."""


@dataclass(frozen=True)
class Projected:
    """Mixtures at the target: `shares` [mixtures, sources], `losses` [mixtures, domains]."""

    shares: Floats
    losses: Floats
    exponents: dict[str, list[float]] = field(default_factory=dict)
    """Of each domain, by level."""
    largest: dict[str, float] = field(default_factory=dict)
    """Of the runs, by level."""


def project(shares: Floats, scales: Mapping[str, Floats], losses: Floats, target: Mapping[str, float]) -> Projected:
    """What the mixtures of some runs would reach at `target`, which has some of `LEVELS`.

    `shares` [runs, sources]; `scales`: by level [runs], of the columns that the table has; `losses` [runs, domains].

    Raises:
        UserError: a level of the target has no column, one with different values has no target, or a mixture has fewer
            than three of them.
    """
    keys, losses = np.round(shares, SAME), losses.copy()
    rest = {name: values for name, values in scales.items() if len(np.unique(values)) > 1 or name in target}
    for name in LEVELS:
        if name in target and name not in scales:
            raise UserError(f"--{name}: the table has no column {name}")
        if name in rest and name not in target:
            raise UserError(f"runs differ in {name}; say with --{name} at which one the mixture is to be good")
    exponents = {}
    for name in (name for name in LEVELS if name in rest):
        others = [rest[other] for other in LEVELS[LEVELS.index(name) + 1 :] if other in rest]
        group, first = _groups(np.column_stack([keys, *others]))
        x = rest[name]
        few = [number for number in range(len(first)) if len(np.unique(x[group == number])) < FEWEST]
        if few:
            where = np.array2string(keys[first[few[0]]], precision=4)
            raise UserError(f"mixture {where} has fewer than {FEWEST} different {name}; run it with more")
        levels = [_level(group, x, losses[:, at], target[name]) for at in range(losses.shape[1])]
        losses = np.column_stack([values for values, _ in levels])
        exponents[name] = [exponent for _, exponent in levels]
        keys, rest = keys[first], {other: values[first] for other, values in rest.items()}
    return Projected(keys, losses, exponents, {name: float(scales[name].max()) for name in exponents})


def _groups(keys: Floats) -> tuple[np.ndarray, np.ndarray]:
    """Number of the group of equal keys [rows], and the first row of each group."""
    _, first, group = np.unique(keys, axis=0, return_index=True, return_inverse=True)
    return group.ravel(), first


def _level(group: np.ndarray, x: Floats, losses: Floats, at: float) -> tuple[Floats, float]:
    """The loss of each group at x = `at`, and the exponent: least squares of relative residuals."""
    members = [group == number for number in range(group.max() + 1)]

    def groups(exponent: float) -> list[tuple[Floats, float]]:
        found = []
        for rows in members:
            terms = np.column_stack([np.ones(rows.sum()), (x[rows] / at) ** -exponent])  # at the target the second is 1
            found.append(nnls(terms / losses[rows, None], np.ones(rows.sum())))
        return found

    def misfit(log_exponent: float) -> float:
        return sum(residual**2 for _, residual in groups(float(np.exp(log_exponent))))

    low, high = np.log(EXPONENTS)
    start = min(np.linspace(low, high, 25), key=misfit)
    near = (max(low, start - 0.2), min(high, start + 0.2))
    exponent = float(np.exp(minimize_scalar(misfit, bounds=near, method="bounded", options={"xatol": 1e-6}).x))
    return np.array([float(coefficients.sum()) for coefficients, _ in groups(exponent)]), exponent
