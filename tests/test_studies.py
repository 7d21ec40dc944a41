"""The studies of benchmarks/: their runs are valid, end once, and are not mixed with those of other settings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.studies import runner
from benchmarks.studies.placements import LEARNING_RATES, SEEDS, VARIANTS, points
from benchmarks.studies.placements_report import loss_table, name_of
from benchmarks.studies.runner import Point, run_points
from nexa.config import check, compose


def test_the_placement_study_is_valid_and_compares_one_thing() -> None:
    found = points("embedded", 2048)
    assert len({point.name for point in found}) == len(VARIANTS) * len(LEARNING_RATES) * len(SEEDS) == len(found)
    first = {name: compose(list(p.overrides)) for name, p in zip(VARIANTS, found, strict=False)}
    for cfg in first.values():
        assert check(cfg, 1) == []
        assert (cfg.model.num_hidden_layers, cfg.optim, cfg.train) == (16, first["pre"].optim, first["pre"].train)
    assert [cfg.norm.placement for cfg in first.values()] == [*list(VARIANTS)[:-1], "pre"]


def test_points_end_once_and_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = []

    def train(point: Point, folder: Path) -> dict:
        trained.append(point.name)
        if point.name == "c" and len(trained) == 3:
            raise RuntimeError("c: train.py ended with 1")
        result = {"overrides": list(point.overrides), "diverged": False, "validation_loss": 1.0, "seconds": 0.0}
        (folder / "results" / f"{point.name}.json").write_text(json.dumps(result))
        return result

    monkeypatch.setattr(runner, "_train", train)
    wanted = [Point(name, (f"optim.lr={name}",)) for name in "abc"]
    with pytest.raises(SystemExit, match="c: train"):
        run_points(wanted, tmp_path)
    assert list(run_points(wanted, tmp_path)) == ["a", "b", "c"]
    assert trained == ["a", "b", "c", "c"]
    with pytest.raises(SystemExit, match="made with other settings"):
        run_points([Point("a", ("optim.lr=1",))], tmp_path)


def test_the_table_has_mean_spread_and_divergence() -> None:
    results = {
        name_of("pre", lr, seed): {"validation_loss": 3.0 + lr + seed / 10} for lr in LEARNING_RATES for seed in SEEDS
    }
    results |= {name_of("post", LEARNING_RATES[1], seed): {"validation_loss": None} for seed in SEEDS}
    results[name_of("post", LEARNING_RATES[0], 0)] = {"validation_loss": 2.9}
    lines = {line.split(" | ")[0].strip("| "): line for line in loss_table(results)}
    assert lines["pre"] == "| pre | 3.052 ± 0.050 | 3.056 ± 0.050 | 3.052 | +0.000 |"
    assert lines["post"] == "| post | 2.900 ± 0.000 | 2 of 2 diverged | 2.900 | -0.152 |"
    assert "not run" in lines["lns"]
