"""The final loss predicted while a run goes on."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from types import SimpleNamespace

import pytest

from nexa.config import from_mapping
from nexa.config.growth import GrowthStage
from nexa.config.schema import Config
from nexa.scaling.laws.live import Live
from nexa.train.hooks import build_hooks
from nexa.train.hooks.checkpointing import CheckpointHook
from nexa.train.hooks.metrics import MetricsHook
from nexa.train.hooks.prediction import PredictionHook
from tests.train.test_run import rows, train

KEYS = ("predicted_final_loss", "predicted_final_loss_low", "predicted_final_loss_high", "predicted_loss_if_annealed")
STEPS = 400


def config(run_dir: Path, **log: object) -> Config:
    return from_mapping(
        {
            "train": {"steps": STEPS},
            "optim": {"lr": 1e-3},
            "schedule": {"name": "constant", "warmup_steps": 20},
            "log": {"predict_every": 50, "every": 5} | log,
            "run": {"dir": str(run_dir)},
        }
    )


def trainer(step: int, *, is_main: bool = True) -> SimpleNamespace:
    return SimpleNamespace(
        state=SimpleNamespace(step=step), topology=SimpleNamespace(is_main=is_main), finished=step == STEPS
    )


def loss(step: int) -> float:
    return 3.0 + 2.0 * (step / STEPS) ** -0.4


def go(hook: PredictionHook, first: int, last: int) -> list[dict[str, float]]:
    """Rows of every fifth step."""
    made = []
    for step in range(first, last + 1, 5):
        row = {"step": step, "loss": loss(step)}
        hook.on_row(trainer(step), row)
        made.append(row)
    return made


def test_rows_that_are_due_get_a_prediction(tmp_path: Path) -> None:
    hook = PredictionHook(config(tmp_path))
    hook.start(trainer(0))
    made = go(hook, 5, STEPS)
    having = [row["step"] for row in made if KEYS[0] in row]
    assert having == [*range(100, STEPS + 1, 50)], "at 50 there are too few rows after warm-up"
    for row in made:
        assert set(row) - {"step", "loss"} in (set(), set(KEYS))
    half, last = (next(row for row in made if row["step"] == step) for step in (200, STEPS))
    assert half[KEYS[1]] < loss(STEPS) < half[KEYS[2]]
    assert last[KEYS[0]] == pytest.approx(loss(STEPS), rel=0.01)


def test_a_resumed_run_goes_on_as_if_unbroken(tmp_path: Path) -> None:
    cfg = config(tmp_path)
    unbroken = PredictionHook(cfg)
    unbroken.start(trainer(0))
    whole = go(unbroken, 5, STEPS)
    lines = [json.dumps(row) for row in whole if row["step"] <= 230]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 235, "lo']))
    again = PredictionHook(cfg)
    again.start(trainer(220))  # rows beyond the checkpoint are written anew
    assert go(again, 225, STEPS) == [row for row in whole if row["step"] > 220]


def test_another_key_than_the_training_loss(tmp_path: Path) -> None:
    hook = PredictionHook(config(tmp_path, predict_loss="val/web/loss"))
    hook.start(trainer(0))
    for step in range(5, STEPS + 1, 5):
        row = {"step": step, "loss": 9.0} | ({"val/web/loss": loss(step)} if step % 20 == 0 else {})
        hook.on_row(trainer(step), row)
    assert row[KEYS[0]] == pytest.approx(loss(STEPS), rel=0.01)


def test_a_failure_is_one_line_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(self: Live) -> None:
        raise ZeroDivisionError("no reason")

    monkeypatch.setattr(Live, "forecast", fail)
    monkeypatch.setattr(logging.getLogger("nexa"), "propagate", True)
    hook = PredictionHook(config(tmp_path))
    hook.start(trainer(0))
    with caplog.at_level(logging.INFO, "nexa"):
        made = go(hook, 5, STEPS)
    assert [record.message for record in caplog.records] == [
        "no further predictions of the final loss: ZeroDivisionError: no reason"
    ]
    assert all(set(row) == {"step", "loss"} for row in made)


def test_losses_that_are_no_numbers_are_left_out(tmp_path: Path) -> None:
    hook = PredictionHook(config(tmp_path))
    hook.start(trainer(0))
    for step in range(5, 305, 5):
        row = {"step": step, "loss": math.nan if step % 3 == 0 else loss(step)}
        hook.on_row(trainer(step), row)
    assert row[KEYS[1]] < loss(STEPS) < row[KEYS[2]]


def test_a_run_from_other_weights_is_not_predicted(tmp_path: Path) -> None:
    cfg = config(tmp_path)
    cfg.resume.mode, cfg.resume.path = "weights_only", "runs/other"
    hook = PredictionHook(cfg)
    hook.start(trainer(0))
    assert all(KEYS[0] not in row for row in go(hook, 5, STEPS))


def test_a_run_that_grows_is_not_predicted(tmp_path: Path) -> None:
    cfg = config(tmp_path)
    cfg.growth.stages = [GrowthStage(at_tokens=1000, factor=2)]
    hook = PredictionHook(cfg)
    hook.start(trainer(0))
    assert all(KEYS[0] not in row for row in go(hook, 5, STEPS))


def test_only_the_main_rank_fits(tmp_path: Path) -> None:
    hook = PredictionHook(config(tmp_path))
    hook.start(trainer(0, is_main=False))
    assert hook._live is None


def test_it_stands_before_the_file(tmp_path: Path) -> None:
    checkpoint = CheckpointHook(tmp_path, {}, {}, {})
    kinds = [type(hook) for hook in build_hooks(config(tmp_path), [], checkpoint)]
    assert kinds.index(PredictionHook) < kinds.index(MetricsHook)
    assert PredictionHook not in [type(hook) for hook in build_hooks(Config(), [], checkpoint)]


@pytest.mark.parametrize("processes", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_real_run(embedded_cache: Path, tmp_path: Path, processes: int) -> None:
    """Rows get predictions and end at the run's own loss; half-way they are near, as far as 60 steps have a law."""
    options = ("train.steps=60", "eval.every=0", "eval.at_end=false", "checkpoint.every=0", "checkpoint.at_end=false")
    train(embedded_cache, tmp_path / "run", *options, "log.predict_every=15", processes=processes)
    table = rows(tmp_path / "run")
    having = {row["step"]: row for row in table if KEYS[0] in row}
    assert list(having) == [15, 30, 45, 60]
    end = sum(row["loss"] for row in table[-6:]) / 6
    assert having[60][KEYS[0]] == pytest.approx(end, rel=0.03)
    assert having[30][KEYS[0]] == pytest.approx(end, rel=0.1)
    assert all(row[KEYS[1]] < row[KEYS[0]] < row[KEYS[2]] for row in having.values())
    assert [row["step"] for row in table] == list(range(1, 61))
