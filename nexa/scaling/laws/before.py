"""What a continual run goes on from: the rates of its pre-training, of a spec or of the runs' own files."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nexa.config.schema import Config
from nexa.errors import UserError
from nexa.scaling.laws.rates import Rates, from_config, from_spec

ANEW = ("new_schedule", "branch", "weights_only")
"""Values of resume.mode whose schedule begins anew."""


def of_spec(rates: Rates, entry: Mapping[str, Any], where: str) -> Rates:
    """`rates` with `pretraining` (a schedule; `until` cuts it) and `replay` of a curve's entry, if they are there.

    Raises:
        UserError: a wrong schedule, an `until` outside it, a `replay` outside [0, 1] or without `pretraining`.
    """
    given, replay = entry.get("pretraining"), entry.get("replay")
    if given is None:
        if replay is not None:
            raise UserError(f"{where}: replay={replay!r}, but no pretraining; give the schedule of the run before")
        return rates
    if isinstance(replay, bool) or not isinstance(replay, int | float | None) or not 0 <= (replay or 0) <= 1:
        raise UserError(f"{where}: replay={replay!r}; give the share of old data, from 0 to 1 (1: same data)")
    if not isinstance(given, Mapping):
        raise UserError(f"{where}: pretraining={given!r}; give a schedule such as {{name: cosine, peak_lr: 3.0e-4, …}}")
    before = from_spec({key: value for key, value in given.items() if key != "until"}, f"{where}: pretraining")
    until = given.get("until", before.total)
    if isinstance(until, bool) or not isinstance(until, int) or not before.warmup < until <= before.total:
        raise UserError(
            f"{where}: pretraining.until={until!r}; give a step after its warm-up, {before.total} (its end) at most"
        )
    return dataclasses.replace(rates, before=before.until(until), replay=float(replay or 0))


def of_run(rates: Rates, cfg: Config, folder: Path) -> tuple[Rates, list[str]]:
    """`rates` of a run with those of the run that it goes on from, and what is to be said where these are not known.

    `replay` is data.replay, or 1 where both runs have the same data.
    """
    path = cfg.resume.path
    if not path:
        return rates, []
    if cfg.resume.mode not in ANEW:
        return rates, [f"{folder}: goes on from {path} in mid-schedule; its rates before that are taken from its own"]
    try:
        base, before = _run_before(path)
        why = _unlike(base, cfg)
    except UserError as error:
        why = str(error)
    if why:
        return rates, [f"{folder}: goes on from {path}, whose rates no law here takes into account: {why}"]
    same = cfg.data.source == base.data.source and cfg.data.replay_from is None
    return dataclasses.replace(rates, before=before, replay=1.0 if same else cfg.data.replay or 0.0), []


def _run_before(path: str) -> tuple[Config, Rates]:
    """Configuration and rates, up to the checkpoint, of the run with the checkpoint that `path` means."""
    from nexa.checkpoint.catalog import find, step_of
    from nexa.config.files import load

    checkpoint = find(path)
    if checkpoint.parent.name != "checkpoints":
        raise UserError(f"{checkpoint} lies in no run's folder")
    base = load(checkpoint.resolve().parent.parent)
    return base, from_config(base).until(step_of(checkpoint))


def _unlike(base: Config, cfg: Config) -> str:
    """Why the law of one switch does not hold from `base` to `cfg`; empty when it does."""
    if base.resume.path:
        return "that run goes on from another one"
    return "" if base.model == cfg.model else "that run has another model"
