"""Runs on many GPUs, with failures."""

import dataclasses

import pytest

from nexa.hardware import GPUS
from nexa.scaling.plan import Limit, Planner
from nexa.scaling.reliability import daly, goodput
from nexa.scaling.simulate import HOST_BYTES, Faults, Simulated, simulate
from nexa.scaling.step_time import Machine
from tests.scaling.common import configuration, layout

TOKENS = 1e9
FAULTS = Faults(node_hours=1000, restart=300, checkpoint=20)


def run(gpus: int, machine: Machine, faults: Faults = FAULTS, **groups: dict) -> Simulated:
    train = {"precision": "bf16", "global_batch_size": 2 * gpus} | groups.pop("train", {})
    cfg = configuration(train=train, **groups)
    planner = Planner(cfg, lambda _: None, Limit(80e9, 0.05), machine)
    found, why = simulate(planner, layout(cfg, gpus, 3), TOKENS, faults)
    assert found is not None, why
    return found


H100 = Machine(GPUS["H100"])


def test_the_figures_belong_together():
    found = run(64, H100)
    per_step = 128 * 16
    assert found.tokens_per_second == pytest.approx(per_step / found.step.total / 64)
    assert found.between_failures == 1000 * 3600 / 8
    assert found.interval == pytest.approx(found.steps_between * found.step.total)
    assert found.interval <= daly(20, found.between_failures) < found.interval + found.step.total
    assert found.goodput == goodput(found.interval, 20, 300, found.between_failures)
    assert found.run == pytest.approx(TOKENS / per_step * found.step.total / found.goodput)
    assert found.fits is True


def test_more_gpus_fail_more_often_wait_longer_and_save_more_often():
    runs = [run(gpus, H100) for gpus in (8, 64, 512, 4096)]
    for name, rising in (("between_failures", False), ("interval", False), ("goodput", False), ("mfu", False)):
        values = [getattr(found, name) for found in runs]
        assert values == sorted(values, reverse=not rising), name
    waits = [found.step.straggler / found.step.compute for found in runs]
    assert waits == sorted(waits)


def test_what_is_worse_costs_time():
    base = run(512, H100)
    for machine, faults in (
        (dataclasses.replace(H100, network=5e9), FAULTS),
        (dataclasses.replace(H100, variation=0.1), FAULTS),
        (H100, dataclasses.replace(FAULTS, node_hours=100)),
        (H100, dataclasses.replace(FAULTS, restart=3000)),
        (H100, dataclasses.replace(FAULTS, checkpoint=200)),
    ):
        assert run(512, machine, faults).run > base.run


def test_a_checkpoint_holds_up_as_long_as_its_copy_unless_said():
    found = run(8, H100, Faults(), checkpoint={"every": 1})
    parameters = found.checkpoint * HOST_BYTES * 8 / 12
    assert parameters == pytest.approx(2 * 320 * 32 + 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 80 + 64) + 32)


def test_a_checkpoint_waits_for_the_one_before():
    """12 bytes of 42,144 parameters at 1 kB/s take minutes, longer than Daly's interval."""
    faults = dataclasses.replace(FAULTS, checkpoint=1e-6, storage=1e3)
    found = run(8, H100, faults, checkpoint={"every": 1})
    assert found.interval == pytest.approx(12 * 42_144 / 1e3, rel=1e-3)
    assert found.interval > daly(1e-6, found.between_failures)


def test_without_figures_there_is_no_time():
    cfg = configuration(train={"precision": "bf16", "global_batch_size": 16})
    for gpu in ("V100-32GB", "L40S"):
        planner = Planner(cfg, lambda _: None, Limit(None, 0.05), Machine(GPUS[gpu]))
        found, why = simulate(planner, layout(cfg, 8, 1), TOKENS, FAULTS)
        assert found is None and ("bf16" in why or "L40S" in why)
