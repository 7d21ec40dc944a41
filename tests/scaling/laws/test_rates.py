"""Rates of spec files and of runs."""

import numpy as np
import pytest

from nexa.errors import UserError
from nexa.optim.schedules import learning_rate
from nexa.scaling.laws.rates import distinct, from_config, from_spec
from tests.scaling.common import configuration
from tests.scaling.laws.common import rates

COSINE = {"name": "cosine", "peak_lr": 3e-4, "min_lr": 3e-5, "warmup_steps": 10, "total_steps": 100}


def test_warm_up_of_law_files_starts_at_0_and_peaks_at_its_last_step():
    found = from_spec(COSINE, "x")
    assert found.total == 100
    assert found.values[:10] == pytest.approx(np.linspace(0, 3e-4, 10))
    assert found.values[10] == pytest.approx(3e-4)
    assert found.values[55] == pytest.approx(3e-5 + 2.7e-4 * 0.5, rel=1e-12)
    assert found.values[100] == pytest.approx(3e-5)
    assert from_spec(COSINE | {"warmup_steps": 1}, "x").values[0] == pytest.approx(3e-4)


@pytest.mark.parametrize(
    ("interpolation", "middle"), [("step", 2e-4), ("linear", 1.25e-4), ("exponential", 1e-4)], ids=str
)
def test_piecewise_goes_through_its_points(interpolation, middle):
    points = [[0, 2e-4], [50, 2e-4], [70, 5e-5]]
    found = from_spec({"name": "piecewise", "points": points, "interpolation": interpolation, "warmup_steps": 4}, "x")
    assert found.total == 70
    assert found.values[[4, 50, 60, 70]] == pytest.approx([2e-4, 2e-4, middle, 5e-5])


@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "wsd", "inverse_sqrt", "infinite", "cyclic"])
def test_every_schedule_of_the_trainer_can_be_predicted(name):
    own = {"warmup_steps": 5, "min_lr_ratio": 0.2, **({"restart_steps": [50]} if name == "cyclic" else {})}
    found = from_spec({"name": name, "peak_lr": 1e-3, "total_steps": 100, **own}, "x")
    run = from_config(configuration(train={"steps": 100}, optim={"lr": 1e-3}, schedule={"name": name, **own}))
    assert found.values[5:] == pytest.approx(run.values[5:], rel=1e-14)


def test_a_runs_rates_are_the_trainers():
    cfg = configuration(train={"steps": 50}, optim={"lr": 2e-3}, schedule={"name": "linear", "warmup_steps": 8})
    found = from_config(cfg)
    assert found.values.tolist() == [learning_rate(step, 2e-3, 50, cfg.schedule) for step in range(51)]
    assert found.values[0] == pytest.approx(2e-3 / 8)


def test_equal_schedules_are_counted_once():
    assert distinct([rates("cosine"), rates("cosine"), rates("constant")]) == 2
    assert distinct([rates("constant"), rates("constant", total=3000)]) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "cosin"}, "cosin"),
        ({"peak_lr": "high"}, "schedule.peak_lr='high'"),
        ({"peak_lr": -1.0}, "schedule.peak_lr=-1.0"),
        ({"total_steps": 10.5}, "whole number"),
        ({"total_steps": 10**12}, "10,000,000 at most"),
        ({"warmup_steps": 100}, "schedule.warmup_steps=100"),
        ({"wramup": 3}, "wramup"),
        ({"name": "wsd", "decay_shape": "exponential", "min_lr": 0}, "never reaches 0"),
        ({"name": "piecewise", "points": [[0, 1e-3]]}, "at least two"),
        ({"name": "piecewise", "points": [[0, 1e-3], [0, 1e-4]]}, "must increase"),
        ({"name": "piecewise"}, "needs points"),
        ({"name": "refined"}, "needs points"),
        (
            {"name": "refined", "point_steps": [0], "point_ratios": [0.0], "interpolation": "exponential"},
            "never reaches",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_wrong_schedule_is_refused(change, message):
    with pytest.raises(UserError, match=r"^here: ") as error:
        from_spec(COSINE | change, "here")
    assert message in str(error.value)


def test_what_has_no_default_must_be_given():
    for key in ("peak_lr", "min_lr", "total_steps"):
        with pytest.raises(UserError, match=key):
            from_spec({name: value for name, value in COSINE.items() if name != key}, "x")
    with pytest.raises(UserError, match="schedule=None"):
        from_spec(None, "x")
