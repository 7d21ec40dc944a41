"""What benchmarks compute from what they measure."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import loader, optimizers, start
from benchmarks.master_adamw import MasterAdamW
from benchmarks.optimizers import Taken
from benchmarks.shapes import Shape
from benchmarks.step import Setting, batches, planned, products
from nexa.config.schema import ModelConfig

TINY = Shape(
    ModelConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2), 2, 8
)


def test_the_share_of_an_optimizer_in_a_step_is_of_adamws_whole_step() -> None:
    passes = [Taken(0.016, 0.032), Taken(0.9, 0.032), Taken(0.001, 0.032)]  # 1 ms a token, 2 ms of CPU
    beside = [Taken(1.0, 1.0)] * 3
    found = {
        "muon": {"update": [Taken(12.0, 11.0)] * 2, "base": beside},
        "galore": {"update": [Taken(2.0, 1.0)], "base": beside, "refresh": [Taken(202.0, 401.0)], "every": 200},
    }
    made = optimizers.summary(found, passes, TINY, 99_000)
    muon, galore = made["results"]["muon"], made["results"]["galore"]
    assert muon["over"] == pytest.approx({"wall": 11 / (99 + 1), "cpu": 10 / (198 + 1)})
    assert galore["mean"] == pytest.approx({"wall": 3.0, "cpu": 3.0})
    assert galore["over"] == pytest.approx({"wall": 2 / 100, "cpu": 2 / 199})
    assert "  401000.0    200    3000.0" in optimizers.report("tiny", made)


def test_optimizers_are_measured_in_turns_with_adamw(capsys: pytest.CaptureFixture[str]) -> None:
    found = optimizers.measure(["muon", "galore"], TINY, torch.device("cpu"), 3, 60.0)
    assert [(len(row["update"]), len(row["base"])) for row in found.values()] == [(3, 3)] * 2
    assert "refresh" not in found["muon"] and found["galore"]["every"] == 200 and len(found["galore"]["refresh"]) == 1
    assert all(taken.wall > 0 for row in found.values() for taken in row["update"])
    short = optimizers.measure(["scale"], TINY, torch.device("cpu"), 30, 0.0)
    assert len(short["scale"]["update"]) == 2, "ends early"


def test_waits_of_a_run_are_shares_of_its_median_step() -> None:
    rows = [{"step": step, "step_seconds": 0.2, "data_seconds": 9.0 if step < 6 else 0.002} for step in range(1, 11)]
    found = start.waits([*rows, {"step": 10, "val_loss": 3.0}], [0.1, 0.01, 0.03])
    assert found == pytest.approx({"step": 0.2, "waiting": 0.01, "first_save": 0.5, "saving": 0.15})


@pytest.mark.parametrize("case", [case for case in loader.CASES if "source" not in loader.CASES[case]])
def test_batches_are_read_as_in_a_run(tmp_path: Path, case: str) -> None:
    store = loader.write_store(tmp_path / "store", 1_000_000, 0)
    opening, taken = loader.seconds({"source": str(store), **loader.CASES[case]}, 512, 4)
    assert opening > 0 and len(taken) == 3 and min(taken) > 0


def test_what_all_contestants_of_a_step_share() -> None:
    setting = Setting(TINY, "fp32", torch.device("cpu"))
    optimizer = MasterAdamW(list(setting.decoder().parameters()))
    assert optimizer.masters is optimizer.parameters, "fp32 weights are their own masters"
    ids, labels = batches(TINY, setting.device)()
    assert ids.shape == (TINY.batch, TINY.length) and torch.equal(ids[:, 1:], labels[:, :-1])
    shorter = replace(setting, shape=replace(TINY, length=TINY.length // 2))
    assert planned(setting) > planned(shorter), "activations of all tokens are in the plan"
    assert products(setting)() > 0 and TINY.flops == pytest.approx(
        TINY.tokens * (6 * (4 * 16 * 16 + 3 * 16 * 24 + 16 * 32) + 12 * 2 * 8 * 8)
    )
