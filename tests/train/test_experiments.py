"""Every file of conf/exp, with the model shrunk from the command line, takes two steps."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest

from nexa.config import check, compose
from nexa.model.decoder import parameter_count
from nexa.parallel.topology import Topology, connect, disconnect
from nexa.train.folder import RunFolder
from nexa.train.launch import build_trainer
from nexa.train.stages import prepared, train_through
from nexa.train.stop import StopFlag
from tests.conftest import REPOSITORY

EXPERIMENTS = sorted(path.stem for path in (REPOSITORY / "conf" / "exp").glob("*.yaml"))
SHRINK = [
    "model.vocab_size=300",
    "model.hidden_size=32",
    "model.intermediate_size=48",
    "model.num_hidden_layers=4",
    "model.num_attention_heads=4",
    "model.num_key_value_heads=2",
    "data.sequence_length=16",
    "train.global_batch_size=4",
    "train.micro_batch_size=2",
    "train.tokens=null",
    "train.steps=2",
    "schedule.warmup_steps=1",
    "eval.batches=1",
    "log.every=1",
    "log.sample_tokens=0",
    "log.plot=false",
]


@pytest.fixture(scope="module")
def topology() -> Iterator[Topology]:
    yield connect(compose(["+exp=quickstart"]))
    disconnect()


SIZES = ("130m", "250m", "350m", "1b", "7b")
GROWN = {"gstack_1b", "gstack_3b", "gstack_7b"}
"""Shrunk they are gstack_410m again."""
OTHER_SIZES = {name for name in EXPERIMENTS if any(name.endswith(f"_{size}") for size in SIZES)} - {
    name for name in EXPERIMENTS if name.startswith("paper_")
}
"""Experiments that shrunk to one size are the 71m ones again."""
ALIKE = {name for name in EXPERIMENTS if name.startswith(("cpt_", "annealing_"))} - {
    "cpt_405m",
    "cpt_405m_infinite",
    "cpt_small_base",
}
"""Experiments that differ in data and in what they start from, which this test takes away."""


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in OTHER_SIZES | ALIKE | GROWN)) for n in EXPERIMENTS]
)
def test_two_steps(name: str, topology: Topology, embedded_cache: Path, tmp_path: Path) -> None:
    # also what goes on from a trained model begins anew here
    new = ["resume.mode=auto", "resume.path=null", "resume.reset_optimizer=false", "data.source=embedded"]
    new += ["data.replay_from=null", "data.replay=null"]
    # growths come with the steps that there are
    stages = compose([f"+exp={name}"]).growth.stages
    grow = [f"growth.stages.{number}.at_tokens={64 * (number + 1)}" for number in range(len(stages))]
    steps = max(2, len(stages) + 1)
    new += [*grow, f"train.steps={steps}"]
    cfg = compose([f"+exp={name}", *SHRINK, *new, f"data.cache_dir={embedded_cache}", f"run.dir={tmp_path}"])
    assert check(cfg, world_size=1) == []
    folder = RunFolder(cfg)
    folder.open(cfg, topology)
    stop = StopFlag()
    trainer, _ = train_through(*prepared(cfg, 1), topology, folder, build_trainer, stop)
    stop.release()
    folder.close()
    rows = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert len(rows) == steps
    assert trainer.state.step == steps
    assert trainer.config.model.num_hidden_layers == 4 * math.prod(stage.factor or 1 for stage in stages)
    assert (tmp_path / "checkpoints" / f"step_{steps:08d}" / "COMPLETE").exists()
    loss = float(rows[0].split('"loss": ')[1].split(",")[0])
    assert math.isfinite(loss)


def test_mixln_1b_has_the_published_size() -> None:
    cfg = compose(["+exp=mixln_1b"])
    assert parameter_count(cfg.model, cfg.norm) == 1_339_082_752
    assert cfg.train.global_batch_size * cfg.data.sequence_length == 131_072
