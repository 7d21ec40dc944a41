"""The schedule that ends lowest under a law."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.optimize import LinearConstraint, minimize

from nexa.config.schema import ScheduleConfig
from nexa.errors import UserError
from nexa.optim.schedules import learning_rate
from nexa.scaling.laws.files import Fitted
from nexa.scaling.laws.rates import Floats, Rates

POINTS = 41
"""Of the schedule found, warm-up apart."""
DENSER = 2.0
"""Power by which points get denser towards the end, where schedules differ."""
UNIT = 1e-3
"""Differences of loss that matter."""


@dataclass(frozen=True)
class Best:
    """A schedule for the trainer and what the law says of it."""

    schedule: ScheduleConfig
    predicted: float
    others: dict[str, float]
    """Predicted final loss of usual schedules with the same steps, warm-up, peak and lowest rate."""


def trainers_rates(schedule: ScheduleConfig, total: int, peak: float) -> Rates:
    """The rates with which the trainer would run it."""
    values = [learning_rate(step, peak, total, schedule) for step in range(total + 1)]
    return Rates(np.array(values), schedule.warmup_steps)


def usual(warmup: int, floor: float) -> dict[str, ScheduleConfig]:
    """Schedules to compare with; `floor`: lowest rate over peak."""

    def wsd(fraction: float) -> ScheduleConfig:
        return ScheduleConfig("wsd", warmup_steps=warmup, min_lr_ratio=floor, decay_fraction=fraction)

    return {
        "constant": ScheduleConfig("constant", warmup_steps=warmup),
        "cosine": ScheduleConfig("cosine", warmup_steps=warmup, min_lr_ratio=floor),
        "linear": ScheduleConfig("linear", warmup_steps=warmup, min_lr_ratio=floor),
        "wsd 10 %": wsd(0.1),
        "wsd 20 %": wsd(0.2),
    }


def optimise(fitted: Fitted, total: int, peak: float, warmup: int, floor: float, size: float | None = None) -> Best:
    """The best schedule that never rises after warm-up, starts at `peak` and stays above `floor` * `peak`.

    Straight lines between points (`POINTS`), which are found by SLSQP with the law's exact gradient from several usual
    schedules. `warmup`: steps; `total`: all steps.

    Raises:
        UserError: numbers out of range, or a law without a gradient.
    """
    if total < 4 or not 0 <= warmup <= total - 4:
        raise UserError(f"--total-steps {total}, --warmup-steps {warmup}: give at least 4 steps more than warm-up has")
    if not 0 < peak < np.inf or not 0 <= floor < 1:
        raise UserError(f"--peak-lr {peak:g} with a lowest rate of {floor * peak:g}: give a peak above it, and above 0")
    steps = _points(warmup, total)
    final = _final(fitted, steps, total, peak, warmup, size)
    known = usual(warmup, floor)
    others = {
        name: fitted.law.final(trainers_rates(s, total, peak), fitted.params, size)[0] for name, s in known.items()
    }
    starts = [
        [learning_rate(step, 1.0, total, known[name]) for step in steps] for name in ("cosine", "linear", "wsd 20 %")
    ]
    ratios = min((_search(final, np.array(start), floor) for start in starts), key=lambda found: final(found)[0])
    steps, ratios = _needed(steps, ratios.round(6))
    schedule = ScheduleConfig(
        "piecewise",
        warmup_steps=warmup,
        min_lr_ratio=floor,
        point_steps=[int(step) for step in steps],
        point_ratios=[float(ratio) for ratio in ratios],
    )
    predicted = fitted.law.final(trainers_rates(schedule, total, peak), fitted.params, size)[0]
    return Best(schedule, predicted, others)


def _points(warmup: int, total: int) -> np.ndarray:
    """Steps from the end of warm-up to the end, denser there."""
    spread = 1 - (1 - np.linspace(0, 1, POINTS)) ** DENSER
    return np.unique(np.round(warmup + spread * (total - warmup)).astype(np.int64))


def _needed(steps: np.ndarray, ratios: Floats) -> tuple[np.ndarray, Floats]:
    """The points without those between two with the same rate."""
    inner = (ratios[1:-1] != ratios[:-2]) | (ratios[1:-1] != ratios[2:])
    kept = np.concatenate([[True], inner, [True]])
    return steps[kept], ratios[kept]


def _final(
    fitted: Fitted, steps: np.ndarray, total: int, peak: float, warmup: int, size: float | None
) -> Callable[[Floats], tuple[float, Floats]]:
    """Final loss of the rates at the points and its gradient."""
    head = np.array([peak * (step + 1) / warmup for step in range(warmup)])
    at = np.arange(warmup, total + 1)
    left = np.clip(np.searchsorted(steps, at, "right") - 1, 0, len(steps) - 2)
    share = (at - steps[left]) / (steps[left + 1] - steps[left])

    def final(ratios: Floats) -> tuple[float, Floats]:
        after = peak * ((1 - share) * ratios[left] + share * ratios[left + 1])
        loss, slope = fitted.law.final(Rates(np.concatenate([head, after]), warmup), fitted.params, size)
        slope, near, part = peak * slope[warmup:], left[:-1], share[:-1]  # the last entry is no update
        gradient = np.bincount(near, slope * (1 - part), len(steps)) + np.bincount(near + 1, slope * part, len(steps))
        return loss, np.asarray(gradient, dtype=np.float64)

    return final


def _search(final: Callable[[Floats], tuple[float, Floats]], start: Floats, floor: float) -> Floats:
    """Rates over peak at the points: the first is 1, none above the one before or under the floor."""
    count = len(start)
    falls = np.eye(count - 1, count) - np.eye(count - 1, count, 1)

    def scaled(ratios: Floats) -> tuple[float, Floats]:
        loss, gradient = final(np.maximum(ratios, 0.0))
        return loss / UNIT, gradient / UNIT

    found = minimize(
        scaled,
        np.clip(start, floor, 1.0),
        jac=True,
        method="SLSQP",
        bounds=[(1.0, 1.0)] + [(floor, 1.0)] * (count - 1),
        constraints=[LinearConstraint(falls, 0.0, np.inf)],
        options={"maxiter": 300, "ftol": 1e-7},
    )
    ratios = np.minimum.accumulate(np.clip(found.x, floor, 1.0))
    ratios[0] = 1.0
    return ratios


def to_yaml(best: Best, total: int, peak: float, law: str) -> str:
    """An option of config group `schedule`."""
    schedule = best.schedule
    lines = [
        f"# Lowest final loss ({best.predicted:.4f}) under {law} for train.steps={total} optim.lr={peak:g}.",
        "name: piecewise",
        f"warmup_steps: {schedule.warmup_steps}",
        f"interpolation: {schedule.interpolation}",
        f"point_steps: {schedule.point_steps}",
        f"point_ratios: {schedule.point_ratios}",
    ]
    return "\n".join(lines) + "\n"
