"""Advice and search."""

import pytest

from nexa.hardware import GPUS
from nexa.scaling.plan import CHECKPOINTING, Limit, Planner, changed, every_layout, one_key
from nexa.scaling.step_time import Machine
from tests.scaling.common import configuration, layout

CFG = configuration(
    model={"num_hidden_layers": 6, "num_key_value_heads": 4},
    train={"precision": "bf16", "global_batch_size": 16, "micro_batch_size": 4},
)


def planner(capacity: float | None, machine: Machine | None = None) -> Planner:
    def arrange(cfg):
        return (
            None
            if cfg.train.global_batch_size % cfg.train.micro_batch_size
            else layout(cfg, 4, max(1, cfg.parallel.zero_stage))
        )

    return Planner(CFG, arrange, Limit(capacity, 0.1), machine)


def test_the_margin_stays_free():
    assert Limit(100.0, 0.1).holds(90) is True
    assert Limit(100.0, 0.1).holds(90.1) is False
    assert Limit(None, 0.1).holds(1e30) is None


def test_changes_leave_the_original():
    other = changed(CFG, {"train.micro_batch_size": 1, "parallel.zero_stage": 3})
    assert (other.train.micro_batch_size, other.parallel.zero_stage) == (1, 3)
    assert (CFG.train.micro_batch_size, CFG.parallel.zero_stage) == (4, 1)
    assert other.train.global_batch_size == 16


def test_every_single_change_helps():
    found = planner(None)
    start = layout(CFG, 4, 1)
    before = found.plan(start).memory.peak.total
    options = list(found.single_changes(start))
    assert {key for changes, _ in options for key in changes} >= {
        "train.micro_batch_size",
        "train.activation_checkpointing",
        "parallel.tensor",
    }
    assert all(plan.memory.peak.total < before for _, plan in options)
    families = [tuple(changes) for changes, _ in options]
    assert len(families) == len(set(families))


def test_the_mildest_value_that_fits_is_named():
    found = planner(None)
    start = layout(CFG, 4, 1)
    need = {m: found._with({"train.micro_batch_size": m}).memory.peak.total for m in (1, 2, 4)}
    assert need[1] < need[2] < need[4]
    for capacity, micro in ((need[2], 2), (need[1], 1), (need[1] - 1, 1)):
        options = [changes for changes, _ in planner(capacity / 0.9 + 1e-6).single_changes(start)]
        assert {"train.micro_batch_size": micro} in options


def test_keys_that_cannot_help_are_not_named():
    cfg = changed(
        CFG, {"train.micro_batch_size": 1, "parallel.zero_stage": 3, "train.activation_checkpointing": "full"}
    )
    keys = {key for changes in one_key(layout(cfg, 1, 3)) for key in changes}
    assert keys == {"train.loss_chunk_tokens"}


def test_the_search_covers_the_space_once():
    found = [tuple(changes.values()) for changes in every_layout(layout(CFG, 4, 1))]
    assert (
        len(found) == len(set(found)) == 4 * 3 * (3 + 2 * 4 + 2 * 5)
    )  # stages, checkpointing, tensor x sequence x micro
    assert {how for *_, how in found} == set(CHECKPOINTING)


@pytest.mark.parametrize("machine", [None, Machine(GPUS["H100"])])
def test_the_quickest_fits_and_nothing_that_fits_is_much_quicker(machine):
    search = planner(None, machine)
    start = layout(CFG, 4, 1)
    plans = [search._with(changes) for changes in every_layout(start)]
    peaks = sorted(plan.memory.peak.total for plan in plans if plan is not None)
    capacity = peaks[len(peaks) // 2] / 0.9
    search = planner(capacity, machine)
    best = search.quickest(start)
    assert best is not None
    changes, plan = best
    assert search.fits(plan)
    assert search.arrange(changed(CFG, changes)).tensor == plan.layout.tensor
    assert changes["parallel.zero_stage"] == plan.layout.stage
    if machine is not None:
        times = [p.time.total for p in plans if p is not None and search.fits(p)]
        assert plan.time.total <= 1.03 * min(times)


def test_nothing_fits_in_nothing():
    assert planner(1000.0).quickest(layout(CFG, 4, 1)) is None
