"""The rate in metrics.jsonl is the pure function of the step after every way to go on, for every sort of schedule."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.tokenizer import load_tokenizer
from data_pipeline.writer import StoreWriter
from nexa.config import load, to_yaml
from nexa.config.schema import Config, RunConfig, ScheduleConfig, TrainConfig
from nexa.errors import UserError
from nexa.optim.refined import refined_points
from nexa.optim.schedules import learning_rate
from nexa.train.refine import points_of, with_points
from tests.train.test_kills import MODEL, Forked, rows

PEAK, LENGTH, BATCH = 2e-3, 16, 12
SCHEDULES: dict[str, dict[str, Any]] = {
    "cosine": {"warmup_steps": 2, "min_lr_ratio": 0.1},
    "infinite": {"warmup_steps": 2, "min_lr_ratio": 0.1, "cooldown_fraction": 0.3, "decay_fraction": 0.3},
    "wsd": {"warmup_steps": 2, "min_lr_ratio": 0.1, "decay_fraction": 0.4, "decay_shape": "sqrt"},
    "cyclic": {"warmup_steps": 2, "min_lr_ratio": 0.1, "restart_steps": [5, 9]},
    "piecewise": {"warmup_steps": 2, "point_steps": [3, 9, 14], "point_ratios": [1.0, 0.4, 0.1]},
    "refined": {"warmup_steps": 0},
}


class Runs:
    """Starts runs on one small store, beside `source`, a finished run with logged gradient norms."""

    def __init__(self, server: Forked, root: Path) -> None:
        (root / "store").mkdir()
        writer = StoreWriter(root / "store", np.dtype("<u2"), 10**9)
        writer.append("train", np.random.default_rng(0).integers(0, 256, 5000).astype("<u2"), np.full(50, 100))
        writer.finish(load_tokenizer("bytes"), {})
        self._server, self._store, self.source = server, root / "store", root / "source"
        self.start(self.source, "train.steps=40")

    def start(self, run_dir: Path, *extra: str, code: int = 0) -> str:
        log = run_dir.with_suffix(".log")
        log.unlink(missing_ok=True)
        common = [f"data.source={self._store}", f"run.dir={run_dir}", "train.micro_batch_size=4", "train.steps=12"]
        self._server.start(1, [*MODEL, *common, "checkpoint.every=4", *extra], log)
        codes, text = self._server.codes(120), log.read_text()
        assert codes == [code], text[-3000:]
        return text

    def options(self, name: str) -> list[str]:
        values = {"name": name, **SCHEDULES[name]} | ({"refine_from": self.source} if name == "refined" else {})
        return [f"schedule.{key}={value}".replace(" ", "") for key, value in values.items()]

    def schedule(self, name: str) -> ScheduleConfig:
        """What the options mean; the points of the refined one from the rows of the finished run."""
        if name != "refined":
            return ScheduleConfig(name, **SCHEDULES[name])  # type: ignore[arg-type]
        table = rows(self.source)
        steps, ratios = refined_points([row["step"] for row in table], [row["grad_norm"] for row in table], 40)
        return ScheduleConfig("refined", point_steps=steps, point_ratios=ratios)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    server = Forked()
    yield Runs(server, tmp_path_factory.mktemp("rates"))
    server.close()


@pytest.fixture(scope="module")
def checkpoint(runs: Runs) -> Path:
    return runs.source / "checkpoints" / "step_00000036"


def killed(runs: Runs, run_dir: Path, options: list[str], checkpoint: Path) -> tuple[int, int, float]:
    """As a kill at step 6 leaves it, with the checkpoint of step 4; a refined run needs its source no more."""
    runs.start(run_dir, *options, "train.stop_at=6", "checkpoint.at_end=false")
    assert [row["step"] for row in rows(run_dir)] == list(range(1, 7))
    hidden = shutil.move(runs.source, runs.source.with_name("hidden"))
    try:
        assert "resuming from" in runs.start(run_dir, *options)
    finally:
        shutil.move(hidden, runs.source)
    return 1, 12, PEAK


def longer(runs: Runs, run_dir: Path, options: list[str], checkpoint: Path) -> tuple[int, int, float]:
    runs.start(run_dir, *options, "resume.mode=continue", f"resume.path={checkpoint}", "train.steps=45")
    return 37, 45, PEAK


def another_batch(runs: Runs, run_dir: Path, options: list[str], checkpoint: Path) -> tuple[int, int, float]:
    """Of 16 sequences; 44 steps of them by a budget of tokens."""
    budget = ["train.global_batch_size=16", "train.steps=null", f"train.tokens={44 * 16 * LENGTH}"]
    runs.start(run_dir, *options, "resume.mode=continue", f"resume.path={checkpoint}", *budget)
    assert rows(run_dir)[-1]["tokens"] == (36 * BATCH + 8 * 16) * LENGTH
    return 37, 44, PEAK


def new_schedule(runs: Runs, run_dir: Path, options: list[str], checkpoint: Path) -> tuple[int, int, float]:
    runs.start(run_dir, *options, "resume.mode=new_schedule", f"resume.path={checkpoint}", "optim.lr=1e-3")
    return 1, 12, 1e-3


def weights_only(runs: Runs, run_dir: Path, options: list[str], checkpoint: Path) -> tuple[int, int, float]:
    runs.start(run_dir, *options, "resume.mode=weights_only", f"resume.path={checkpoint}")
    return 1, 12, PEAK


Way = Callable[[Runs, Path, list[str], Path], tuple[int, int, float]]
WAYS: list[Way] = [killed, longer, another_batch, new_schedule, weights_only]
QUICK = {("infinite", longer), ("wsd", another_batch), ("cyclic", new_schedule), ("piecewise", weights_only)}
"""Beside these the kill of a refined run below."""
CASES = [
    pytest.param(name, way, marks=[] if (name, way) in QUICK else pytest.mark.slow, id=f"{name}-{way.__name__}")
    for name in SCHEDULES
    for way in WAYS
]


@pytest.mark.parametrize(("name", "way"), CASES)
def test_the_rate_is_the_function_of_the_step(
    runs: Runs, checkpoint: Path, tmp_path: Path, name: str, way: Way
) -> None:
    """way: makes a run and says its first step, its last one and the peak."""
    run_dir = tmp_path / "run"
    first, total, peak = way(runs, run_dir, runs.options(name), checkpoint)
    table, schedule = rows(run_dir), runs.schedule(name)
    assert [row["step"] for row in table] == list(range(first, total + 1))
    assert [row["lr"] for row in table] == [
        learning_rate(s - 1, peak, total, schedule) for s in range(first, total + 1)
    ]
    behind = name == "piecewise" and first > SCHEDULES[name]["point_steps"][-1]
    assert len({row["lr"] for row in table}) > 4 or behind


def test_a_refined_run(runs: Runs, checkpoint: Path, tmp_path: Path) -> None:
    """Killed, it goes on by itself; config.yaml has the points; the rates are those, stretched, and fall to nothing."""
    run_dir = tmp_path / "run"
    killed(runs, run_dir, runs.options("refined"), checkpoint)
    said = run_dir.with_suffix(".log").read_text()
    assert f"refined schedule: 41 points from {run_dir}/config.yaml" in said, "in the second life"
    saved = load(run_dir)
    assert saved.schedule.refine_from is None and with_points(saved) is saved
    assert (saved.schedule.point_steps, saved.schedule.point_ratios) == points_of(runs.source)
    assert saved.schedule.point_steps == list(range(41)) and saved.schedule.point_ratios[-1] == 0
    rates = [row["lr"] for row in rows(run_dir)]
    assert rates == [learning_rate(s, PEAK, 12, runs.schedule("refined")) for s in range(12)]
    stretched = PEAK * np.interp(np.arange(12) * 40 / 12, saved.schedule.point_steps, saved.schedule.point_ratios)
    assert rates == pytest.approx(stretched.tolist())
    assert 0 < rates[-1] < 0.2 * max(rates) and max(rates) <= PEAK


def test_a_branch_begins_at_the_rate_of_its_trunk(runs: Runs, checkpoint: Path, tmp_path: Path) -> None:
    """Stopped, it goes on by itself, without the trunk."""
    trunk, run_dir = load(runs.source), tmp_path / "run"
    peak = learning_rate(36, trunk.optim.lr, 40, trunk.schedule)
    options = ["schedule.name=linear", "schedule.warmup_steps=0", "schedule.min_lr_ratio=0"]
    options += ["resume.mode=branch", f"resume.path={checkpoint}"]
    killed(runs, run_dir, options, checkpoint)
    assert load(run_dir).optim.lr == peak < trunk.optim.lr
    table = rows(run_dir)
    assert [row["lr"] for row in table] == [peak * (1 - step / 12) for step in range(12)]
    following = runs.source.with_name("following")
    if not following.exists():
        runs.start(following, "resume.mode=continue", f"resume.path={checkpoint}", "train.steps=40")
    assert table[0]["loss"] == rows(following)[0]["loss"], "the same weights on the samples that come next"
    assert table[1]["loss"] == rows(following)[1]["loss"], "with the same moments at the same rate"


def test_a_branch_needs_the_trunks_schedule(runs: Runs, checkpoint: Path, tmp_path: Path) -> None:
    options = ["schedule.name=linear", "schedule.warmup_steps=0", "resume.mode=branch"]
    copied = shutil.copytree(checkpoint, tmp_path / "copied")
    text = runs.start(tmp_path / "run", *options, f"resume.path={copied}", code=2)
    assert f"resume.path={copied}: {copied} lies in no run's folder" in text and "Traceback" not in text
    ended = tmp_path / "ended"
    runs.start(ended, "schedule.name=linear", "schedule.min_lr_ratio=0")
    text = runs.start(tmp_path / "run", *options, f"resume.path={ended}", code=2)
    assert "its learning rate is 0 after step 12; branch from an earlier checkpoint" in text


def finished(folder: Path, lines: str, steps: int = 40) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(to_yaml(Config(train=TrainConfig(steps=steps), run=RunConfig(dir=str(folder)))))
    (folder / "metrics.jsonl").write_text(lines)
    return folder


ROWS = [f'{{"step": {step}, "grad_norm": {1 + step / 100}}}\n' for step in range(1, 41)]


@pytest.mark.parametrize(
    ("lines", "named"),
    [
        (ROWS[:30], "its metrics end at step 30 of 40; give a run that has finished"),
        ([], "its metrics end at step 0 of 40"),
        (ROWS[3::4], "10 steps have a grad_norm; a refined schedule needs at least 20"),
        (ROWS[:20] + ROWS[30:], "no grad_norm between steps 20 and 31 of 40: rows are missing"),
        ([*ROWS[:39], '{"step": 40, "loss": 1.0}\n'], "line 40 of metrics.jsonl is no row with step and grad_norm"),
        ([*ROWS[:39], '{"step": 40, "gr'], "line 40 of metrics.jsonl is no row"),
        ([*ROWS[:20], '{"step": 21, "grad_norm": 0.0}\n', *ROWS[21:]], "a grad_norm is not a positive number"),
    ],
)
def test_runs_that_cannot_be_refined(tmp_path: Path, lines: list[str], named: str) -> None:
    run = finished(tmp_path / "old", "".join(lines))
    with pytest.raises(UserError) as caught:
        points_of(run)
    assert str(caught.value).startswith(f"schedule.refine_from={run}: ") and named in str(caught.value)


def test_a_skipped_step_has_no_norm(tmp_path: Path) -> None:
    skipped = [*ROWS[:20], '{"step": 21, "grad_norm": null}\n', *ROWS[21:]]
    steps, ratios = points_of(finished(tmp_path / "old", "".join(skipped)))
    whole = points_of(finished(tmp_path / "whole", "".join(ROWS)))
    assert steps == whole[0] and ratios == pytest.approx(whole[1], rel=1e-4)


def test_folders_that_are_no_runs(runs: Runs, tmp_path: Path) -> None:
    options = ["schedule.name=refined", "schedule.warmup_steps=0", f"schedule.refine_from={tmp_path}"]
    text = runs.start(tmp_path / "run", *options, code=2)
    assert f"schedule.refine_from={tmp_path}: " in text and "no such file" in text and "Traceback" not in text
    (finished(tmp_path / "old", "") / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match=r"there is no metrics\.jsonl in it"):
        points_of(tmp_path / "old")
