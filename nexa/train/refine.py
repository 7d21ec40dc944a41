"""`schedule.refine_from`: the points of a schedule from the metrics of a finished run."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

from nexa.checkpoint.load import list_checkpoints
from nexa.config import load
from nexa.config.schema import Config, ScheduleConfig
from nexa.errors import UserError
from nexa.optim.refined import refined_points

logger = logging.getLogger("nexa")


def with_points(cfg: Config) -> Config:
    """`cfg` with the points of its refined schedule in the place of `schedule.refine_from`; others as they are.

    A run that has checkpoints keeps the points of its own config.yaml: going on needs the other run no more.
    Raises UserError for a run that has not finished, or whose metrics lack gradient norms.
    """
    if cfg.schedule.refine_from is None:
        return cfg
    own = _own_points(Path(cfg.run.dir))
    steps, ratios = own if own is not None else points_of(Path(cfg.schedule.refine_from))
    source = f"the gradient norms of {cfg.schedule.refine_from}" if own is None else f"{cfg.run.dir}/config.yaml"
    logger.info("refined schedule: %d points from %s", len(steps), source)
    schedule = replace(cfg.schedule, refine_from=None, point_steps=steps, point_ratios=ratios)
    return replace(cfg, schedule=schedule)


def _own_points(run: Path) -> tuple[list[int], list[float]] | None:
    if not list_checkpoints(run / "checkpoints"):
        return None
    before: ScheduleConfig = load(run).schedule
    if before.name != "refined" or not before.point_steps:
        return None
    return before.point_steps, before.point_ratios


def points_of(run: Path) -> tuple[list[int], list[float]]:
    """The refined schedule of a finished run, as `refined_points`. Raises UserError, see `with_points`."""
    try:
        total = load(run).total_steps
        steps, norms = _gradient_norms(run / "metrics.jsonl")
        last = steps[-1] if steps else 0
        if last < total:
            raise UserError(f"its metrics end at step {last} of {total}; give a run that has finished")
        return refined_points(steps, norms, total)
    except UserError as error:
        raise UserError(f"schedule.refine_from={run}: {error}") from None


def _gradient_norms(metrics: Path) -> tuple[list[int], list[float]]:
    """Steps and gradient norms of the rows that have a norm; a skipped step of fp16 has none."""
    if not metrics.is_file():
        raise UserError(f"there is no {metrics.name} in it")
    steps, norms = [], []
    for number, line in enumerate(metrics.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            step, norm = int(row["step"]), row["grad_norm"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"line {number} of {metrics.name} is no row with step and grad_norm ({error!r})") from None
        if norm is not None:
            steps.append(step)
            norms.append(float(norm))
    return steps, norms
