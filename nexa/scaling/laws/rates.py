"""The learning rate of every update of a run: what a loss-curve law reads instead of the logged rows."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nexa.config.build import from_mapping
from nexa.config.schema import Config, ScheduleConfig
from nexa.errors import ConfigError, UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

Floats = NDArray[np.float64]
TOGETHER = {"peak_lr", "min_lr", "total_steps", "points"}
"""Keys of a schedule in a law file that the trainer's schedule does not have."""

POINTED = ("piecewise", "refined")
"""Schedules made of points, which have no other lowest rate."""
MOST_STEPS = 10_000_000
"""A law looks at every step."""


@dataclass(frozen=True)
class Rates:
    """`values[s]` is the rate of update s; one entry more than there are updates, where the schedule ends."""

    values: Floats
    warmup: int
    schedule: Mapping[str, Any] = field(default_factory=dict)
    """As it was given; {} when it comes from a run's configuration."""
    before: Rates | None = None
    """Of the pre-training that a continual run goes on from, up to where it does."""
    replay: float = 0.0
    """Share of a continual run's data that is the old one; 1 where the data stays the same."""

    @property
    def total(self) -> int:
        """Updates of the run."""
        return len(self.values) - 1

    def until(self, updates: int) -> Rates:
        """The first so many updates."""
        return dataclasses.replace(self, values=self.values[: updates + 1])

    @property
    def peak(self) -> float:
        """Largest rate."""
        return float(self.values.max())

    @property
    def lowest(self) -> float:
        """Smallest rate after warm-up."""
        return float(self.values[min(self.warmup, self.total - 1) : self.total].min())


def warmed(warmup: int, peak: float) -> Floats:
    """Warm-up of law files: 0 at step 0, the peak at step warmup - 1 (so the public curves were made)."""
    return np.linspace(0.0, peak, warmup) if warmup != 1 else np.array([peak])


def _number(mapping: Mapping[str, Any], key: str, where: str, *, least: float, default: float | None = None) -> float:
    """A finite number >= `least` of a schedule, or UserError."""
    value = mapping.get(key, default)
    if isinstance(value, str):  # YAML 1.1 reads 3e-4, without a point, as text
        with contextlib.suppress(ValueError):
            value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not np.isfinite(value) or value < least:
        raise UserError(f"{where}: schedule.{key}={value!r}; give a number of at least {least:g}")
    return float(value)


def _steps(mapping: Mapping[str, Any], key: str, where: str, *, least: int, default: int | None = None) -> int:
    value = _number(mapping, key, where, least=least, default=default)
    if value != int(value) or value > MOST_STEPS:
        raise UserError(f"{where}: schedule.{key}={value:g}; give a whole number of steps, {MOST_STEPS:,} at most")
    return int(value)


def _points(mapping: Mapping[str, Any], where: str) -> tuple[list[int], list[float]]:
    """Steps and rates of `points: [[step, rate], …]`."""
    points = mapping.get("points")
    good = isinstance(points, list) and len(points) > 1 and all(isinstance(p, list) and len(p) == 2 for p in points)
    if not good:
        raise UserError(f"{where}: schedule.points={points!r}; give at least two [step, rate], the last at the end")
    assert isinstance(points, list)
    pairs = [{"step": step, "rate": rate} for step, rate in points]
    steps = [_steps(pair, "step", f"{where}: schedule.points", least=0) for pair in pairs]
    rates = [_number(pair, "rate", f"{where}: schedule.points", least=0) for pair in pairs]
    if any(after <= before for before, after in itertools.pairwise(steps)) or max(rates) <= 0:
        raise UserError(f"{where}: schedule.points={points!r}; steps must increase and a rate must be above 0")
    return steps, rates


def _trainers(mapping: Mapping[str, Any], where: str) -> tuple[dict[str, Any], float, int]:
    """The schedule as keys of config group `schedule`, the peak rate, the number of steps."""
    name = mapping.get("name")
    own = {key: value for key, value in mapping.items() if key not in TOGETHER}
    if name == "piecewise" and "points" in mapping:
        steps, rates = _points(mapping, where)
        peak = max(rates)
        return own | {"point_steps": steps, "point_ratios": [rate / peak for rate in rates]}, peak, steps[-1]
    peak = _number(mapping, "peak_lr", where, least=1e-30)
    total = _steps(mapping, "total_steps", where, least=1)
    if "min_lr" in mapping:
        own["min_lr_ratio"] = _number(mapping, "min_lr", where, least=0) / peak
    elif "min_lr_ratio" not in mapping and name not in ("constant", *POINTED):
        raise UserError(f"{where}: schedule has no min_lr; give the final rate (min_lr) or its share of peak_lr")
    return own, peak, total


def from_spec(mapping: Any, where: str) -> Rates:
    """Rates of a schedule of a law file: any `schedule.name` of the trainer with `peak_lr`, `min_lr`, `total_steps`.

    `where` names the curve in messages. Keys besides these are those of config group `schedule`; `piecewise` takes
    `points: [[step, rate], …]`.

    Raises:
        UserError: a key is missing, unknown or has a wrong value.
    """
    from nexa.optim.schedules import SCHEDULES

    if not isinstance(mapping, Mapping):
        raise UserError(f"{where}: schedule={mapping!r}; give a mapping such as {{name: cosine, peak_lr: 3.0e-4, …}}")
    own, peak, total = _trainers(mapping, where)
    try:
        schedule: ScheduleConfig = from_mapping({"schedule": own}).schedule
    except ConfigError as error:
        raise UserError(f"{where}: " + "; ".join(error.problems)) from error
    _check(schedule, total, where)
    after = [peak * SCHEDULES[schedule.name](step, total, schedule) for step in range(schedule.warmup_steps, total + 1)]
    values = np.concatenate([warmed(schedule.warmup_steps, peak), after])
    return Rates(values, schedule.warmup_steps, dict(mapping))


def _check(schedule: ScheduleConfig, total: int, where: str) -> None:
    """The trainer's own rules on schedules that could fail here."""
    if not 0 <= schedule.warmup_steps < total:
        raise UserError(f"{where}: schedule.warmup_steps={schedule.warmup_steps}; give less than all {total} steps")
    exponential = schedule.name == "infinite" or (schedule.name == "wsd" and schedule.decay_shape == "exponential")
    zero = (exponential and schedule.min_lr_ratio <= 0) or (
        schedule.name in POINTED and schedule.interpolation == "exponential" and 0 in schedule.point_ratios
    )
    if zero:
        raise UserError(f"{where}: an exponential decay never reaches 0; give a final rate above 0")
    if schedule.name in POINTED and not 0 < len(schedule.point_steps) == len(schedule.point_ratios):
        raise UserError(
            f"{where}: schedule {schedule.name} needs points: [[step, rate], …], or point_steps and point_ratios"
        )


def from_config(cfg: Config) -> Rates:
    """Rates of a run of the trainer; index s is what the row `step: s + 1` of its metrics.jsonl has trained with.

    Raises:
        UserError: the configuration gives the length of the run neither in steps nor in tokens.
    """
    from nexa.growth.stages import growth_steps, rate_of

    if not (cfg.train.steps or cfg.train.tokens):
        raise UserError(f"run {cfg.run.name}: config.yaml has neither train.steps nor train.tokens")
    total = cfg.total_steps
    growths = growth_steps(cfg)
    values = [rate_of(cfg, step, growths) for step in range(total + 1)]
    return Rates(np.array(values, dtype=np.float64), cfg.schedule.warmup_steps, dataclasses.asdict(cfg.schedule))


def distinct(many: Sequence[Rates], share: float = 0.01) -> int:
    """How many different schedules there are: equal ones agree within `share` of the peak wherever both run."""
    seen: list[Rates] = []
    for rates in many:
        if not any(_same(rates, other, share) for other in seen):
            seen.append(rates)
    return len(seen)


def _same(one: Rates, other: Rates, share: float) -> bool:
    if (one.before is None) != (other.before is None) or one.replay != other.replay:
        return False
    if (
        one.before
        and other.before
        and (one.before.total != other.before.total or not _same(one.before, other.before, share))
    ):
        return False
    length = min(one.total, other.total)
    return bool(np.abs(one.values[:length] - other.values[:length]).max() <= share * max(one.peak, other.peak))
