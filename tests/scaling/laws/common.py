"""Curves made from known parameters, so that no data is needed."""

import numpy as np

from nexa.scaling.laws.base import Law
from nexa.scaling.laws.curves import Curve
from nexa.scaling.laws.rates import Rates, from_spec

TOTAL, WARMUP, PEAK = 6000, 400, 3e-4
SCHEDULES = {
    "cosine": {"name": "cosine", "min_lr": 3e-5},
    "constant": {"name": "constant"},
    "wsd": {"name": "wsd", "min_lr": 3e-5, "decay_fraction": 0.2, "decay_shape": "exponential"},
    "drop": {
        "name": "piecewise",
        "points": [[0, PEAK], [2000, 9e-5], [TOTAL, 9e-5]],
        "interpolation": "step",
        "warmup_steps": WARMUP,
    },
    "to_zero": {"name": "linear", "min_lr": 0.0},
    "infinite": {"name": "infinite", "min_lr": 3e-5},
}
ANNEALING = {"L0": 3.1, "A": 0.52, "alpha": 0.5, "C": 0.6, "lambda": 0.995}
MULTIPOWER = {"L0": 3.04, "A": 0.525, "alpha": 0.508, "B": 363.8, "C": 2.066, "beta": 0.583, "gamma": 0.641}
"""Published, 25M, rounded (arXiv 2503.12811)."""


def rates(name: str, total: int = TOTAL, **changes: object) -> Rates:
    common = {} if "points" in SCHEDULES[name] else {"peak_lr": PEAK, "total_steps": total, "warmup_steps": WARMUP}
    return from_spec(common | SCHEDULES[name] | changes, name)


def curve(
    law: Law, params: dict, name: str, *, noise: float = 0.0, every: int = 20, size: float | None = None
) -> Curve:
    """Rows of a schedule of `SCHEDULES` with losses of the law and relative noise."""
    schedule = rates(name)
    index = np.arange(WARMUP, schedule.total, every)
    loss = law.predict(schedule, index, params, size)
    loss = loss * np.exp(noise * np.random.default_rng(len(name)).standard_normal(len(index)))
    return Curve(name, f"{name}.csv", schedule, index, index, schedule.values[index], loss, size)
