"""Learning-rate schedules: pure functions of the step, so that a run can be re-planned at any point.

Step s (from 0) is the s-th update. Warm-up gives it (s + 1) / warmup of the peak; after it, progress is
counted from 0 at step `warmup` to 1 at step `total` (one past the last update).
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nexa.config.schema import ScheduleConfig

INVERSE_SQRT_ALPHA = 10.0


def _constant(step: float, total: int, cfg: ScheduleConfig) -> float:
    return 1.0


def _progress(step: float, total: int, cfg: ScheduleConfig) -> float:
    return min(1.0, (step - cfg.warmup_steps) / max(1, total - cfg.warmup_steps))


def _linear(step: float, total: int, cfg: ScheduleConfig) -> float:
    return 1.0 + (cfg.min_lr_ratio - 1.0) * _progress(step, total, cfg)


def _cosine(step: float, total: int, cfg: ScheduleConfig) -> float:
    wave = 0.5 * (1.0 + math.cos(math.pi * _progress(step, total, cfg)))
    return cfg.min_lr_ratio + (1.0 - cfg.min_lr_ratio) * wave


def _inverse_sqrt(step: float, total: int, cfg: ScheduleConfig) -> float:
    """sqrt(w / s) with w the warm-up (at least 1), never under the floor (Vaswani et al. 2017)."""
    start = max(1, cfg.warmup_steps)
    return max(cfg.min_lr_ratio, math.sqrt(start / max(start, step)))


DECAY_SHAPES: dict[str, Callable[[float, float], float]] = {
    # x from 0 to 1, floor -> share of the peak; epfml/schedules-and-scaling, Haegele et al. 2024
    "linear": lambda x, floor: floor + (1 - floor) * (1 - x),
    "cosine": lambda x, floor: floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * x)),
    "mirror_cosine": lambda x, floor: floor + (1 - floor) * (2 * (1 - x) - 0.5 * (1 + math.cos(math.pi * x))),
    "square": lambda x, floor: floor + (1 - floor) * (1 - x**2),
    "sqrt": lambda x, floor: floor + (1 - floor) * (1 - math.sqrt(x)),
    "exponential": lambda x, floor: floor**x,
}


def _wsd(step: float, total: int, cfg: ScheduleConfig) -> float:
    """Warm-up, stable, decay over the last `decay_fraction` (Hu et al. 2024)."""
    length = cfg.decay_fraction * total
    start = total - length
    if length <= 0 or step < start:
        return 1.0
    return DECAY_SHAPES[cfg.decay_shape](min(1.0, (step - start) / length), cfg.min_lr_ratio)


def _cool_cosine(x: float, end: float) -> float:
    return end + 0.5 * (1 - end) * (1 + math.cos(math.pi * x))


def _cool_inverse_sqrt(x: float, end: float) -> float:
    def height(y: float) -> float:
        return 1 / math.sqrt(1 + INVERSE_SQRT_ALPHA * y) - 1

    return 1 + (end - 1) * height(x) / height(1)


COOLDOWN_SHAPES = {"cosine": _cool_cosine, "inverse_sqrt": _cool_inverse_sqrt}


def _infinite(step: float, total: int, cfg: ScheduleConfig) -> float:
    """Cool-down to a constant rate, constant, exponential decay (Ibrahim et al. 2024, section 4.1)."""
    cooled = cfg.warmup_steps + cfg.cooldown_fraction * total
    anneal = total - cfg.decay_fraction * total
    if step < cooled:
        x = (step - cfg.warmup_steps) / (cooled - cfg.warmup_steps)
        return COOLDOWN_SHAPES[cfg.cooldown_shape](x, cfg.constant_lr_ratio)
    if step <= anneal or anneal >= total:
        return cfg.constant_lr_ratio
    x = min(1.0, (step - anneal) / (total - anneal))
    return cfg.constant_lr_ratio * (cfg.min_lr_ratio / cfg.constant_lr_ratio) ** x


def _cyclic(step: float, total: int, cfg: ScheduleConfig) -> float:
    """Warmed up and decayed anew for each data set (Ibrahim et al. 2024); later warm-ups start at the floor."""
    starts = [0, *cfg.restart_steps]
    cycle = bisect.bisect_right(starts, step) - 1
    start, end = starts[cycle], [*cfg.restart_steps, total][cycle]
    since = step - start
    if since < cfg.warmup_steps:
        return cfg.min_lr_ratio + (1 - cfg.min_lr_ratio) * (since + 1) / cfg.warmup_steps
    x = min(1.0, (since - cfg.warmup_steps) / max(1, end - start - cfg.warmup_steps))
    return DECAY_SHAPES["cosine"](x, cfg.min_lr_ratio)


INTERPOLATIONS: dict[str, Callable[[float, float, float], float]] = {
    # values at both ends, x from 0 to 1 between them
    "step": lambda left, right, x: left,
    "linear": lambda left, right, x: left + (right - left) * x,
    "exponential": lambda left, right, x: left * (right / left) ** x,
}


def _piecewise(step: float, total: int, cfg: ScheduleConfig) -> float:
    steps, ratios = cfg.point_steps, cfg.point_ratios
    after = bisect.bisect_right(steps, step)
    if after == 0 or after == len(steps):
        return ratios[0 if after == 0 else -1]
    x = (step - steps[after - 1]) / (steps[after] - steps[after - 1])
    return INTERPOLATIONS[cfg.interpolation](ratios[after - 1], ratios[after], x)


def _refined(step: float, total: int, cfg: ScheduleConfig) -> float:
    """The points of another run (`nexa.optim.refined`), stretched from its length to this one's."""
    return _piecewise(step * cfg.point_steps[-1] / total, total, cfg)


SCHEDULES: dict[str, Callable[[float, int, ScheduleConfig], float]] = {
    "constant": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "wsd": _wsd,
    "inverse_sqrt": _inverse_sqrt,
    "infinite": _infinite,
    "cyclic": _cyclic,
    "piecewise": _piecewise,
    "refined": _refined,
}


def learning_rate(step: int, peak: float, total: int, cfg: ScheduleConfig) -> float:
    """Learning rate of update `step` (from 0) of `total`, for a peak rate `peak`."""
    if step < cfg.warmup_steps:
        return peak * (step + 1) / cfg.warmup_steps
    return peak * SCHEDULES[cfg.name](step, total, cfg)


@dataclass(frozen=True)
class Turn:
    """A change of the schedule after step `step`. peak: from then on. how: the whole schedule anew over the steps that
    are left (`restart`), the one that runs (`continue`), or that with a linear warm-up (`rewarm`)."""

    step: int
    how: str
    peak: float


def learning_rate_with_turns(step: int, peak: float, total: int, cfg: ScheduleConfig, turns: Sequence[Turn]) -> float:
    """Learning rate of update `step` (from 0) of `total` in a schedule with turns, which come in their order."""
    start, share = 0, 1.0
    for turn in turns:
        if step < turn.step:
            break
        peak, share = turn.peak, 1.0
        if turn.how == "restart":
            start = turn.step
        elif turn.how == "rewarm" and cfg.warmup_steps:
            share = min(1.0, (step - turn.step + 1) / cfg.warmup_steps)
    return share * learning_rate(step - start, peak, total - start, cfg)
