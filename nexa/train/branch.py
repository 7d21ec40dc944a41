"""`resume.mode=branch`: the learning rate that another run had when it wrote a checkpoint."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from nexa.checkpoint.load import find, list_checkpoints, read_state
from nexa.config import load
from nexa.config.schema import Config
from nexa.diagnostics.data import run_of
from nexa.errors import UserError
from nexa.train.course import rate_at

logger = logging.getLogger("nexa")


def with_trunk_rate(cfg: Config) -> Config:
    """`cfg` of a branch with the trunk's learning rate as `optim.lr`; others as they are.

    A run that has checkpoints keeps the rate of its own config.yaml: going on needs the trunk no more. Raises UserError
    for a checkpoint outside a run's folder, and where the trunk's rate was 0.
    """
    if cfg.resume.mode != "branch":
        return cfg
    run = Path(cfg.run.dir)
    if list_checkpoints(run / "checkpoints"):
        return replace(cfg, optim=replace(cfg.optim, lr=load(run).optim.lr))
    assert cfg.resume.path is not None
    try:
        lr, step = _rate_at(find(cfg.resume.path))
    except UserError as error:
        raise UserError(f"resume.path={cfg.resume.path}: {error}") from None
    logger.info("branch: optim.lr=%g, the rate of %s after step %d", lr, cfg.resume.path, step)
    return replace(cfg, optim=replace(cfg.optim, lr=lr))


def _rate_at(checkpoint: Path) -> tuple[float, int]:
    """(rate of the update that would have come after a checkpoint, number of updates before it)."""
    run, saved = run_of(checkpoint), read_state(checkpoint)
    step = int(saved["state"]["step"])
    if run is None:
        raise UserError(
            f"{checkpoint} lies in no run's folder, so its schedule is not known; set resume.mode=new_schedule, and "
            "optim.lr to the rate to begin with"
        )
    lr = rate_at(load(run), saved)
    if lr <= 0:
        raise UserError(f"its learning rate is 0 after step {step}; branch from an earlier checkpoint of {run}")
    return lr, step
